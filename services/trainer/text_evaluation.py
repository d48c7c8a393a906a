"""The evaluation of a language model, in the training process: a checkpoint over a split, its losses and its metrics.

It leaves in the run directory the losses of the tokens (`tandem.comparison.token_losses`), of the model alone in
`token_losses.npy` and of the mode in `cache_token_losses.npy` or `dynamic_token_losses.npy`, and `evaluation.json`:

    {"model", "run_id", "step", "architecture", "dataset", "dataset_fingerprint", "vocabulary_sha256", "split", "mode",
     "parameters": {…of the mode}, "precision", "window", "num_tokens", "num_unknown", "num_words", "num_bytes",
     "loss", "ppl", "word_ppl", "bits_per_byte", then the same four of the mode: "cache_loss" … or "dynamic_loss" …}

`loss` is the mean of nats a token, `ppl` its exponential, over the `num_tokens` tokens that are predicted: all but the
first. `<eos>`, which ends each line, and `<unk>` (`num_unknown` of them) count as tokens, as in the figures published
for WikiText-2. `word_ppl` divides the same nats by `num_words`, what blanks part in the text, so that `<eos>` costs but
does not count; `bits_per_byte` divides them by ln 2 and `num_bytes`. Both are of whole splits (null with a limit), and
`bits_per_byte` is null where the text has words that only its tokens call `<unk>`: the loss doesn't say which they are.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from services.trainer.engine.dynamic_evaluation import (
    DynamicSettings,
    GradientStatistics,
    dynamic_losses,
    gradient_statistics,
)
from services.trainer.engine.memory import is_out_of_memory
from services.trainer.engine.neural_cache import CacheSettings, cache_losses
from services.trainer.engine.text_evaluation import Reading, token_losses
from tandem.checkpoints.card import LanguageModelCard
from tandem.checkpoints.tensors import load_checkpoint
from tandem.comparison.predictions import EVALUATION_FILE
from tandem.comparison.token_losses import LOSSES_FILE, perplexity, write_token_losses
from tandem.data.corpus import load_tokens
from tandem.data.manifest import TextDataset
from tandem.data.text_counts import TextCounts, count_text
from tandem.data.vocabulary import Vocabulary
from tandem.errors import InvalidJob, NonFiniteLoss, OutOfMemory
from tandem.jobs.spec import TextEvaluationJob
from tandem.jobs.text_checks import check_vocabulary, read_card, text_split
from tandem.models.devices import resolve_device, resolve_precision
from tandem.volume import Volume, replace_json, volume_errors

log = logging.getLogger("tandem.run")

_PROGRESS_INTERVAL_S = 0.5
_REMEDIES = {
    "": "its weights have diverged",
    "cache_": "lower --cache-theta",
    "dynamic_": "the weights diverge as they follow the text: lower --dynamic-rate",
}

# By the prefix of its metrics: "" of the model alone, "cache_", "dynamic_".
Scored = dict[str, Tensor]
Losses = np.ndarray[Any, np.dtype[np.float32]]


def evaluate_text(
    spec: TextEvaluationJob,
    run: Path,
    volume: Volume,
    report: Callable[..., None],
    stop: Callable[[], bool],
    fence: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> dict[str, float] | None:
    """Evaluate, write the files into the run directory, and return the flat metrics; None if it was stopped.

    The files are written under `fence()`, which raises where the attempt may write no more.
    `report("progress", **facts)` is called at most twice a second; step and num_steps are tokens of all passes. Raises
    TandemError where model and data don't fit.
    """
    if spec.num_threads:
        torch.set_num_threads(spec.num_threads)
    subject = _open_subject(spec, volume)
    try:
        losses = _collect(subject, _passes(subject, spec, _Meter(report, _tokens_of_passes(subject, spec))), stop)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            options = {"cache": "--cache-window or --window", "dynamic": "--dynamic-segment or --window"}
            option = options.get(spec.mode, "--window")
            raise OutOfMemory(f"out of memory ({str(error)[:200].splitlines()[0]}); lower {option}") from error
        raise
    if losses is None:
        return None
    document = _document(subject, spec, losses)
    with volume_errors(run), fence():
        for prefix, each in losses.items():
            write_token_losses(run / f"{prefix}{LOSSES_FILE}", each)
        replace_json(run / EVALUATION_FILE, document)
    return flat_metrics(document)


@dataclass(frozen=True)
class _Subject:
    """What is evaluated, and on what; `train` is what gradient statistics are taken over, where they are."""

    label: str
    card: LanguageModelCard
    network: nn.Module
    reading: Reading
    dataset: TextDataset
    split: str
    vocabulary: Vocabulary
    tokens: Tensor
    train: Tensor | None
    counts: TextCounts | None


def _open_subject(spec: TextEvaluationJob, volume: Volume) -> _Subject:
    dataset, split = text_split(spec.dataset, spec.split, volume)
    located, card = read_card(spec.model, volume)
    if not isinstance(card, LanguageModelCard):
        raise InvalidJob(f"{located.label} is a classifier; a text needs a language model")
    vocabulary = check_vocabulary(located, card, dataset, volume)
    directory, device = volume.dataset(spec.dataset), resolve_device(spec.device)
    with_statistics = spec.mode == "dynamic" and spec.dynamic_rule == "rms"
    return _Subject(
        label=located.label,
        card=card,
        network=load_checkpoint(located.checkpoint, located.digest).network.to(device),
        reading=Reading(device, resolve_precision(spec.precision, device), spec.window),
        dataset=dataset,
        split=split,
        vocabulary=vocabulary,
        tokens=load_tokens(directory, split, spec.limit_tokens),
        train=load_tokens(directory, "train", spec.dynamic_statistics) if with_statistics else None,
        counts=None if spec.limit_tokens else _counts(directory / f"{split}.txt", vocabulary, dataset, split),
    )


def _counts(path: Path, vocabulary: Vocabulary, dataset: TextDataset, split: str) -> TextCounts | None:
    """Return the counts of the split's text, None where the file is not the text of the tokens."""
    counts = count_text(path, vocabulary)
    if counts is None or counts.num_tokens != dataset.num_tokens[split]:
        log.warning("%s is not the text of the tokens; word_ppl and bits_per_byte are left out", path)
        return None
    return counts


