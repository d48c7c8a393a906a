"""The forward contract of every language model, and how one is built from its hyperparameters.

    logits, state = model(token_ids, state)

token_ids (B, T) int64; logits (B, T, V); `state` carries what came before (None: nothing), and is opaque to callers
but for `detach`. Feeding a text in pieces of any length, state carried, gives the logits of feeding it
whole, to float rounding: training, evaluation and generation share this one path. What the head sees can be had before
it: `model(token_ids, state)` is `head(output_dropout(hidden))` of `hidden, state = model.encode(token_ids, state)`.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from tandem.models.awd_lstm import AwdDropouts, AwdLanguageModel
from tandem.models.names import LanguageModelName
from tandem.models.recurrent import RecurrentLanguageModel
from tandem.models.transformer import TransformerLanguageModel

# One tuple of tensors a layer or a kind of memory; the batch dimension is given by `batch_dimension` of the model.
ModelState = tuple[Tensor, ...]


@dataclass(frozen=True)
class LanguageModelShape:
    """The hyperparameters that fix a language model's tensors.

    `hidden_size` is the width of a recurrent layer, or of a Transformer's feed-forward layer. `context_length` is the
    number of earlier tokens that a Transformer's layer can see; recurrent models have no such limit.
    """

    model: LanguageModelName
    vocabulary_size: int
    embedding_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    dropout: float
    tied: bool
    context_length: int


class LanguageModel(Protocol):
    """The contract; see the module's docstring."""

    batch_dimension: int
    embedding: nn.Embedding
    head: nn.Linear

    def __call__(self, token_ids: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Return logits (B, T, V) for token_ids (B, T), int64, and the state after them."""
        ...

    def encode(self, token_ids: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        """Return what the last layer says, (B, T, H), and the state after it."""
        ...

    def output_dropout(self, hidden: Tensor) -> Tensor:
        """Return `hidden` (B, T, H) as the head takes it: in training with dropout."""
        ...


def build_language_model(shape: LanguageModelShape, dropouts: AwdDropouts | None = None) -> nn.Module:
    """Return the freshly initialised network of `shape`; it fulfils LanguageModel.

    `dropouts` are those of an AWD_LSTM besides `shape.dropout`; they matter in training alone.
    """
    if shape.model == "AWD_LSTM":
        return AwdLanguageModel(
            vocabulary_size=shape.vocabulary_size,
            embedding_size=shape.embedding_size,
            hidden_size=shape.hidden_size,
            num_layers=shape.num_layers,
            dropout=shape.dropout,
            tied=shape.tied,
            dropouts=dropouts or AwdDropouts(),
        )
    if shape.model == "Transformer":
        return TransformerLanguageModel(
            vocabulary_size=shape.vocabulary_size,
            embedding_size=shape.embedding_size,
            hidden_size=shape.hidden_size,
            num_layers=shape.num_layers,
            num_heads=shape.num_heads,
            dropout=shape.dropout,
            tied=shape.tied,
            context_length=shape.context_length,
        )
    return RecurrentLanguageModel(
        cell=shape.model,
        vocabulary_size=shape.vocabulary_size,
        embedding_size=shape.embedding_size,
        hidden_size=shape.hidden_size,
        num_layers=shape.num_layers,
        dropout=shape.dropout,
        tied=shape.tied,
    )


def detach(state: ModelState | None) -> ModelState | None:
    """Return `state` cut from the graph that made it, so that backward stops at the window's edge."""
    return None if state is None else tuple(part.detach() for part in state)
