"""A causal Transformer language model whose memory is a window: a pre-norm decoder with rotary positions.

Each layer sees the `context_length` tokens before the current one. Its keys and values are carried as state, in
training too (as in Transformer-XL, Dai et al. 2019), so that what the network sees while generating is what it saw
while learning, at any length. Positions are rotations (RoPE, Su et al. 2021) counted from the oldest cached key: only
distances matter, and none exceeds the window, however long the text.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tandem.models.encoding import EncodingLanguageModel


class TransformerLanguageModel(EncodingLanguageModel):
    """Embedding, `num_layers` decoder layers, a final norm and a linear head.

    Its state is (k, v) of each layer, laid flat, each (B, num_heads, C, head_size) with C ≤ context_length.
    """

    batch_dimension = 0

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        tied: bool,
        context_length: int,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.dropout = nn.Dropout(dropout)
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        self.layers = nn.ModuleList(
            DecoderLayer(embedding_size, hidden_size, num_heads, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(embedding_size)
        self.head = nn.Linear(embedding_size, vocabulary_size)
        self.apply(_initialise)
        # The residual branches add up: scaled down, the sum starts with unit variance (Radford et al. 2019).
        for name, parameter in self.named_parameters():
            if name.endswith(("project.weight", "contract.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * num_layers) ** 0.5)
        if tied:
            self.head.weight = self.embedding.weight

    def encode(self, token_ids: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what the final norm says, (B, T, embedding_size), and the state after it."""
        num_cached = 0 if state is None else state[0].shape[2]
        num_new = token_ids.shape[1]
        hidden = self.dropout(self.embedding(token_ids))
        mask = window_mask(num_cached, num_new, self.context_length, token_ids.device)
        after: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            cache = None if state is None else (state[2 * number], state[2 * number + 1])
            hidden, keys, values = layer(hidden, cache, mask)
            after += [_newest(keys, self.context_length), _newest(values, self.context_length)]
        return self.norm(hidden), tuple(after)

    def output_dropout(self, hidden: Tensor) -> Tensor:
        """Return `hidden` as the head takes it: in training with dropout."""
        dropped: Tensor = self.dropout(hidden)
        return dropped


class DecoderLayer(nn.Module):
    """Attention over the window, then a feed-forward layer, each behind its norm and a residual."""

    def __init__(self, embedding_size: int, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(embedding_size)
        self.query_key_value = nn.Linear(embedding_size, 3 * embedding_size)
        self.project = nn.Linear(embedding_size, embedding_size)
        self.feed_forward_norm = nn.LayerNorm(embedding_size)
        self.expand = nn.Linear(embedding_size, hidden_size)
        self.contract = nn.Linear(hidden_size, embedding_size)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Tensor, cache: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden (B, T, E) after this layer, and all keys and values (B, heads, C + T, head_size)."""
        attended, keys, values = self._attend(self.attention_norm(hidden), cache, mask)
        hidden = hidden + self.dropout(attended)
        expanded = F.gelu(self.expand(self.feed_forward_norm(hidden)))
        return hidden + self.dropout(self.contract(self.dropout(expanded))), keys, values

    def _attend(
        self, hidden: Tensor, cache: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, size = hidden.shape
        heads = self.query_key_value(hidden).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, values = heads.unbind(0)
        if cache is not None:
            keys, values = torch.cat((cache[0], keys), dim=2), torch.cat((cache[1], values), dim=2)
        # The cache holds keys before rotation, so that positions can be counted anew from the oldest of them.
        attended = F.scaled_dot_product_attention(
            rotate(queries, first=keys.shape[2] - length),
            rotate(keys, first=0),
            values,
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return self.project(attended.transpose(1, 2).reshape(batch, length, size)), keys, values


def window_mask(num_cached: int, num_new: int, context_length: int, device: torch.device) -> Tensor | None:
    """Return which keys each new token may see, bool (T, C + T): itself and `context_length` before it.

    None where each may see all, as in the step of one token.
    """
    if num_new == 1 and num_cached <= context_length:
        return None
    query = torch.arange(num_cached, num_cached + num_new, device=device)[:, None]
    key = torch.arange(num_cached + num_new, device=device)[None, :]
    return (key <= query) & (query - key <= context_length)


def rotate(features: Tensor, first: int) -> Tensor:
    """Rotate pairs of `features` (B, heads, T, D) by their positions, which count from `first`; D is even."""
    length, size = features.shape[2], features.shape[3]
    frequencies = 10_000.0 ** (-torch.arange(0, size, 2, device=features.device, dtype=torch.float32) / size)
    positions = torch.arange(first, first + length, device=features.device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    cosine, sine = angles.cos().to(features.dtype), angles.sin().to(features.dtype)
    left, right = features.chunk(2, dim=-1)
    return torch.cat((left * cosine - right * sine, right * cosine + left * sine), dim=-1)


def _newest(cache: Tensor, context_length: int) -> Tensor:
    return cache[:, :, -context_length:]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
