"""Reports of shadows ↔ messages."""

from tandem.wire.convert import summary_from_wire, summary_to_wire
from tandem.wire.results import ShadowReport
from tandem.wire.v1 import inference_pb2 as pb


def shadow_to_wire(report: ShadowReport) -> pb.Shadow:
    """Return the message of `report`."""
    return pb.Shadow(
        name=report.name,
        alias=report.alias,
        share=report.share,
        age_s=report.age_s,
        num_seen=report.num_seen,
        num_waiting=report.num_waiting,
        num_dropped=report.num_dropped,
        ended=report.ended,
        summary=summary_to_wire(report.summary),
    )


def shadow_from_wire(message: pb.Shadow) -> ShadowReport:
    """Return the value of `message`."""
    return ShadowReport(
        message.name,
        message.alias,
        message.share,
        message.age_s,
        message.num_seen,
        message.num_waiting,
        dict(sorted(message.num_dropped.items())),
        message.ended,
        summary_from_wire(message.summary),
    )
