"""The memories of many texts side by side, stepped together: one token of each, one product with each weight.

A text's logits must not depend on its neighbours (guarantee 5 of the design), to the bit, or a seed would draw other
words in company than alone. Products take other kernels, with other roundings, for few rows than for many, so the rows
are filled up to whole blocks: on a GPU to one shape for all, on a CPU as `slots_are_independent` finds that it
holds. What a row sees of its own text is a window of its ring; the unfilled part of it has weight 0.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.models.language_models import LanguageModel, ModelState
from tandem.models.transformer import DecoderLayer, TransformerLanguageModel

# Windows are a multiple of this, so that the length of a product seldom changes.
_WINDOW = 64


@dataclass(frozen=True)
class Blocks:
    """How many rows are computed at once: a multiple of `multiple`, and `most` at the most.

    `turned`, the head's product is taken as weights times rows: of 33,278 words and 200 units (2 cores of an AMD EPYC,
    torch 2.15, n=60) 16 rows take 4.0 ms and 32 take 5.8, where rows times weights take 6.1 and 7.5.
    """

    multiple: int
    most: int
    turned: bool = False

    def bounds(self, num_texts: int) -> list[tuple[int, int]]:
        """Return the first row and the end of each block for `num_texts` texts."""
        num_rows = -(-num_texts // self.multiple) * self.multiple
        return [(first, min(first + self.most, num_rows)) for first in range(0, num_rows, self.most)]


# Of the head's weights that are multiplied at a time, turned: what comes of them stays in the caches.
_HEAD_ROWS = 4096

# What a row remembers, as it lies in the table.
Kept = tuple[Tensor, ...]
# Row by row: nothing is shared, and nothing can depend on it.
ALONE = Blocks(1, 1)


class Slots(ABC):
    """Rows 0 to `num_texts`, a text each, `capacity` of them at most."""

    def __init__(self, network: LanguageModel, device: torch.device, capacity: int, blocks: Blocks) -> None:
        self.capacity = capacity
        self.num_texts = 0
        self._network, self._device, self._blocks = network, device, blocks
        # The rows that fill up a block are read and written like any other.
        self._num_rows = -(-capacity // blocks.multiple) * blocks.multiple

    @property
    def is_full(self) -> bool:
        """True if there is no row for one more."""
        return self.num_texts == self.capacity

    def put(self, state: ModelState | None) -> None:
        """Add a text in row `num_texts`; `state` is the network's, of a batch of one (None: nothing was read yet)."""
        assert not self.is_full, "all slots are taken"
        self._begin(self.num_texts, state)
        self.num_texts += 1

    def put_back(self, kept: Kept) -> None:
        """Add a text that `take` has returned, to the bit as it was."""
        assert not self.is_full, "all slots are taken"
        self._write(self.num_texts, kept)
        self.num_texts += 1

    def take(self, row: int) -> Kept:
        """Remove the text in `row`, into which the last row moves; return what it remembers."""
        kept = self._read(row)
        self.remove(row)
        return kept

    def remove(self, row: int) -> None:
        """Forget the text in `row`, into which the last row moves."""
        self.num_texts -= 1
        if row != self.num_texts:
            self._write(row, self._read(self.num_texts))

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int]) -> Tensor:
        """Read one token of each text, in the order of the rows; return logits float32 (num_texts, V), on the CPU."""
        assert len(token_ids) == self.num_texts, "a token of each text"
        bounds = self._blocks.bounds(self.num_texts)
        padded = torch.zeros(bounds[-1][1], dtype=torch.int64)
        padded[: self.num_texts] = torch.tensor(token_ids)
        padded = padded.to(self._device)
        logits = [self._head(self._advance(padded[first:end], first, end)).float() for first, end in bounds]
        return (logits[0] if len(logits) == 1 else torch.cat(logits))[: self.num_texts].cpu()

    def _head(self, hidden: Tensor) -> Tensor:
        """Return the logits (N, V) of `hidden` (N, H)."""
        head = self._network.head
        if not self._blocks.turned:
            return cast(Tensor, head(hidden))
        parts = [torch.mm(weights, hidden.t()).t() for weights in torch.split(head.weight, _HEAD_ROWS)]
        return torch.cat(parts, dim=1).add_(head.bias)

    @abstractmethod
    def _advance(self, token_ids: Tensor, first: int, end: int) -> Tensor:
        """Read a token in each row from `first` to `end`; return what the head is to see, (end - first, H)."""

    @abstractmethod
    def _begin(self, row: int, state: ModelState | None) -> None:
        """Put the network's `state` in `row`."""

    @abstractmethod
    def _write(self, row: int, kept: Kept) -> None: ...

    @abstractmethod
    def _read(self, row: int) -> Kept: ...


