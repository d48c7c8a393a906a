"""Between the plain values of `wire.results` and the messages of `wire.v1`, both ways."""

from collections.abc import Iterable
from typing import Any, cast

from tandem.comparison.results import Comparison, ComparisonSummary, ModelVersion, PairResult, ScoredClass, Timings
from tandem.wire import evidence
from tandem.wire.results import (
    Alternative,
    Classification,
    ComparisonProgress,
    Completion,
    GenerationSummary,
    ImageResult,
    ModelChange,
    ModelDetails,
    ModelInfo,
    ModelsSnapshot,
    RuntimeDetails,
    ScoreSummary,
    Scoring,
    TextPiece,
    TextScore,
    TokenScore,
)
from tandem.wire.v1 import inference_pb2 as pb

_KIND = "KIND_"
_KINDS = {number: name.removeprefix(_KIND).lower() for name, number in pb.ModelChange.Kind.items()}


def version_to_wire(version: ModelVersion) -> pb.ModelVersion:
    """Return the message of `version`."""
    return pb.ModelVersion(
        name=version.name,
        version=version.version,
        run_id=version.run_id,
        step=version.step,
        architecture=version.architecture,
        dtype=version.dtype,
    )


def version_from_wire(message: pb.ModelVersion) -> ModelVersion:
    """Return the value of `message`."""
    return ModelVersion(
        message.name, message.version, message.run_id, message.step, message.architecture, message.dtype
    )


def timings_to_wire(timings: Timings) -> pb.Timings:
    """Return the message of `timings`."""
    return pb.Timings(decode_ms=timings.decode_ms, queue_ms=timings.queue_ms, compute_ms=timings.compute_ms)


def timings_from_wire(message: pb.Timings) -> Timings:
    """Return the value of `message`."""
    return Timings(message.decode_ms, message.queue_ms, message.compute_ms)


def scored_to_wire(scored: Iterable[ScoredClass]) -> list[pb.ScoredClass]:
    """Return the messages of `scored`, in order."""
    return [
        pb.ScoredClass(index=each.index, id=each.id, words=each.words, probability=each.probability) for each in scored
    ]


def scored_from_wire(messages: Iterable[pb.ScoredClass]) -> tuple[ScoredClass, ...]:
    """Return the values of `messages`, in order."""
    return tuple(ScoredClass(each.index, each.id, each.words, each.probability) for each in messages)


def classification_to_wire(answer: Classification) -> pb.ClassifyResponse:
    """Return the message of a Classify answer."""
    return pb.ClassifyResponse(
        model=version_to_wire(answer.model),
        results=[
            pb.ImageResult(name=result.name, top_k=scored_to_wire(result.top_k), error=result.error)
            for result in answer.results
        ],
        timings=timings_to_wire(answer.timings),
    )


def classification_from_wire(message: pb.ClassifyResponse) -> Classification:
    """Return the value of a Classify answer."""
    results = tuple(ImageResult(each.name, scored_from_wire(each.top_k), each.error) for each in message.results)
    return Classification(version_from_wire(message.model), results, timings_from_wire(message.timings))


def pairs_to_wire(pairs: Iterable[PairResult]) -> list[pb.PairResult]:
    """Return the messages of `pairs`, in order."""
    return [
        pb.PairResult(
            name=pair.name,
            label=pair.label,
            a=scored_to_wire(pair.a),
            b=scored_to_wire(pair.b),
            agree=pair.agree,
            error=pair.error,
            divergence=pair.divergence,
        )
        for pair in pairs
    ]


def pairs_from_wire(messages: Iterable[pb.PairResult]) -> tuple[PairResult, ...]:
    """Return the values of `messages`, in order."""
    return tuple(
        PairResult(
            each.name,
            each.label,
            scored_from_wire(each.a),
            scored_from_wire(each.b),
            each.agree,
            each.error,
            each.divergence,
        )
        for each in messages
    )


def summary_to_wire(summary: ComparisonSummary) -> pb.ComparisonSummary:
    """Return the message of `summary`; the statistics are computed from its table here."""
    message = pb.ComparisonSummary(
        a=version_to_wire(summary.a),
        b=version_to_wire(summary.b),
        num_images=summary.num_images,
        num_disagreements=summary.num_disagreements,
        num_errors=summary.num_errors,
    )
    if (table := summary.labelled) is not None:
        message.labelled.CopyFrom(
            pb.PairedAccuracy(
                num_labelled=table.num_examples,
                both_right=table.both_right,
                only_a_right=table.only_a_right,
                only_b_right=table.only_b_right,
                both_wrong=table.both_wrong,
                accuracy_a=table.accuracy_a,
                accuracy_b=table.accuracy_b,
                mcnemar_exact_p=table.exact_p,
                mcnemar_mid_p=table.mid_p,
            )
        )
    if summary.evidence is not None:
        evidence.fill(message, summary.evidence, summary.a.label, summary.b.label)
    return message


