"""Tensors of requests and answers: names, datatypes and shapes checked, bytes to values and back."""

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from services.inference.oip.parameters import Parameters, quoted
from tandem.errors import InvalidRequest
from tandem.wire.oip import grpc_service_pb2 as pb

_MAX_DIMENSIONS = 8
# Of what an InferTensorContents holds, the field for each datatype that an input of ours has.
_CONTENTS = {"UINT8": "uint_contents", "BYTES": "bytes_contents"}


@dataclass(frozen=True)
class Input:
    """One input as it came: `raw` bytes, or typed `contents` and None."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    raw: bytes | None
    contents: pb.InferTensorContents

    @property
    def num_bytes(self) -> int:
        """What it takes in memory, about."""
        return self.contents.ByteSize() if self.raw is None else len(self.raw)

    def check(self, datatype: str, *shapes: Sequence[int]) -> None:
        """Raise InvalidRequest unless it is of `datatype` and one of `shapes`; -1 stands for any number from 1 on."""
        if self.datatype != datatype:
            raise self.wrong(f"is {quoted(self.datatype)}; it must be {datatype}")
        if not any(_fits(self.shape, shape) for shape in shapes):
            said, wanted = list(self.shape), " or ".join(str(list(shape)) for shape in shapes)
            raise self.wrong(f"has the shape {said}; it must be {wanted}")
        field = _CONTENTS[datatype]
        # One that came in the field of another datatype would be lost.
        others = [other.name for other, _ in self.contents.ListFields() if other.name != field]
        if others:
            raise self.wrong(f"is {datatype} and has {others[0]}; it goes into {field} or raw_input_contents")

    def pixels(self) -> Tensor:
        """Return the values of a checked UINT8 input as uint8 of its shape; raise InvalidRequest if they don't fit."""
        wanted = prod(self.shape)
        if self.raw is not None:
            if len(self.raw) != wanted:
                raise self.wrong(f"has {len(self.raw):,} bytes; its shape makes {wanted:,}")
            return torch.frombuffer(bytearray(self.raw), dtype=torch.uint8).reshape(self.shape)
        self._check_count(len(self.contents.uint_contents), wanted)
        values = np.array(self.contents.uint_contents, dtype=np.uint32)
        if int(values.max()) > 255:
            raise self.wrong(f"has {int(values.max())} among its values; UINT8 ends at 255")
        return torch.from_numpy(values.astype(np.uint8)).reshape(self.shape)

    def elements(self) -> list[bytes]:
        """Return the elements of a checked BYTES input; raise InvalidRequest if they are not as many as its shape says.

        Raw, each comes after its length in four bytes, little-endian.
        """
        wanted = prod(self.shape)
        if self.raw is None:
            self._check_count(len(self.contents.bytes_contents), wanted)
            return list(self.contents.bytes_contents)
        found, position = list[bytes](), 0
        while position < len(self.raw) and len(found) <= wanted:
            if position + 4 > len(self.raw):
                raise self.wrong(f"ends within the length of element {len(found)}")
            (length,) = struct.unpack_from("<I", self.raw, position)
            position += 4 + length
            if position > len(self.raw):
                raise self.wrong(f"ends within element {len(found)}, whose length is given as {length:,} bytes")
            found.append(self.raw[position - length : position])
        self._check_count(len(found), wanted)
        return found

    def wrong(self, problem: str, index: int | None = None) -> InvalidRequest:
        """Return the error that names this input, or its element `index`."""
        field = f"inputs.{self.name}" + ("" if index is None else f"[{index}]")
        return InvalidRequest(f"{field} {problem}", field=field)

    def _check_count(self, found: int, wanted: int) -> None:
        if found != wanted:
            # Counting raw ones ends with the first that is too many.
            said = f"more than {wanted:,}" if self.raw is not None and found > wanted else f"{found:,}"
            raise self.wrong(f"has {said} elements; its shape makes {wanted:,}")


@dataclass(frozen=True)
class Output:
    """One output: its elements row-major, little-endian."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


def read_inputs(request: pb.ModelInferRequest, known: Sequence[str]) -> dict[str, Input]:
    """Return the inputs by name; raise InvalidRequest for an unknown or double name, or where raw meets typed."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"{len(raw)} raw_input_contents for {len(request.inputs)} inputs; there must be one for each",
            field="raw_input_contents",
        )
    found: dict[str, Input] = {}
    for number, message in enumerate(request.inputs):
        _check_name(message.name, "input", known, found)
        where = f"inputs.{message.name}"
        if len(message.shape) > _MAX_DIMENSIONS:
            raise InvalidRequest(f"{where} has {len(message.shape):,} dimensions; no model takes so many", field=where)
        _check_no_shared_memory(message.parameters, where)
        Parameters(message.parameters, where).finish()
        shape, data = tuple(message.shape), raw[number] if raw else None
        found[message.name] = each = Input(message.name, message.datatype, shape, data, message.contents)
        if raw and message.contents.ListFields():
            raise each.wrong("has contents beside raw_input_contents; a request has either")
    return found


def read_outputs(request: pb.ModelInferRequest, known: Sequence[str]) -> dict[str, int]:
    """Return the outputs asked for, or all where none is: name → its `classification`, 0 for the values.

    Raises InvalidRequest for an unknown or double name, or a parameter that makes no sense.
    """
    found: dict[str, int] = {}
    for message in request.outputs:
        _check_name(message.name, "output", known, found)
        where = f"outputs.{message.name}"
        _check_no_shared_memory(message.parameters, where)
        parameters = Parameters(message.parameters, where)
        top_k = parameters.integer("classification")
        parameters.finish()
        if top_k is not None and top_k < 1:
            raise InvalidRequest(f"{where}: classification is {top_k}; it must be 1 or above", field=where)
        found[message.name] = top_k or 0
    return found or dict.fromkeys(known, 0)


def from_floats(name: str, values: Tensor) -> Output:
    """Return the output of `values`, float32 of any shape."""
    return Output(name, "FP32", tuple(values.shape), values.contiguous().numpy().astype("<f4", copy=False).tobytes())


def from_elements(name: str, shape: tuple[int, ...], elements: Iterable[bytes]) -> Output:
    """Return the BYTES output of `elements`, row-major: each after its length."""
    return Output(name, "BYTES", shape, b"".join(struct.pack("<I", len(each)) + each for each in elements))


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(a >= 1 if b == -1 else a == b for a, b in pairs)


def _check_name(name: str, what: str, known: Sequence[str], found: Mapping[str, object]) -> None:
    if name not in known:
        there = ", ".join(known)
        raise InvalidRequest(f"there is no {what} {quoted(name)}; the model has: {there}", field=f"{what}s")
    if name in found:
        raise InvalidRequest(f"the {what} {name} comes twice", field=f"{what}s.{name}")


def _check_no_shared_memory(parameters: Mapping[str, pb.InferParameter], where: str) -> None:
    if any(name.startswith("shared_memory_") for name in parameters):
        raise InvalidRequest(f"{where}: this server has no shared memory with its callers; send bytes", field=where)