class RecurrentSlots(Slots):
    """Of a recurrent network: its state tensors, each (layers, rows, width)."""

    def __init__(self, network: LanguageModel, device: torch.device, capacity: int, blocks: Blocks) -> None:
        super().__init__(network, device, capacity, blocks)
        with torch.inference_mode():
            _, example = network.encode(torch.zeros(1, 1, dtype=torch.int64, device=device))
        self._tensors = [part.new_zeros(part.shape[0], self._num_rows, part.shape[2]) for part in example]

    def _advance(self, token_ids: Tensor, first: int, end: int) -> Tensor:
        before = tuple(tensor[:, first:end].contiguous() for tensor in self._tensors)
        hidden, after = self._network.encode(token_ids[:, None], before)
        for tensor, new in zip(self._tensors, after, strict=True):
            tensor[:, first:end] = new
        return self._network.output_dropout(hidden)[:, 0]

    def _begin(self, row: int, state: ModelState | None) -> None:
        for number, tensor in enumerate(self._tensors):
            tensor[:, row] = 0 if state is None else state[number][:, 0]

    def _write(self, row: int, kept: Kept) -> None:
        for tensor, part in zip(self._tensors, kept, strict=True):
            tensor[:, row] = part

    def _read(self, row: int) -> Kept:
        return tuple(tensor[:, row].clone() for tensor in self._tensors)


class TransformerSlots(Slots):
    """Of a Transformer: rings of `context_length` keys and values, and the current one, for each row and layer.

    Keys are kept as rotated by their place in the text: scores depend on distances alone, so that no key need be
    rotated again. Angles are float64; in float32 those of the 100,000th word would be off by a thousandth.
    """

    def __init__(self, network: LanguageModel, device: torch.device, capacity: int, blocks: Blocks) -> None:
        super().__init__(network, device, capacity, blocks)
        assert isinstance(network, TransformerLanguageModel)
        self._transformer = network
        self._layers = [cast(DecoderLayer, layer) for layer in network.layers]
        weight = network.norm.weight
        self._num_heads = self._layers[0].num_heads
        self._head_size = weight.shape[0] // self._num_heads
        self._room = network.context_length + 1
        shape = (len(self._layers), 2, self._num_rows, self._num_heads, self._room, self._head_size)
        self._rings = torch.zeros(shape, dtype=weight.dtype, device=device)
        self._num_read = torch.zeros(self._num_rows, dtype=torch.int64)
        size = self._head_size
        self._frequencies = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)

    def _advance(self, token_ids: Tensor, first: int, end: int) -> Tensor:
        self._num_read[self.num_texts :] = 0
        positions = self._num_read[first:end]
        rows, places = torch.arange(first, end), positions % self._room
        filled = (positions + 1).clamp(max=self._room)
        window = min(self._room, math.ceil(int(filled.max()) / _WINDOW) * _WINDOW)
        hidden_from = (torch.arange(window) >= filled[:, None]).to(self._device)[:, None, None]
        turn = self._angles(positions)
        hidden = self._transformer.embedding(token_ids)
        for layer, ring in zip(self._layers, self._rings, strict=True):
            heads = layer.query_key_value(layer.attention_norm(hidden)).view(-1, 3, self._num_heads, self._head_size)
            queries, keys, values = heads.unbind(1)
            ring[0][rows, :, places], ring[1][rows, :, places] = _rotate(keys, *turn), values
            seen, told = ring[:, first:end, :, :window].unbind(0)
            attended = _attend(_rotate(queries, *turn), seen, told, hidden_from)
            hidden = hidden + layer.project(attended.flatten(1))
            hidden = hidden + layer.contract(F.gelu(layer.expand(layer.feed_forward_norm(hidden))))
        positions += 1
        return cast(Tensor, self._transformer.norm(hidden))

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, (N, 1, head_size / 2), of the rotations at `positions` (N,)."""
        angles = (positions[:, None] * self._frequencies)[:, None]
        dtype = self._rings.dtype
        return angles.cos().to(self._device, dtype), angles.sin().to(self._device, dtype)

    def _begin(self, row: int, state: ModelState | None) -> None:
        # The network has keys as they were before they were rotated, the oldest first.
        num_cached = 0 if state is None else state[0].shape[2]
        cosine, sine = (each.movedim(0, 1) for each in self._angles(torch.arange(num_cached)))
        for ring, keys, values in zip(self._rings, (state or ())[::2], (state or ())[1::2], strict=state is not None):
            # What was there is masked, but 0 times what is no number would still be none.
            ring[:, row] = 0
            ring[0, row, :, :num_cached] = _rotate(keys[0], cosine, sine)
            ring[1, row, :, :num_cached] = values[0]
        self._num_read[row] = num_cached

    def _write(self, row: int, kept: Kept) -> None:
        self._rings[:, :, row], self._num_read[row] = kept

    def _read(self, row: int) -> Kept:
        return self._rings[:, :, row].clone(), self._num_read[row].clone()


def make_slots(network: nn.Module, device: torch.device, capacity: int, blocks: Blocks) -> Slots:
    """Return empty slots for `network`, in eval mode on `device`."""
    kind = TransformerSlots if isinstance(network, TransformerLanguageModel) else RecurrentSlots
    return kind(cast(LanguageModel, network), device, capacity, blocks)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, is_hidden: Tensor) -> Tensor:
    """Return what each head sees, (N, heads, D), for queries (N, heads, D), keys and values (N, heads, T, D)."""
    scores = torch.matmul(queries[:, :, None] / math.sqrt(queries.shape[-1]), keys.transpose(-1, -2))
    return torch.matmul(scores.masked_fill(is_hidden, -math.inf).softmax(-1), values)[:, :, 0]


def _rotate(features: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate as `tandem.models.transformer.rotate` does."""
    left, right = features.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)
