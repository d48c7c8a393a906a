"""A classifier behind the protocol: pixels or encoded images in, logits, probabilities or labels out."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from services.inference.calls import rank
from services.inference.classify import off_the_loop
from services.inference.context import Context
from services.inference.decoding import PixelBudget
from services.inference.engine import Engine
from services.inference.loading import ServedClassifier
from services.inference.oip.answers import respond, timing_parameters
from services.inference.oip.parameters import Parameters, read_terms
from services.inference.oip.tensors import Input, Output, from_elements, from_floats, read_inputs, read_outputs
from services.inference.scheduler import Priority
from tandem.comparison.results import Timings
from tandem.data.manifest import ClassName
from tandem.errors import InvalidRequest, LimitExceeded
from tandem.wire.limits import MAX_ANSWERS, MAX_IMAGES, MAX_OUTPUT_BYTES
from tandem.wire.oip import grpc_service_pb2 as pb

PIXELS, IMAGE = "pixels", "image"
LOGITS, PROBABILITIES = "logits", "probabilities"
# Bytes that are copied in less time than a hop to a thread takes.
_QUICK_BYTES = 256 * 1024
# Floats that are put into bytes in the time of one scored class.
_FLOATS_A_CLASS = 100


@dataclass(frozen=True)
class Images:
    """What a request brings: checked pixels, or encoded images."""

    tensor: Input
    encoded: Sequence[bytes] = ()

    @property
    def num_images(self) -> int:
        """Of the request."""
        return self.tensor.shape[0]

    async def decode(self, engine: Engine, model: ServedClassifier, priority: Priority) -> tuple[Tensor, float]:
        """Return pixels uint8 (N, 3, S, S), and how many milliseconds they took; raise InvalidRequest.

        One image that can't be decoded fails the request: a tensor has no room for its error.
        """
        if not self.encoded:
            quick = self.tensor.num_bytes <= _QUICK_BYTES
            return self.tensor.pixels() if quick else await asyncio.to_thread(self.tensor.pixels), 0.0
        sources: list[Callable[[], bytes]] = [lambda data=data: data for data in self.encoded]  # type: ignore[misc]
        batch = await engine.decoder.decode(sources, [model.card.preprocessing], PixelBudget(), priority)
        for index, error in enumerate(batch.errors):
            if error:
                raise self.tensor.wrong(f"can't be decoded: {error}", index)
        return batch.pixels[0], batch.decode_ms


async def infer(
    engine: Engine, model: ServedClassifier, request: pb.ModelInferRequest, context: Context
) -> pb.ModelInferResponse:
    """Return the answer to `request`; raise InvalidRequest or LimitExceeded, and what the scheduler does."""
    parameters = Parameters(request.parameters)
    terms = read_terms(parameters, context)
    parameters.finish()
    size, num_classes = model.card.preprocessing.image_size, len(model.card.classes)
    images = _read_images(request, size)
    wanted = read_outputs(request, (LOGITS, PROBABILITIES))
    num_values = _check_answer(wanted, images.num_images, num_classes)
    scheduler, model = engine.devices.choose(model, terms.priority)
    admitted = scheduler.admit(
        images.num_images,
        model.runtime,
        num_bytes=images.tensor.num_bytes + images.num_images * 3 * size**2,
        deadline=terms.deadline,
        priority=terms.priority,
        joins=model.joins,
    )
    with admitted as place:
        pixels, decode_ms = await images.decode(engine, model, terms.priority)
        done = await place.predict(model.runtime, pixels, model.joins)
        outputs = await off_the_loop(num_values, lambda: _outputs(wanted, done.value, model.card.classes))
    timings = timing_parameters(model, Timings(decode_ms, done.queue_ms, done.compute_ms))
    return respond(request, model, outputs, timings)


def _read_images(request: pb.ModelInferRequest, size: int) -> Images:
    inputs = read_inputs(request, (PIXELS, IMAGE))
    if len(inputs) != 1:
        raise InvalidRequest(f"give one input: {PIXELS}, or {IMAGE}; the request has {len(inputs)}", field="inputs")
    (tensor,) = inputs.values()
    if tensor.name == PIXELS:
        tensor.check("UINT8", (-1, 3, size, size))
    else:
        tensor.check("BYTES", (-1,), (-1, 1))
    if tensor.shape[0] > MAX_IMAGES:
        raise tensor.wrong(f"has {tensor.shape[0]:,} images; the limit is {MAX_IMAGES:,} in a message")
    return Images(tensor, tensor.elements() if tensor.name == IMAGE else ())


def _check_answer(wanted: dict[str, int], num_images: int, num_classes: int) -> int:
    """Return how long the answer takes to write, in scored classes; raise LimitExceeded if it is too large."""
    num_scored = sum(min(top_k, num_classes) for top_k in wanted.values()) * num_images
    if num_scored > MAX_ANSWERS:
        raise LimitExceeded(
            f"classification makes {num_scored:,} answers; the limit is {MAX_ANSWERS:,} in a message: send fewer images"
        )
    num_floats = sum(not top_k for top_k in wanted.values()) * num_images * num_classes
    if 4 * num_floats > MAX_OUTPUT_BYTES:
        raise LimitExceeded(
            f"the outputs have {4 * num_floats:,} bytes; the limit is {MAX_OUTPUT_BYTES:,}: send fewer images, "
            "or ask for one output"
        )
    return num_scored + num_floats // _FLOATS_A_CLASS


def _outputs(wanted: dict[str, int], logits: Tensor, classes: Sequence[ClassName]) -> list[Output]:
    return [_output(name, top_k, logits, classes) for name, top_k in wanted.items()]


def _output(name: str, top_k: int, logits: Tensor, classes: Sequence[ClassName]) -> Output:
    values = logits if name == LOGITS else torch.softmax(logits, dim=1)
    if not top_k:
        return from_floats(name, values)
    # By the logits: probabilities that round to the same number keep their order.
    indices = rank(logits, top_k).indices
    best = values.gather(1, indices)
    labels = [
        f"{value:.9g}:{index}:{classes[index].words or classes[index].id}" for value, index in _pairs(best, indices)
    ]
    return from_elements(name, tuple(indices.shape), (label.encode() for label in labels))


def _pairs(values: Tensor, indices: Tensor) -> list[tuple[float, int]]:
    return list(zip(values.flatten().tolist(), indices.flatten().tolist(), strict=True))