def summary_from_wire(message: pb.ComparisonSummary) -> ComparisonSummary:
    """Return the value of `message`; what follows from the table is computed anew from it."""
    return ComparisonSummary(
        a=version_from_wire(message.a),
        b=version_from_wire(message.b),
        num_images=message.num_images,
        num_disagreements=message.num_disagreements,
        num_errors=message.num_errors,
        labelled=evidence.table_of(message.labelled) if message.HasField("labelled") else None,
        evidence=evidence.read(message),
    )


def comparison_to_wire(answer: Comparison) -> pb.CompareResponse:
    """Return the message of a Compare answer."""
    return pb.CompareResponse(
        results=pairs_to_wire(answer.results),
        summary=summary_to_wire(answer.summary),
        timings=timings_to_wire(answer.timings),
    )


def comparison_from_wire(message: pb.CompareResponse) -> Comparison:
    """Return the value of a Compare answer."""
    return Comparison(
        pairs_from_wire(message.results), summary_from_wire(message.summary), timings_from_wire(message.timings)
    )


def dataset_progress_to_wire(
    progress: ComparisonProgress, found: Iterable[PairResult], images: Iterable[tuple[str, bytes]] = ()
) -> pb.CompareDatasetResponse:
    """Return the message that says how far CompareDataset is, and what it `found` since the last one; `images` are
    (name, encoded image)."""
    return pb.CompareDatasetResponse(
        num_done=progress.num_done,
        num_images=progress.num_images,
        disagreements=pairs_to_wire(found),
        images=[pb.Image(name=name, data=data) for name, data in images],
    )


def dataset_end_to_wire(summary: ComparisonSummary, timings: Timings) -> pb.CompareDatasetResponse:
    """Return what the last message of CompareDataset has besides."""
    return pb.CompareDatasetResponse(summary=summary_to_wire(summary), timings=timings_to_wire(timings))


def piece_to_wire(piece: TextPiece) -> pb.GenerateResponse:
    """Return the message of `piece`."""
    return pb.GenerateResponse(
        text=piece.text,
        words=piece.words,
        log_probabilities=piece.log_probabilities,
        alternatives=[
            pb.TokenAlternatives(alternatives=map(_alternative_to_wire, ranked)) for ranked in piece.alternatives
        ],
        text_index=piece.text_index,
    )


def generation_to_wire(summary: GenerationSummary) -> pb.GenerateResponse:
    """Return the last message of Generate."""
    return pb.GenerateResponse(
        summary=pb.GenerateSummary(
            model=version_to_wire(summary.model),
            num_prompt_tokens=summary.num_prompt_tokens,
            num_words=summary.num_words,
            seed=summary.seed,
            finish_reason=summary.finish_reason,
            unknown_words=summary.unknown_words,
            mean_negative_log_probability=summary.mean_negative_log_probability,
            timings=timings_to_wire(summary.timings),
        ),
        text_index=summary.text_index,
    )


def generation_from_wire(message: pb.GenerateResponse) -> TextPiece | GenerationSummary:
    """Return the value of one message of Generate."""
    if not message.HasField("summary"):
        words, log_probabilities = tuple(message.words), tuple(message.log_probabilities)
        alternatives = _alternatives_from_wire(message.alternatives)
        return TextPiece(message.text, words, log_probabilities, alternatives, message.text_index)
    return _generation_summary_from_wire(message.summary, message.text_index)


def _generation_summary_from_wire(summary: pb.GenerateSummary, text_index: int) -> GenerationSummary:
    return GenerationSummary(
        model=version_from_wire(summary.model),
        num_prompt_tokens=summary.num_prompt_tokens,
        num_words=summary.num_words,
        seed=summary.seed,
        finish_reason=summary.finish_reason,
        unknown_words=tuple(summary.unknown_words),
        mean_negative_log_probability=summary.mean_negative_log_probability,
        timings=timings_from_wire(summary.timings),
        text_index=text_index,
    )


def _alternatives_from_wire(messages: Iterable[pb.TokenAlternatives]) -> tuple[tuple[Alternative, ...], ...]:
    return tuple(tuple(map(_alternative_from_wire, ranked.alternatives)) for ranked in messages)


def _alternative_to_wire(each: Alternative) -> pb.TokenAlternative:
    return pb.TokenAlternative(token=each.token, token_id=each.token_id, log_probability=each.log_probability)


def _alternative_from_wire(each: pb.TokenAlternative) -> Alternative:
    return Alternative(each.token, each.token_id, each.log_probability)


def completions_from_wire(message: pb.CompleteResponse) -> tuple[Completion, ...]:
    """Return the texts of a Complete answer."""
    return tuple(
        Completion(
            each.text,
            tuple(each.words),
            _generation_summary_from_wire(each.summary, index),
            tuple(each.log_probabilities),
            _alternatives_from_wire(each.alternatives),
        )
        for index, each in enumerate(message.completions)
    )


