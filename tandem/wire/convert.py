"""Between the plain values of `wire.results` and the messages of `wire.v1`, both ways."""

from collections.abc import Iterable

from tandem.comparison.paired import PairedTable
from tandem.comparison.results import Comparison, ComparisonSummary, ModelVersion, PairResult, ScoredClass, Timings
from tandem.wire.results import (
    Classification,
    ComparisonProgress,
    GenerationSummary,
    ImageResult,
    ModelDetails,
    ModelInfo,
    TextPiece,
)
from tandem.wire.v1 import inference_pb2 as pb


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
        )
        for pair in pairs
    ]


def pairs_from_wire(messages: Iterable[pb.PairResult]) -> tuple[PairResult, ...]:
    """Return the values of `messages`, in order."""
    return tuple(
        PairResult(each.name, each.label, scored_from_wire(each.a), scored_from_wire(each.b), each.agree, each.error)
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
    return message


def summary_from_wire(message: pb.ComparisonSummary) -> ComparisonSummary:
    """Return the value of `message`; what follows from the table is computed anew from it."""
    known = message.labelled
    table = PairedTable(known.both_right, known.only_a_right, known.only_b_right, known.both_wrong)
    return ComparisonSummary(
        a=version_from_wire(message.a),
        b=version_from_wire(message.b),
        num_images=message.num_images,
        num_disagreements=message.num_disagreements,
        num_errors=message.num_errors,
        labelled=table if message.HasField("labelled") else None,
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


def dataset_progress_to_wire(progress: ComparisonProgress, found: Iterable[PairResult]) -> pb.CompareDatasetResponse:
    """Return the message that says how far CompareDataset is, and what it `found` since the last one."""
    return pb.CompareDatasetResponse(
        num_done=progress.num_done, num_images=progress.num_images, disagreements=pairs_to_wire(found)
    )


def dataset_end_to_wire(summary: ComparisonSummary, timings: Timings) -> pb.CompareDatasetResponse:
    """Return what the last message of CompareDataset has besides."""
    return pb.CompareDatasetResponse(summary=summary_to_wire(summary), timings=timings_to_wire(timings))


def piece_to_wire(piece: TextPiece) -> pb.GenerateResponse:
    """Return the message of `piece`."""
    return pb.GenerateResponse(text=piece.text, words=piece.words)


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
        )
    )


def generation_from_wire(message: pb.GenerateResponse) -> TextPiece | GenerationSummary:
    """Return the value of one message of Generate."""
    if not message.HasField("summary"):
        return TextPiece(message.text, tuple(message.words))
    summary = message.summary
    return GenerationSummary(
        model=version_from_wire(summary.model),
        num_prompt_tokens=summary.num_prompt_tokens,
        num_words=summary.num_words,
        seed=summary.seed,
        finish_reason=summary.finish_reason,
        unknown_words=tuple(summary.unknown_words),
        mean_negative_log_probability=summary.mean_negative_log_probability,
        timings=timings_from_wire(summary.timings),
    )


def info_to_wire(info: ModelInfo) -> pb.Model:
    """Return the message of `info`."""
    return pb.Model(
        name=info.name,
        kind=info.kind,
        latest=info.latest,
        aliases=info.aliases,
        versions=info.versions,
        loaded=info.loaded,
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
    )


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
    )
