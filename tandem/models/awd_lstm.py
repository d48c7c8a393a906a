"""AWD-LSTM: an LSTM language model that is regularised wherever it can be (Merity, Keskar and Socher 2018).

Weights from state to state are dropped once a window (DropConnect), whole words of the embedding too; between layers
the same units of a sequence are dropped at every token (variational dropout, Gal and Ghahramani 2016). The last layer
is as wide as the embedding, so that the two can share their weights.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.models.encoding import EncodingLanguageModel


@dataclass(frozen=True)
class AwdDropouts:
    """Shares that are dropped in training: words of the embedding, its output, between layers, and of weights."""

    embedding: float = 0.0
    input: float = 0.0
    hidden: float = 0.0
    weight: float = 0.0


class AwdLanguageModel(EncodingLanguageModel):
    """Embedding, LSTM layers of `hidden_size` with a last one of `embedding_size`, and a linear head.

    Its state is (h, c) of each layer, laid flat, each (1, B, width of the layer).
    """

    batch_dimension = 1

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        tied: bool,
        dropouts: AwdDropouts,
    ) -> None:
        super().__init__()
        self.dropout, self.dropouts = dropout, dropouts
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        widths = [embedding_size, *[hidden_size] * (num_layers - 1), embedding_size]
        self.layers = nn.ModuleList(
            nn.LSTM(below, width, batch_first=True) for below, width in itertools.pairwise(widths)
        )
        self.head = nn.Linear(embedding_size, vocabulary_size)
        self._begin_evenly(tied)

    def encode(self, token_ids: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what the last layer says, (B, T, embedding_size), and the state after it."""
        hidden = self._variational(self._embed(token_ids), self.dropouts.input)
        after: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            if number:
                hidden = self._variational(hidden, self.dropouts.hidden)
            before = None if state is None else (state[2 * number], state[2 * number + 1])
            hidden, (h, c) = self._run(layer, hidden, before)
            after += [h, c]
        return hidden, tuple(after)

    def output_dropout(self, hidden: Tensor) -> Tensor:
        """Return `hidden` as the head takes it: in training with dropout."""
        return self._variational(hidden, self.dropout)

    def _embed(self, token_ids: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(token_ids)
        share = self.dropouts.embedding
        if not (self.training and share):
            return embedded
        # A word that is dropped is dropped wherever it stands; masking its vectors is cheaper than all the weights.
        kept = embedded.new_empty(self.embedding.num_embeddings).bernoulli_(1 - share) / (1 - share)
        return embedded * kept[token_ids].unsqueeze(-1)

    def _variational(self, hidden: Tensor, share: float) -> Tensor:
        if not (self.training and share):
            return hidden
        kept = hidden.new_empty(hidden.shape[0], 1, hidden.shape[2]).bernoulli_(1 - share) / (1 - share)
        return hidden * kept

    def _run(
        self, layer: nn.Module, hidden: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        assert isinstance(layer, nn.LSTM)
        if not (self.training and self.dropouts.weight):
            result: tuple[Tensor, tuple[Tensor, Tensor]] = layer(hidden, before)
            return result
        if before is None:
            zeros = hidden.new_zeros(1, hidden.shape[0], layer.hidden_size)
            before = (zeros, zeros)
        # As nn.LSTM calls it, but with weights of this window: the module holds on to those that it began with.
        from_below, from_before, *biases = layer.all_weights[0]
        weights = [from_below, F.dropout(from_before, self.dropouts.weight), *biases]
        output, h, c = torch.lstm(hidden, before, weights, True, 1, 0.0, True, False, True)
        return output, (h, c)