def scoring_to_wire(answer: Scoring) -> pb.ScoreResponse:
    """Return the message of a Score answer."""
    return pb.ScoreResponse(
        model=version_to_wire(answer.model),
        results=[
            pb.TextScore(
                tokens=[_token_to_wire(token) for token in result.tokens],
                summary=_score_summary_to_wire(result.summary),
                unknown_words=result.unknown_words,
            )
            for result in answer.results
        ],
        summary=_score_summary_to_wire(answer.summary),
        timings=timings_to_wire(answer.timings),
    )


def _token_to_wire(token: TokenScore) -> pb.TokenScore:
    return pb.TokenScore(
        token=token.token,
        token_id=token.token_id,
        log_probability=token.log_probability,
        alternatives=map(_alternative_to_wire, token.alternatives),
    )


def _score_summary_to_wire(summary: ScoreSummary) -> pb.ScoreSummary:
    return pb.ScoreSummary(
        num_tokens=summary.num_tokens,
        sum_log_probability=summary.sum_log_probability,
        mean_log_probability=summary.mean_log_probability,
        perplexity=summary.perplexity,
        num_unknown=summary.num_unknown,
    )


def scoring_from_wire(message: pb.ScoreResponse) -> Scoring:
    """Return the value of a Score answer; what follows from the tokens is computed anew from them."""
    results = tuple(
        TextScore(
            tuple(_token_from_wire(token) for token in each.tokens),
            tuple(each.unknown_words),
            each.summary.num_unknown,
        )
        for each in message.results
    )
    return Scoring(version_from_wire(message.model), results, timings_from_wire(message.timings))


def _token_from_wire(message: pb.TokenScore) -> TokenScore:
    alternatives = map(_alternative_from_wire, message.alternatives)
    return TokenScore(message.token, message.token_id, message.log_probability, tuple(alternatives))


def info_to_wire(info: ModelInfo) -> pb.Model:
    """Return the message of `info`."""
    return pb.Model(
        name=info.name,
        kind=info.kind,
        latest=info.latest,
        aliases=info.aliases,
        versions=info.versions,
        loaded=info.loaded,
        failed=info.failed,
        out_of_service=info.out_of_service,
        loaded_bytes=info.loaded_bytes,
    )


def info_from_wire(message: pb.Model) -> ModelInfo:
    """Return the value of `message`."""
    return ModelInfo(
        message.name,
        message.kind,
        message.latest,
        dict(message.aliases),
        tuple(message.versions),
        tuple(message.loaded),
        dict(message.failed),
        message.out_of_service,
        message.loaded_bytes,
    )


def update_to_wire(update: ModelsSnapshot | ModelChange) -> pb.WatchModelsResponse:
    """Return the message of one update of WatchModels."""
    if isinstance(update, ModelsSnapshot):
        return pb.WatchModelsResponse(snapshot=pb.ModelsSnapshot(models=map(info_to_wire, update.models)))
    return pb.WatchModelsResponse(
        change=pb.ModelChange(
            kind=cast(Any, pb.ModelChange.Kind.Value(_KIND + update.kind.upper())),
            name=update.name,
            version=update.version,
            alias=update.alias,
            previous_version=update.previous_version,
            reason=update.reason,
        )
    )


def update_from_wire(message: pb.WatchModelsResponse) -> ModelsSnapshot | ModelChange | None:
    """Return the value of one message of WatchModels; None for a change of a kind that a later version knows."""
    if message.HasField("snapshot"):
        return ModelsSnapshot(tuple(map(info_from_wire, message.snapshot.models)))
    change = message.change
    kind: Any = change.kind and _KINDS.get(change.kind)
    if not kind:
        return None
    return ModelChange(kind, change.name, change.version, change.alias, change.previous_version, change.reason)


def details_to_wire(details: ModelDetails) -> pb.GetModelResponse:
    """Return the message of `details`."""
    return pb.GetModelResponse(
        model=version_to_wire(details.model),
        kind=details.kind,
        class_ids=details.class_ids,
        image_size=details.image_size,
        vocabulary_size=details.vocabulary_size,
        metrics=details.metrics,
        num_parameters=details.num_parameters,
        runtime=None if details.runtime is None else pb.Runtime(**vars(details.runtime)),
        memory_bytes=details.memory_bytes,
        devices=details.devices,
    )


def details_from_wire(message: pb.GetModelResponse) -> ModelDetails:
    """Return the value of `message`."""
    return ModelDetails(
        model=version_from_wire(message.model),
        kind=message.kind,
        metrics=dict(message.metrics),
        num_parameters=message.num_parameters,
        class_ids=tuple(message.class_ids),
        image_size=message.image_size,
        vocabulary_size=message.vocabulary_size,
        runtime=_runtime_from_wire(message.runtime) if message.HasField("runtime") else None,
        memory_bytes=message.memory_bytes,
        devices=tuple(message.devices),
    )


def _runtime_from_wire(message: pb.Runtime) -> RuntimeDetails:
    return RuntimeDetails(
        message.name, message.dtype, message.reason, message.max_probability_drift, message.mean_probability_drift
    )