def _tokens_of_passes(subject: _Subject, spec: TextEvaluationJob) -> list[int]:
    num_targets = len(subject.tokens) - 1
    if spec.mode != "dynamic":
        return [num_targets]
    statistics = [] if subject.train is None else [len(subject.train)]
    return [num_targets, *statistics, num_targets]


def _passes(subject: _Subject, spec: TextEvaluationJob, meter: "_Meter") -> Iterator[Scored]:
    if spec.mode == "cache":
        settings = CacheSettings(spec.cache_window, spec.cache_theta, spec.cache_lambda)
        for plain, mixed in cache_losses(subject.network, subject.tokens, subject.reading, settings):
            meter.advance(len(plain))
            yield {"": plain, "cache_": mixed}
        return
    for plain in token_losses(subject.network, subject.tokens, subject.reading):
        meter.advance(len(plain))
        yield {"": plain}
    if spec.mode == "dynamic":
        yield from _dynamic_passes(subject, spec, meter)


def _dynamic_passes(subject: _Subject, spec: TextEvaluationJob, meter: "_Meter") -> Iterator[Scored]:
    statistics = None
    if subject.train is not None:
        meter.next_pass()
        statistics = GradientStatistics(subject.network)
        for num_tokens in gradient_statistics(
            subject.network, subject.train, subject.reading, spec.dynamic_segment, statistics
        ):
            meter.advance(num_tokens)
            yield {}
    meter.next_pass()
    settings = DynamicSettings(spec.dynamic_segment, spec.dynamic_rate, spec.dynamic_decay)
    for losses in dynamic_losses(subject.network, subject.tokens, subject.reading, settings, statistics):
        meter.advance(len(losses))
        yield {"dynamic_": losses}


