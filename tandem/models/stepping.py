"""A language model run a piece at a time, for one text."""

from typing import Any

import torch
from torch import Tensor

from tandem.errors import CheckpointCorrupt
from tandem.models.language_models import LanguageModel


class NetworkSteps:
    """`network`, in eval mode on `device`, as `tandem.models.decoding` steps it."""

    def __init__(self, network: LanguageModel, device: torch.device) -> None:
        self._network = network
        self._device = device

    @torch.inference_mode()
    def step(self, token_ids: list[int], state: Any) -> tuple[Tensor, Any]:
        """Return the logits float32 (V,) after the last of `token_ids` (one or more), and the state after them."""
        hidden, after = self._network.encode(torch.tensor([token_ids], device=self._device), state)
        # Of a prompt only the last token is asked: the head over all of them is most of their work.
        logits: Tensor = self._network.head(self._network.output_dropout(hidden[0, -1]))
        return logits.float(), after

    def warm(self) -> None:
        """Run once; raise CheckpointCorrupt if the answer is not finite."""
        logits, state = self.step([0, 0], None)
        for answer in (logits, self.step([0], state)[0]):
            if not bool(answer.isfinite().all()):
                raise CheckpointCorrupt("the network's answers are not finite numbers")
