"""Answers put together: what both kinds of model say in the same way."""

from collections.abc import Mapping, Sequence

from services.inference.loading import Served, version_of
from services.inference.oip.parameters import to_parameter
from services.inference.oip.tensors import Output
from tandem.comparison.results import Timings
from tandem.wire.oip import grpc_service_pb2 as pb

Value = bool | int | float | str


def respond(
    request: pb.ModelInferRequest, served: Served, outputs: Sequence[Output], parameters: Mapping[str, Value]
) -> pb.ModelInferResponse:
    """Return the answer to `request` by `served`."""
    version = version_of(served)
    return pb.ModelInferResponse(
        model_name=version.name or request.model_name,
        model_version=str(version.version) if version.version else "",
        id=request.id,
        parameters={name: to_parameter(value) for name, value in parameters.items()},
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(name=each.name, datatype=each.datatype, shape=each.shape)
            for each in outputs
        ],
        raw_output_contents=[each.data for each in outputs],
    )


def timing_parameters(served: Served, timings: Timings) -> dict[str, Value]:
    """Return the precision of an answer, and where its time went."""
    return {
        "dtype": served.runtime.dtype,
        "decode_ms": timings.decode_ms,
        "queue_ms": timings.queue_ms,
        "compute_ms": timings.compute_ms,
    }
