"""Two evaluations of language models on the same text, compared token by token: what `tandem evaluate` leaves behind.

Each is compared by the losses that it is about: those of the model alone, or with its cache, or as it follows the text.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tandem.comparison.intervals import CONFIDENCE
from tandem.comparison.predictions import EVALUATION_FILE
from tandem.comparison.token_differences import Losses, TokenComparison, compare_losses, largest_differences
from tandem.comparison.token_losses import LOSSES_FILE, read_token_losses
from tandem.data.vocabulary import Vocabulary
from tandem.errors import Conflict, InvalidRequest

# Tokens before the one that is shown.
CONTEXT_TOKENS = 8


@dataclass(frozen=True)
class TextEvaluation:
    """What an evaluation says of itself; `losses` (N,) in nats, of tokens 1 to N of the split."""

    model: str
    mode: str
    dataset: str
    split: str
    facts: dict[str, Any]
    losses: Losses


@dataclass(frozen=True)
class TokenDifference:
    """A token that the models differ on: its place in the split, the text before it, and its losses in nats."""

    place: int
    before: str
    token: str
    loss_a: float
    loss_b: float


def read_text_evaluation(run: Path) -> TextEvaluation:
    """Return the evaluation in the run directory `run`; raise InvalidRequest where it is none, or not whole."""
    try:
        facts = json.loads((run / EVALUATION_FILE).read_bytes())
        mode = facts["mode"]
        prefix = "" if mode == "plain" else f"{mode}_"
        evaluation = TextEvaluation(
            facts["model"],
            mode,
            facts["dataset"],
            facts["split"],
            facts,
            read_token_losses(run / f"{prefix}{LOSSES_FILE}"),
        )
        if len(evaluation.losses) != facts["num_tokens"] or not len(evaluation.losses):
            raise ValueError("its losses are not those of its tokens")
    except (OSError, ValueError, KeyError, TypeError, InvalidRequest) as error:
        raise InvalidRequest(f"evaluation {run.name} can't be read ({error}): evaluate again") from error
    return evaluation


def compare_text_evaluations(a: TextEvaluation, b: TextEvaluation, confidence: float = CONFIDENCE) -> TokenComparison:
    """Return the comparison; raise Conflict where they are not of the same tokens."""
    for name, what in (
        ("dataset_fingerprint", "datasets"),
        ("split", "splits"),
        ("vocabulary_sha256", "vocabularies"),
        ("num_tokens", "numbers of tokens"),
    ):
        if a.facts[name] != b.facts[name]:
            raise Conflict(f"the evaluations are of other {what}; evaluate both models on the same text")
    return compare_losses(a.losses, b.losses, confidence)


def differing_tokens(
    a: TextEvaluation, b: TextEvaluation, dataset: Path, vocabulary: Vocabulary, count: int
) -> list[TokenDifference]:
    """Return the `count` tokens whose losses differ most, with what stands before them.

    `dataset` is the directory of the dataset; without its tokens there are none to show.
    """
    path = dataset / "tokens" / f"{a.split}.npy"
    if not path.is_file():
        return []
    tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    return [
        TokenDifference(
            place + 1,
            " ".join(vocabulary.tokens[each] for each in tokens[max(0, place + 1 - CONTEXT_TOKENS) : place + 1]),
            vocabulary.tokens[tokens[place + 1]],
            float(a.losses[place]),
            float(b.losses[place]),
        )
        for place in largest_differences(a.losses, b.losses, count)
    ]


def verdict(found: TokenComparison, a: str, b: str) -> str:
    """Return in a sentence which of the models named `a` and `b` is better."""
    low, high = found.ratio
    between = f"95 % interval {low - 1:+.2%} to {high - 1:+.2%}" if found.has_interval else "too few for an interval"
    figures = (
        f"perplexity {found.perplexity_b:.2f} against {found.perplexity_a:.2f} over {found.num_tokens:,} tokens, "
        f"{found.share - 1:+.2%} ({between})"
    )
    if not (found.interval.high < 0 or found.interval.low > 0):
        return f"No difference is shown between {a} and {b}: {b} has {figures}."
    better, worse = (b, a) if found.difference < 0 else (a, b)
    return f"{better} is better than {worse}: {b} has {figures}."
