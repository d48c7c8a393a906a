"""Requests from bytes: of bounded size and with a bounded number of parts before they are parsed.

A message of 64 MiB may hold 32 million empty images. Parsed, they take 2.4 GB and 5 s of the event loop
(measured on one core); to count the parts up to the limit takes 0.7 ms.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from tandem.errors import InvalidRequest, LimitExceeded, TandemError
from tandem.wire.limits import MAX_IMAGES, MAX_MESSAGE_BYTES, MAX_PARTS, MAX_TEXT_MESSAGE_BYTES, MAX_TYPED_BYTES

_TEXT_REQUESTS = {
    "/tandem.v1.Inference/CompareDataset",
    "/tandem.v1.Inference/Generate",
    "/tandem.v1.Inference/Complete",
    "/tandem.v1.Inference/Score",
    "/tandem.v1.Models/ListModels",
    "/tandem.v1.Models/GetModel",
    "/tandem.v1.Models/LoadModel",
    "/tandem.v1.Models/UnloadModel",
    "/tandem.v1.Models/SetAlias",
    "/tandem.v1.Models/DeleteAlias",
    "/tandem.v1.Models/WatchModels",
    "/tandem.v1.Models/StartShadow",
    "/tandem.v1.Models/GetShadows",
    "/tandem.v1.Models/StopShadow",
    "/inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerReady",
    "/inference.GRPCInferenceService/ServerMetadata",
    "/inference.GRPCInferenceService/ModelReady",
    "/inference.GRPCInferenceService/ModelMetadata",
    "/inference.GRPCInferenceService/ModelConfig",
    "/inference.GRPCInferenceService/ModelStatistics",
    "/inference.GRPCInferenceService/RepositoryIndex",
    "/inference.GRPCInferenceService/RepositoryModelLoad",
    "/inference.GRPCInferenceService/RepositoryModelUnload",
}
_STREAMED_REQUESTS = {"/tandem.v1.Inference/ClassifyStream"}
_TENSOR_REQUESTS = {
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelStreamInfer",
}
# Of ModelInferRequest: the inputs, with their parameters and contents, and the outputs, with their parameters.
_INPUTS, _OUTPUTS = 5, 6
Nested = Mapping[int, "Nested"]
_PARTS_OF_TENSORS: Nested = {_INPUTS: {4: {}, 5: {}}, _OUTPUTS: {2: {}}}
# Of ClassifyStreamRequest: the request within, with its images.
_PARTS_OF_STREAMED: Nested = {2: {}}
# Of GenerateRequest: the parameters of sampling, with stop words and biases.
_PARTS_OF_SAMPLING: Nested = {3: {}}
_PARTS: Mapping[str, Nested] = {
    **dict.fromkeys(_TENSOR_REQUESTS, _PARTS_OF_TENSORS),
    **dict.fromkeys(_STREAMED_REQUESTS, _PARTS_OF_STREAMED),
    **dict.fromkeys(("/tandem.v1.Inference/Generate", "/tandem.v1.Inference/Complete"), _PARTS_OF_SAMPLING),
}


@dataclass(frozen=True)
class Malformed:
    """Stands in the place of a request that is none: a deserializer that raises would leak its exception's name."""

    error: TandemError


def bounded(method: str, parse: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Return `parse`, which a request of `method` comes to only within the limits, and whose failure is Malformed."""
    holds_images = method not in _TEXT_REQUESTS
    limit = MAX_MESSAGE_BYTES if holds_images else MAX_TEXT_MESSAGE_BYTES
    holds_tensors = method in _TENSOR_REQUESTS
    nested = _PARTS.get(method, {})

    def read(data: bytes) -> Any:
        try:
            _check(data, limit, nested, holds_images)
            if holds_tensors:
                _check_typed(data)
            return data if parse is None else parse(data)
        except TandemError as error:
            return Malformed(error)
        except DecodeError:
            return Malformed(InvalidRequest(f"the message is no request of {method[1:]}"))

    return read


def _check(data: bytes, max_bytes: int, nested: Nested, holds_images: bool) -> None:
    if len(data) > max_bytes:
        raise LimitExceeded(f"the request has {len(data):,} bytes; the limit is {max_bytes:,}")
    if count_parts(data, MAX_PARTS, nested) > MAX_PARTS:
        problem = f"the request has more than {MAX_PARTS:,} parts"
        if holds_images:
            raise InvalidRequest(f"{problem}; {MAX_IMAGES:,} images are the limit", field="images")
        raise InvalidRequest(f"{problem}, which is the limit")


def _check_typed(data: bytes) -> None:
    typed = sum(end - start for field, start, end in _parts(data) if field == _INPUTS)
    if typed > MAX_TYPED_BYTES:
        raise LimitExceeded(
            f"the inputs have {typed:,} bytes without raw contents; the limit is {MAX_TYPED_BYTES:,}: send large "
            "tensors as raw_input_contents"
        )


def count_parts(data: bytes | memoryview, limit: int, nested: Nested | None = None) -> int:
    """Return how many fields the protobuf message `data` has at its top, or a number above `limit`.

    The fields of those that `nested` names by number count too. What is no message is counted up to where that shows.
    """
    count = 0
    for field, start, end in _parts(data):
        count += 1
        if nested and field in nested:
            # A view: the contents of a tensor are not to be copied for it.
            count += count_parts(memoryview(data)[start:end], limit - count, nested[field])
        if count > limit:
            break
    return count


def _parts(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each field, and where it begins and ends; a message that is cut off ends without a word."""
    position = 0
    try:
        while position < len(data):
            tag, position = _varint(data, position)
            start, kind = position, tag & 7
            if kind == 2:
                length, start = _varint(data, position)
                position = start + length
            elif kind == 0:
                _, position = _varint(data, position)
            elif kind in (1, 5):
                position += 8 if kind == 1 else 4
            yield tag >> 3, start, position
    except IndexError:
        # The parser will say so.
        return


def _varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    """Return the number that begins at `position`, and where it has ended; raise IndexError past the end."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        # Ten bytes are the most that a number has; a longer one is no message.
        if byte < 0x80 or shift > 63:
            return value, position
        shift += 7
