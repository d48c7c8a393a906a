"""What the networks behind the contract of language models share: logits are the head of what the last layer says."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class EncodingLanguageModel(nn.Module, ABC):
    """A language model whose `encode` does everything before the head."""

    embedding: nn.Embedding
    head: nn.Linear

    def forward(self, token_ids: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return logits (B, T, V) for token_ids (B, T), int64, and the state after them."""
        hidden, after = self.encode(token_ids, state)
        return self.head(self.output_dropout(hidden)), after

    @abstractmethod
    def encode(self, token_ids: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what the last layer says, (B, T, H), and the state after it."""

    @abstractmethod
    def output_dropout(self, hidden: Tensor) -> Tensor:
        """Return `hidden` (B, T, H) as the head takes it: in training with dropout."""

    def _begin_evenly(self, tied: bool) -> None:
        """Draw embedding and head from -0.1 to 0.1, as the well-known example does; `tied`, they are one."""
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.head.weight, -0.1, 0.1)
        nn.init.zeros_(self.head.bias)
        if tied:
            self.head.weight = self.embedding.weight
