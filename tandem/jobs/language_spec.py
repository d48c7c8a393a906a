"""The specs of jobs on text: training a language model, and evaluating one."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, model_validator

from tandem.jobs.base_spec import Job, Precision, Reference, TrainingJob
from tandem.models.names import LanguageModelName

# Lengths of a Transformer's cache until it is full, each of them compiled; torch gives up beyond 64.
_MOST_SHAPES = 32


class LanguageModelJob(TrainingJob):
    """Train a language model on a prepared text dataset.

    - `batch_size` is the number of rows that the text is cut into, over all devices; `accumulation` trains on so many
      parts of them one after another. `bptt` is the number of tokens in a training window; with `variable_bptt` windows
      vary about it, and the learning rate with them.
    - `schedule` anneal divides the learning rate by 4 whenever an epoch does not improve the validation loss, as the
      well-known example does, for both optimizers; the others are as for classifiers.
    - `context_length` is how far back each layer of a Transformer sees; None takes four windows.
    - Of AWD_LSTM alone: shares of the embedding's words, of its output, of what passes between layers, and of the
      weights from state to state that are dropped (`dropout` is then that of the output); it may be trained with the
      penalties of Merity et al. on large activations (alpha, usually 2) and on their change (beta, usually 1).
    - `average_after`: once so many evaluations brought nothing, the mean of the weights from there on is the model.
    """

    kind: Literal["train_language_model"] = "train_language_model"
    model: LanguageModelName
    epochs: int = Field(6, ge=1, le=100_000)
    batch_size: int = Field(20, ge=1, le=100_000)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = Field(0.0, ge=0, lt=1)
    learning_rate: float = Field(2e-3, gt=0, allow_inf_nan=False)
    schedule: Literal["anneal", "cosine", "linear", "onecycle", "constant"] = "anneal"
    weight_decay: float = Field(0.01, ge=0, allow_inf_nan=False)
    embedding_size: int = Field(200, ge=1, le=16_384)
    hidden_size: int = Field(200, ge=1, le=16_384)
    num_layers: int = Field(2, ge=1, le=128)
    num_heads: int = Field(2, ge=1, le=128)
    dropout: float = Field(0.2, ge=0, lt=1)
    embedding_dropout: float = Field(0.0, ge=0, lt=1)
    input_dropout: float = Field(0.0, ge=0, lt=1)
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    weight_dropout: float = Field(0.0, ge=0, lt=1)
    activation_penalty: float = Field(0.0, ge=0, allow_inf_nan=False)
    change_penalty: float = Field(0.0, ge=0, allow_inf_nan=False)
    average_after: int | None = Field(None, ge=1)
    tied: bool = False
    bptt: int = Field(35, ge=1, le=65_536)
    variable_bptt: bool = False
    context_length: int | None = Field(None, ge=1, le=1_000_000)
    clip_norm: float = Field(0.25, gt=0, allow_inf_nan=False)
    limit_train_tokens: int | None = Field(None, ge=2)
    limit_val_tokens: int | None = Field(None, ge=2)

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        if self.model == "Transformer" and self.embedding_size % (2 * self.num_heads):
            yield (
                f"embedding_size {self.embedding_size} must be a multiple of twice num_heads ({self.num_heads}): "
                "each head rotates its features in pairs"
            )
        is_narrowed = self.model in ("Transformer", "AWD_LSTM")
        if self.tied and not is_narrowed and self.embedding_size != self.hidden_size:
            yield f"tied needs embedding_size ({self.embedding_size}) = hidden_size ({self.hidden_size})"
        for field in ("embedding_dropout", "input_dropout", "hidden_dropout", "weight_dropout"):
            if getattr(self, field) and self.model != "AWD_LSTM":
                yield f"{field} is for AWD_LSTM, not for {self.model}; use dropout"
        if self.context_length and self.model != "Transformer":
            yield f"context_length is for the Transformer; {self.model} carries its state on without end"
        if self.batch_size < self.accumulation * self.num_devices:
            yield f"batch_size {self.batch_size} gives none to some of its {self.accumulation * self.num_devices} parts"
        if self.compile and self.variable_bptt:
            yield "compile and variable_bptt exclude one another: each length would be compiled by itself"
        if self.compile and self.context_length and self.context_length > _MOST_SHAPES * self.bptt:
            yield f"compile with context_length above {_MOST_SHAPES} windows would compile too many shapes"
        if self.average_after and self.schedule != "constant":
            yield "average_after is for a rate that stays as it is; use schedule constant"
        if self.momentum and self.optimizer == "adamw":
            yield "momentum is for optimizer sgd; adamw has its own"


# rms: what its authors give for WikiText-2 in segments of 20. sgd: on 20,000 valid tokens of WikiText-2 cut to 4000
# words, an LSTM of 128 came from ppl 46.2 to 44.3, 42.6, 41.3 and 46.7 at rates 0.03, 0.1, 0.3 and 1 (rms: 37.2,
# and 37.3 with statistics over 2,000,000 tokens).
DYNAMIC_DEFAULTS = {
    "rms": {"dynamic_rate": 1.2e-4, "dynamic_decay": 8e-3},
    "sgd": {"dynamic_rate": 0.1, "dynamic_decay": 1e-3},
}


class TextEvaluationJob(Job):
    """Evaluate a language model on a split of a prepared text dataset: its perplexity, and that of a mode beside it.

    - `model` is a model reference. `split` None is test where the dataset has one, else valid.
    - `window` is the number of tokens read at a time; state is carried, so it changes no result.
    - `mode` cache adds the continuous cache of Grave et al. (2016): `cache_window` states, `cache_theta` times the dot
      product of two states, and the share `cache_lambda` of the mixture.
    - `mode` dynamic adds dynamic evaluation (Krause et al. 2018): after each `dynamic_segment` tokens a step of
      `dynamic_rate`, and of `dynamic_decay` back. `dynamic_rule` rms divides gradients by their root mean square over
      the first `dynamic_statistics` tokens of the train split; sgd does not. A rate or decay of None, or left out, is
      the rule's own: DYNAMIC_DEFAULTS.
    """

    kind: Literal["evaluate_language_model"] = "evaluate_language_model"
    model: Reference
    split: str | None = None
    mode: Literal["plain", "cache", "dynamic"] = "plain"
    window: int = Field(256, ge=1, le=4096)
    precision: Precision = "float32"
    limit_tokens: int | None = Field(None, ge=2)
    cache_window: int = Field(2000, ge=1, le=1_000_000)
    cache_theta: float = Field(0.3, ge=0, allow_inf_nan=False)
    cache_lambda: float = Field(0.1, gt=0, lt=1)
    dynamic_rule: Literal["rms", "sgd"] = "rms"
    dynamic_segment: int = Field(20, ge=1, le=4096)
    dynamic_rate: float = Field(gt=0, allow_inf_nan=False)
    dynamic_decay: float = Field(ge=0, le=1)
    dynamic_statistics: int = Field(200_000, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _with_rates_of_the_rule(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        return {**DYNAMIC_DEFAULTS.get(str(given.get("dynamic_rule")), DYNAMIC_DEFAULTS["rms"]), **given}

    @property
    def model_name(self) -> str:
        """What the record calls the run's model."""
        return self.model
