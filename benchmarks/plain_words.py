"""The reference's way, written plainly: the LSTM and the Transformer of word_language_model, and its training step."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLIP = 0.25


class PlainRecurrent(nn.Module):
    """Embedding, two LSTM layers, a head and a log-softmax; text runs along the first dimension."""

    def __init__(self, vocabulary_size: int, width: int, dropout: float) -> None:
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocabulary_size, width)
        self.rnn = nn.LSTM(width, width, 2, dropout=dropout)
        self.decoder = nn.Linear(width, vocabulary_size)
        for weight in (self.encoder.weight, self.decoder.weight):
            nn.init.uniform_(weight, -0.1, 0.1)

    def forward(self, inputs: Tensor, hidden: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return log-probabilities (T · B, V) for inputs (T, B), and the state after them."""
        output, after = self.rnn(self.drop(self.encoder(inputs)), hidden)
        decoded = self.decoder(self.drop(output)).flatten(0, 1)
        return F.log_softmax(decoded, dim=1), after


class PlainTransformer(nn.Module):
    """Two post-norm encoder layers with a causal mask and sinusoidal positions; dropout as the reference has it."""

    def __init__(self, vocabulary_size: int, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.Embedding(vocabulary_size, width)
        layer = nn.TransformerEncoderLayer(width, heads, width, dropout)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(width, vocabulary_size)
        angles = torch.arange(5000)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
        self.positions = torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)[:, None]

    def forward(self, inputs: Tensor, _: object) -> tuple[Tensor, None]:
        """Return log-probabilities (T · B, V) for inputs (T, B)."""
        length = len(inputs)
        hidden = self.dropout(self.encoder(inputs) * math.sqrt(self.width) + self.positions[:length])
        decoded = self.decoder(self.layers(hidden, mask=nn.Transformer.generate_square_subsequent_mask(length)))
        return F.log_softmax(decoded, dim=-1).flatten(0, 1), None


class PlainWords:
    """Steps of the reference over rows of a text (L, B): loss, backward, clip, and an update by hand."""

    def __init__(self, network: nn.Module, rows: Tensor, bptt: int, rate: float) -> None:
        self.network, self.rows, self.bptt, self.rate = network, rows, bptt, rate
        self.hidden: tuple[Tensor, Tensor] | None = None
        self.first = 0
        self.total = 0.0

    def step(self) -> None:
        """Train on the next window."""
        inputs = self.rows[self.first : self.first + self.bptt]
        targets = self.rows[self.first + 1 : self.first + 1 + self.bptt].flatten()
        self.first += self.bptt
        self.network.zero_grad()
        if self.hidden is not None:
            self.hidden = (self.hidden[0].detach(), self.hidden[1].detach())
        output, self.hidden = self.network(inputs, self.hidden)
        loss = F.nll_loss(output, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        for parameter in self.network.parameters():
            assert parameter.grad is not None
            parameter.data.add_(parameter.grad, alpha=-self.rate)
        self.total += loss.item()
