"""The step of one token of one text on the CPU, written out in numpy as products of a matrix and a vector.

A network's own forward does the same, but at one token what surrounds the products costs more than they do. One core
with AVX-512, vocabulary 33,278, one token in all, with the draw: LSTM 200 in 1.2 ms (forward: 2.0), Transformer 200 in
1.3 ms (2.2), where reading the weights takes 1.05 ms. `tests/unit/test_one_token.py` holds both to each other at
every position. The arrays are views of the network's own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor, nn

from tandem.models.awd_lstm import AwdLanguageModel
from tandem.models.language_models import ModelState
from tandem.models.recurrent import RecurrentLanguageModel
from tandem.models.transformer import DecoderLayer, TransformerLanguageModel

Floats = NDArray[np.float32]


class Memory(ABC):
    """What a network remembers of one text; it changes with each step."""

    @abstractmethod
    def step(self, embedded: Floats) -> Floats:
        """Take in one token, (E,); return what the last layer says, (H,)."""


def remember(network: nn.Module, state: ModelState | None) -> Memory:
    """Return the memory that `state` (of a batch of one; None: of nothing) is to `network`, which is in eval mode."""
    if isinstance(network, TransformerLanguageModel):
        return TransformerMemory(network, state)
    if isinstance(network, AwdLanguageModel):
        return RecurrentMemory(list(network.layers), state)
    assert isinstance(network, RecurrentLanguageModel)
    return RecurrentMemory([network.layers], state)


def floats(tensor: Tensor) -> Floats:
    """Return the values of `tensor`, on the CPU, without a copy."""
    array: Floats = tensor.detach().numpy()
    return array


class RecurrentMemory(Memory):
    """The vectors of each layer of `stacks`, in order: (h, c) of an LSTM, else (h,)."""

    def __init__(self, stacks: list[nn.Module], state: ModelState | None) -> None:
        self._cells: list[tuple[Cell, list[Floats]]] = []
        self._vectors: list[tuple[Floats, ...]] = []
        parts = list(state or ())
        for stack in stacks:
            assert isinstance(stack, nn.RNNBase)
            size = 2 if isinstance(stack, nn.LSTM) else 1
            own, parts = parts[:size], parts[size:]
            blank = (np.zeros(stack.hidden_size, np.float32),) * size
            for number, parameters in enumerate(stack.all_weights):
                self._cells.append((_CELLS[stack.mode], [floats(each) for each in parameters]))
                self._vectors.append(tuple(floats(part[number, 0]) for part in own) or blank)

    def step(self, embedded: Floats) -> Floats:
        """See Memory."""
        for number, (cell, parameters) in enumerate(self._cells):
            self._vectors[number] = cell(embedded, self._vectors[number], *parameters)
            embedded = self._vectors[number][0]
        return embedded


def _lstm(
    below: Floats, before: tuple[Floats, Floats], w_ih: Floats, w_hh: Floats, b_ih: Floats, b_hh: Floats
) -> tuple[Floats, ...]:
    h, c = before
    gates = _sum(below, h, w_ih, w_hh, b_ih, b_hh)
    size = len(h)
    new = np.tanh(gates[2 * size : 3 * size])
    _sigmoid(gates)
    c = gates[size : 2 * size] * c + gates[:size] * new
    return gates[3 * size :] * np.tanh(c), c


def _gru(
    below: Floats, before: tuple[Floats], w_ih: Floats, w_hh: Floats, b_ih: Floats, b_hh: Floats
) -> tuple[Floats, ...]:
    (h,) = before
    size = len(h)
    from_below, from_before = w_ih @ below + b_ih, w_hh @ h + b_hh
    gates = _sigmoid(from_below[: 2 * size] + from_before[: 2 * size])
    new = np.tanh(from_below[2 * size :] + gates[:size] * from_before[2 * size :])
    return (new + gates[size:] * (h - new),)


def _rnn_tanh(below: Floats, before: tuple[Floats], *parameters: Floats) -> tuple[Floats, ...]:
    return (np.tanh(_sum(below, before[0], *parameters)),)


def _rnn_relu(below: Floats, before: tuple[Floats], *parameters: Floats) -> tuple[Floats, ...]:
    return (np.maximum(_sum(below, before[0], *parameters), 0),)


# What comes from below, the layer's vectors, and its parameters as torch names and orders them → its vectors after.
Cell = Callable[..., tuple[Floats, ...]]
_CELLS: dict[str, Cell] = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _rnn_tanh, "RNN_RELU": _rnn_relu}


def _sum(below: Floats, h: Floats, w_ih: Floats, w_hh: Floats, b_ih: Floats, b_hh: Floats) -> Floats:
    total: Floats = w_ih @ below
    total += w_hh @ h
    total += b_ih
    total += b_hh
    return total


def _sigmoid(features: Floats) -> Floats:
    """Put the sigmoid of `features` in their place, as 1/2 + tanh(x/2)/2: exp would overflow."""
    features *= 0.5
    np.tanh(features, out=features)
    features *= 0.5
    features += 0.5
    return features


class TransformerMemory(Memory):
    """The keys and values of the newest tokens, in rings of `context_length` and the current one.

    Keys are kept as rotated by their place in the text: scores depend on distances alone, so that no key need be
    rotated again. Angles are float64; in float32 those of the 100,000th word would be off by a thousandth.
    """

    def __init__(self, network: TransformerLanguageModel, state: ModelState | None) -> None:
        layers = [layer for layer in network.layers if isinstance(layer, DecoderLayer)]
        num_heads, width = layers[0].num_heads, network.norm.weight.shape[0]
        size = width // num_heads
        self._room = network.context_length + 1
        self._num_read = 0 if state is None else state[0].shape[2]
        self._frequencies = 10_000.0 ** (-np.arange(0, size, 2) / size)
        cached = [None] * len(layers) if state is None else list(zip(state[::2], state[1::2], strict=True))
        angles = self._angles(np.arange(self._num_read))
        self._layers = [
            _LayerMemory(layer, self._room, size, pair, angles) for layer, pair in zip(layers, cached, strict=True)
        ]
        self._norm = _Norm(network.norm)

    def _angles(self, positions: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Return cosine and sine, (T, head_size / 2), of the rotations at `positions` (T,)."""
        angles = positions[:, None] * self._frequencies
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def step(self, embedded: Floats) -> Floats:
        """See Memory."""
        slot, filled = self._num_read % self._room, min(self._num_read + 1, self._room)
        angles = self._angles(np.array([self._num_read]))
        self._num_read += 1
        for layer in self._layers:
            embedded = layer.step(embedded, slot, filled, angles)
        return self._norm(embedded)


