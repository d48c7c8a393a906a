"""Evidence of a comparison ↔ messages."""

from collections.abc import Iterable

from tandem.comparison.evidence import ClassDifference, Evidence, Interval, Labelled, Share, Standing, verdict
from tandem.comparison.paired import PairedTable
from tandem.wire.v1 import inference_pb2 as pb


def fill(message: pb.ComparisonSummary, evidence: Evidence, name_a: str, name_b: str) -> None:
    """Put `evidence` into the summary of a comparison of the models with these names."""
    message.mean_divergence = evidence.divergence or 0.0
    if evidence.kappa is not None:
        message.kappa = evidence.kappa
    message.only_in_a.extend(evidence.only_in_a)
    message.only_in_b.extend(evidence.only_in_b)
    message.verdict = verdict(evidence, name_a, name_b)
    if (found := evidence.labelled) is not None:
        labelled = message.labelled
        labelled.difference = found.difference
        labelled.difference_interval.CopyFrom(_interval(found.interval))
        labelled.standing_a.CopyFrom(_standing(found.a))
        labelled.standing_b.CopyFrom(_standing(found.b))
        labelled.classes.extend(map(_class, found.by_class))


def read(message: pb.ComparisonSummary) -> Evidence | None:
    """Return the evidence in a summary; None of a server that told none."""
    if not message.verdict:
        return None
    return Evidence(
        num_images=message.num_images,
        num_disagreements=message.num_disagreements,
        kappa=message.kappa if message.HasField("kappa") else None,
        divergence=message.mean_divergence,
        labelled=_labelled(message.labelled) if message.HasField("labelled") else None,
        only_in_a=tuple(message.only_in_a),
        only_in_b=tuple(message.only_in_b),
    )


def table_of(message: pb.PairedAccuracy | pb.ClassDifference) -> PairedTable:
    """Return the table of a message that has its four counts."""
    return PairedTable(message.both_right, message.only_a_right, message.only_b_right, message.both_wrong)


def _labelled(message: pb.PairedAccuracy) -> Labelled:
    return Labelled(
        table_of(message),
        _read_standing(message.standing_a),
        _read_standing(message.standing_b),
        _read_interval(message.difference_interval),
        tuple(_read_classes(message.classes)),
    )


def _read_classes(messages: Iterable[pb.ClassDifference]) -> Iterable[ClassDifference]:
    return (ClassDifference(each.id, table_of(each), each.mcnemar_mid_p, each.adjusted_p) for each in messages)


def _read_standing(message: pb.Standing) -> Standing:
    return Standing(
        Share(message.accuracy_at_1, _read_interval(message.accuracy_at_1_interval)),
        Share(message.accuracy_at_5, _read_interval(message.accuracy_at_5_interval)),
        message.calibration_error,
    )


def _read_interval(message: pb.Interval) -> Interval:
    return Interval(message.low, message.high)


def _standing(standing: Standing) -> pb.Standing:
    return pb.Standing(
        accuracy_at_1=standing.top_1.value,
        accuracy_at_1_interval=_interval(standing.top_1.interval),
        accuracy_at_5=standing.top_5.value,
        accuracy_at_5_interval=_interval(standing.top_5.interval),
        calibration_error=standing.calibration_error,
    )


def _interval(interval: Interval) -> pb.Interval:
    return pb.Interval(low=interval.low, high=interval.high)


def _class(each: ClassDifference) -> pb.ClassDifference:
    return pb.ClassDifference(
        id=each.id,
        both_right=each.table.both_right,
        only_a_right=each.table.only_a_right,
        only_b_right=each.table.only_b_right,
        both_wrong=each.table.both_wrong,
        mcnemar_mid_p=each.p,
        adjusted_p=each.adjusted_p,
    )
