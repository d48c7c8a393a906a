"""How likely a text is to a language model: the log-probability of each token after those before it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from tandem.models.language_models import LanguageModel, ModelState

# Tokens that are run at once: the logits of 33,278 words for so many are 8.5 MB, and others wait for no more than them.
PIECE_TOKENS = 64


@dataclass(frozen=True)
class ScoredPiece:
    """Of T tokens: their log-probabilities (T,) in nats; those of the likeliest there, and their ids, (T, K)."""

    log_probabilities: Tensor
    alternatives: Tensor
    alternative_ids: Tensor


class TextScorer:
    """`network`, in eval mode on `device`, asked what it makes of given texts."""

    def __init__(self, network: LanguageModel, device: torch.device) -> None:
        self._network = cast(LanguageModel, cast(nn.Module, network).eval())
        self._device = device

    def reading(self, token_ids: Sequence[int], num_alternatives: int = 0) -> "TextReading":
        """Return the reading of a text of two or more tokens; the first is given, and not scored."""
        return TextReading(self._network, self._device, token_ids, num_alternatives)


class TextReading:
    """A text on its way through the network, a piece at a time; the pieces depend on no other text."""

    def __init__(
        self, network: LanguageModel, device: torch.device, token_ids: Sequence[int], num_alternatives: int
    ) -> None:
        self._network, self._device = network, device
        self._token_ids, self._num_alternatives = token_ids, num_alternatives
        self._state: ModelState | None = None
        self._num_read = 0

    def __iter__(self) -> Iterator["TextReading"]:
        """Yield itself as often as `step` is to be called."""
        while self._num_read < len(self._token_ids) - 1:
            yield self

    @torch.inference_mode()
    def step(self) -> ScoredPiece:
        """Return the next tokens scored, at most PIECE_TOKENS."""
        first, end = self._num_read, min(self._num_read + PIECE_TOKENS, len(self._token_ids) - 1)
        read = torch.tensor([self._token_ids[first:end]], device=self._device)
        targets = torch.tensor(self._token_ids[first + 1 : end + 1], device=self._device)
        hidden, self._state = self._network.encode(read, self._state)
        logits: Tensor = self._network.head(self._network.output_dropout(hidden))[0].float()
        normaliser = logits.logsumexp(1, keepdim=True)
        best, ids = logits.topk(min(self._num_alternatives, logits.shape[1]), dim=1)
        self._num_read = end
        own = logits.gather(1, targets[:, None]) - normaliser
        return ScoredPiece(own[:, 0].cpu(), (best - normaliser).cpu(), ids.cpu())