class _LayerMemory:
    """One layer with its rings (num_heads, room, head_size); `cached` (1, num_heads, C, head_size) fill them first."""

    def __init__(
        self,
        layer: DecoderLayer,
        room: int,
        size: int,
        cached: tuple[Tensor, Tensor] | None,
        angles: tuple[Floats, Floats],
    ) -> None:
        self._num_heads = layer.num_heads
        self._keys = np.zeros((layer.num_heads, room, size), np.float32)
        self._values = np.zeros_like(self._keys)
        if cached is not None:
            num_cached = len(angles[0])
            self._keys[:, :num_cached] = _rotate(floats(cached[0][0]), *angles)
            self._values[:, :num_cached] = floats(cached[1][0])
        self._attention_norm, self._feed_forward_norm = _Norm(layer.attention_norm), _Norm(layer.feed_forward_norm)
        self._query_key_value, self._project = _Affine(layer.query_key_value), _Affine(layer.project)
        self._expand, self._contract = _Affine(layer.expand), _Affine(layer.contract)
        self._scale = np.float32(1 / math.sqrt(size))

    def step(self, hidden: Floats, slot: int, filled: int, angles: tuple[Floats, Floats]) -> Floats:
        """Return hidden (E,) after this layer; the token's key and value go to `slot`, and `filled` are seen."""
        heads = self._query_key_value(self._attention_norm(hidden)).reshape(3, self._num_heads, -1)
        rotated = _rotate(heads[:2], *angles)
        self._keys[:, slot], self._values[:, slot] = rotated[1], heads[2]
        scores = np.matmul(self._keys[:, :filled], (rotated[0] * self._scale)[:, :, None])[:, :, 0]
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        attended = np.matmul(scores[:, None, :], self._values[:, :filled])[:, 0]
        attended /= scores.sum(axis=1, keepdims=True)
        hidden = hidden + self._project(attended.reshape(-1))
        expanded = self._expand(self._feed_forward_norm(hidden))
        expanded *= ndtr(expanded)
        result: Floats = hidden + self._contract(expanded)
        return result


class _Affine:
    """A linear layer of one vector."""

    def __init__(self, linear: nn.Linear) -> None:
        self._weight, self._bias = floats(linear.weight), floats(linear.bias)

    def __call__(self, features: Floats) -> Floats:
        result: Floats = self._weight @ features
        result += self._bias
        return result


class _Norm:
    """A LayerNorm of one vector."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self._weight, self._bias, self._eps = floats(norm.weight), floats(norm.bias), norm.eps

    def __call__(self, features: Floats) -> Floats:
        centred: Floats = features - np.add.reduce(features) / len(features)
        deviation = math.sqrt(float(centred @ centred) / len(features) + self._eps)
        centred *= np.float32(1 / deviation)
        centred *= self._weight
        centred += self._bias
        return centred


def _rotate(features: Floats, cosine: Floats, sine: Floats) -> Floats:
    """Rotate as `tandem.models.transformer.rotate` does."""
    half = features.shape[-1] // 2
    left, right = features[..., :half], features[..., half:]
    rotated: Floats = np.concatenate((left * cosine - right * sine, right * cosine + left * sine), axis=-1)
    return rotated
