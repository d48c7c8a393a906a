"""A language model run a piece at a time, for one text."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from tandem.errors import CheckpointCorrupt
from tandem.models.language_models import LanguageModel, ModelState
from tandem.models.one_token import Floats, Memory, floats, remember


class NetworkSteps:
    """`network`, in eval mode on `device`, as `tandem.models.decoding` steps it."""

    def __init__(self, network: LanguageModel, device: torch.device) -> None:
        self._network = network
        self._device = device
        self._vectors: _Vectors | None = None
        if device.type == "cpu" and network.head.weight.dtype == torch.float32:
            self._vectors = _Vectors(network)

    def step(self, token_ids: list[int], state: Any) -> tuple[Tensor, Any]:
        """Return the logits float32 (V,) after the last of `token_ids` (one or more), and the state after them.

        The state given is used up.
        """
        if self._vectors is not None and (len(token_ids) == 1 or isinstance(state, Memory)):
            return self._vectors.step(token_ids, state)
        return self._step_at_once(token_ids, state)

    @torch.inference_mode()
    def _step_at_once(self, token_ids: list[int], state: Any) -> tuple[Tensor, ModelState]:
        hidden, after = self._network.encode(torch.tensor([token_ids], device=self._device), state)
        # Of a prompt only the last token is asked: the head over all of them is most of their work.
        logits: Tensor = self._network.head(self._network.output_dropout(hidden[:, -1:]))
        return logits[0, 0].float(), after

    def warm(self) -> None:
        """Run once; raise CheckpointCorrupt if the answer is not finite."""
        logits, state = self.step([0, 0], None)
        for answer in (logits, self.step([0], state)[0]):
            if not bool(answer.isfinite().all()):
                raise CheckpointCorrupt("the network's answers are not finite numbers")


class _Vectors:
    """The same for a network in float32 on the CPU, a token at a time."""

    def __init__(self, network: LanguageModel) -> None:
        self._network = network
        self._embedding = floats(network.embedding.weight)
        self._weight, self._bias = floats(network.head.weight), floats(network.head.bias)

    def step(self, token_ids: list[int], state: Memory | ModelState | None) -> tuple[Tensor, Memory]:
        """See NetworkSteps."""
        memory = state if isinstance(state, Memory) else remember(cast(nn.Module, self._network), state)
        for token_id in token_ids:
            hidden = memory.step(self._embedding[token_id])
        logits: Floats = self._weight @ hidden
        logits += self._bias
        return torch.from_numpy(logits), memory