def _collect(subject: _Subject, passes: Iterator[Scored], stop: Callable[[], bool]) -> dict[str, Losses] | None:
    """Return the losses of all tokens by prefix; None if it was stopped. Raises NonFiniteLoss at the first."""
    parts: dict[str, list[Tensor]] = {}
    for scored in passes:
        if stop():
            return None
        for prefix, losses in scored.items():
            if not bool(losses.isfinite().all()):
                number = sum(len(part) for part in parts.get(prefix, ())) + int((~losses.isfinite()).nonzero()[0]) + 1
                raise NonFiniteLoss(
                    f"{subject.label} gives token {number:,} of {subject.dataset.name}/{subject.split} a loss that is "
                    f"no number; {_REMEDIES[prefix]}"
                )
            parts.setdefault(prefix, []).append(losses)
    return {prefix: torch.cat(each).numpy() for prefix, each in parts.items()}


class _Meter:
    """Counts tokens, and reports how far the evaluation is; the time left is at the speed of the pass in hand."""

    def __init__(self, report: Callable[..., None], tokens_of_passes: list[int]) -> None:
        self._report = report
        self._tokens = tokens_of_passes
        self._pass = 0
        self._done = 0
        self._began = time.monotonic()
        self._said_at = self._began - _PROGRESS_INTERVAL_S

    def next_pass(self) -> None:
        self._pass += 1
        self._done = sum(self._tokens[: self._pass])
        self._began = time.monotonic()

    def advance(self, num_tokens: int) -> None:
        self._done += num_tokens
        now, total = time.monotonic(), sum(self._tokens)
        if now - self._said_at < _PROGRESS_INTERVAL_S and self._done < total:
            return
        self._said_at = now
        rate = (self._done - sum(self._tokens[: self._pass])) / max(now - self._began, 1e-9)
        left = (total - self._done) / rate
        self._report("progress", step=self._done, num_steps=total, rate=rate, time_left_s=left, metrics={})


def _document(subject: _Subject, spec: TextEvaluationJob, losses: dict[str, Losses]) -> dict[str, Any]:
    counts = subject.counts
    metrics = (_metrics(prefix, each, counts) for prefix, each in losses.items())
    return {
        "model": subject.label,
        "run_id": subject.card.run_id,
        "step": subject.card.step,
        "architecture": subject.card.architecture,
        "dataset": subject.dataset.name,
        "dataset_fingerprint": subject.dataset.fingerprint,
        "vocabulary_sha256": hashlib.sha256(subject.vocabulary.to_json()).hexdigest(),
        "split": subject.split,
        "mode": spec.mode,
        "parameters": _parameters(spec),
        "precision": subject.reading.precision,
        "window": spec.window,
        "num_tokens": len(subject.tokens) - 1,
        "num_unknown": _num_unknown(subject),
        "num_words": counts.num_words if counts else None,
        "num_bytes": counts.num_bytes if counts else None,
        **{name: value for each in metrics for name, value in each.items()},
    }


def _num_unknown(subject: _Subject) -> int:
    unknown_id = subject.vocabulary.unknown_id
    return 0 if unknown_id is None else int((subject.tokens[1:] == unknown_id).sum())


def _parameters(spec: TextEvaluationJob) -> dict[str, Any]:
    parameters = spec.model_dump(include={name for name in type(spec).model_fields if name.startswith(f"{spec.mode}_")})
    if spec.dynamic_rule == "sgd":
        parameters.pop("dynamic_statistics", None)
    return parameters


def _metrics(prefix: str, losses: Losses, counts: TextCounts | None) -> dict[str, float | None]:
    nats = float(losses.sum(dtype=np.float64))
    loss = nats / len(losses)
    has_words, has_bytes = bool(counts and counts.num_words), bool(counts and not counts.num_replaced)
    return {
        f"{prefix}loss": loss,
        f"{prefix}ppl": perplexity(loss),
        f"{prefix}word_ppl": perplexity(nats / counts.num_words) if counts and has_words else None,
        f"{prefix}bits_per_byte": nats / math.log(2) / counts.num_bytes if counts and has_bytes else None,
    }


def flat_metrics(document: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of `evaluation.json` as a run's record keeps them: loss, ppl, and cache_loss, cache_ppl …"""
    prefixes = ("",) if document["mode"] == "plain" else ("", f"{document['mode']}_")
    return {f"{prefix}{name}": document[f"{prefix}{name}"] for prefix in prefixes for name in ("loss", "ppl")}
