"""Recurrent language models: RNN_TANH, RNN_RELU, LSTM and GRU."""

from typing import Literal

import torch
from torch import Tensor, nn

from tandem.models.encoding import EncodingLanguageModel

Cell = Literal["RNN_TANH", "RNN_RELU", "LSTM", "GRU"]


class RecurrentLanguageModel(EncodingLanguageModel):
    """Embedding, recurrent layers, and a linear head over the vocabulary.

    Its state is (h,) or, for LSTM, (h, c), each (num_layers, B, hidden_size). Dropout follows the embedding, each
    layer but the last, and the last layer.
    """

    batch_dimension = 1

    def __init__(
        self,
        cell: Cell,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        dropout: float,
        tied: bool,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.layers = _recurrent(cell, embedding_size, hidden_size, num_layers, dropout)
        self.head = nn.Linear(hidden_size, vocabulary_size)
        self._begin_evenly(tied)

    def encode(self, token_ids: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what the last layer says, (B, T, hidden_size), and the state after it."""
        embedded = self.dropout(self.embedding(token_ids))
        if state is None:
            hidden, after = self.layers(embedded)
        else:
            hidden, after = self.layers(embedded, state if len(state) == 2 else state[0])
        return hidden, after if isinstance(after, tuple) else (after,)

    def output_dropout(self, hidden: Tensor) -> Tensor:
        """Return `hidden` as the head takes it: in training with dropout."""
        dropped: Tensor = self.dropout(hidden)
        return dropped


def _recurrent(cell: Cell, embedding_size: int, hidden_size: int, num_layers: int, dropout: float) -> nn.RNNBase:
    # torch warns about dropout with one layer, where it has nothing to act on.
    between = dropout if num_layers > 1 else 0.0
    if cell in ("LSTM", "GRU"):
        kind = nn.LSTM if cell == "LSTM" else nn.GRU
        return kind(embedding_size, hidden_size, num_layers, dropout=between, batch_first=True)
    nonlinearity = "tanh" if cell == "RNN_TANH" else "relu"
    layers = nn.RNN(
        embedding_size, hidden_size, num_layers, nonlinearity=nonlinearity, dropout=between, batch_first=True
    )
    if cell == "RNN_RELU":
        # The identity start of Le, Jaitly and Hinton (2015): with torch's own start a ReLU network learns far slower.
        for name, weight in layers.named_parameters():
            if name.startswith("weight_hh"):
                with torch.no_grad():
                    nn.init.eye_(weight).mul_(0.5)
    return layers
