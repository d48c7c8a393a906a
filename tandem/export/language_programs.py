"""A language model as a program: token_ids and the state, laid flat, in; logits and the state after them out.

The state is the model's own (`tandem.models.language_models`), but for the Transformer's: its keys and values always
have room for the whole window, and `num_cached` says how many of the newest there are. So one program is right from the
first token on. Zeros are the state at the start of a text, of every network.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tandem.models.transformer import TransformerLanguageModel, window_mask

TOKEN_IDS, LOGITS, NUM_CACHED = "token_ids", "logits", "num_cached"


@dataclass(frozen=True)
class StateTensor:
    """A tensor of the state: its name, dtype, and shape with -1 for the batch."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def zeros(self, batch_size: int) -> Tensor:
        """Return it as it is before the first token."""
        sizes = [batch_size if size == -1 else size for size in self.shape]
        return torch.zeros(sizes, dtype=getattr(torch, self.dtype))


def state_of(network: nn.Module) -> tuple[StateTensor, ...]:
    """Return what the state of the exported `network` is made of, in order."""
    if isinstance(network, TransformerLanguageModel):
        heads = network.layers[0].num_heads
        assert isinstance(heads, int)
        shape = (-1, heads, network.context_length, network.norm.weight.shape[0] // heads)
        names = [f"{kind}_{number}" for number in range(len(network.layers)) for kind in ("keys", "values")]
        return (*(StateTensor(name, "float32", shape) for name in names), StateTensor(NUM_CACHED, "int64", (1,)))
    with torch.no_grad():
        _, state = network(torch.zeros(1, 1, dtype=torch.long), None)
    kinds = ("h", "c")[: 1 if len(state) == 1 else 2]
    names = [kinds[number % len(kinds)] + (f"_{number // 2}" if len(state) > 2 else "") for number in range(len(state))]
    return tuple(
        StateTensor(name, "float32", (part.shape[0], -1, part.shape[2]))
        for name, part in zip(names, state, strict=True)
    )


class FlatModel(nn.Module):
    """A recurrent network with its state laid flat."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, token_ids: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return logits (B, T, V) for token_ids (B, T), int64, and the state after them."""
        logits, after = self.network(token_ids, state)
        return (logits, *after)


class FlatTransformer(nn.Module):
    """The Transformer with a state of one size: what is not yet cached is masked."""

    def __init__(self, network: TransformerLanguageModel) -> None:
        super().__init__()
        self.network = network

    def forward(self, token_ids: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return logits (B, T, V) for token_ids (B, T), int64, and the state after them."""
        network, (*cache, num_cached) = self.network, state
        room, length = network.context_length, token_ids.shape[1]
        key = torch.arange(room + length, device=token_ids.device)
        seen = window_mask(room, length, room, token_ids.device)
        mask = (key >= room - num_cached)[None, :]
        mask = mask.expand(length, -1) if seen is None else mask & seen
        hidden, after = network.embedding(token_ids), []
        for number, layer in enumerate(network.layers):
            hidden, keys, values = layer(hidden, (cache[2 * number], cache[2 * number + 1]), mask)
            after += [keys[:, :, length:], values[:, :, length:]]
        logits = network.head(network.norm(hidden))
        return (logits, *after, (num_cached + length).clamp(max=room))


def flat(network: nn.Module) -> nn.Module:
    """Return `network` as it is exported."""
    return FlatTransformer(network) if isinstance(network, TransformerLanguageModel) else FlatModel(network)


def has_dynamic_time(network: nn.Module) -> bool:
    """True if a program of torch.export takes any number of tokens: torch.export unrolls recurrent layers in time."""
    return isinstance(network, TransformerLanguageModel)


def trace_language_model(network: nn.Module) -> ExportedProgram:
    """Return `network`, in eval mode on the CPU, as a program for any batch size and, of the Transformer, any time."""
    state = state_of(network)
    batch = torch.export.Dim("batch", min=1)
    dynamic = has_dynamic_time(network)
    tokens = torch.zeros(2, 3 if dynamic else 1, dtype=torch.long)
    time = {1: torch.export.Dim("time", min=1)} if dynamic else {}
    shapes = tuple({each.shape.index(-1): batch} if -1 in each.shape else None for each in state)
    with warnings.catch_warnings():
        # It sees that recurrent layers keep a list of their weights, and puts the list back.
        warnings.filterwarnings("ignore", "The tensor attributes .* were assigned during export", UserWarning)
        program = torch.export.export(
            flat(network),
            (tokens, *(each.zeros(2) for each in state)),
            dynamic_shapes=({0: batch, **time}, shapes),
            strict=False,
        )
    for node in program.graph.nodes:
        # Where each operator was called, with the paths of this machine.
        node.meta.pop("stack_trace", None)
    return program
