"""What clients send, built and joined: images in messages under the limits, and the answers to them put together."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

from tandem.comparison.results import Comparison, PairResult, Timings
from tandem.data.raw_image import RawImage
from tandem.errors import InvalidRequest, LimitExceeded
from tandem.wire import convert
from tandem.wire.limits import DEFAULT_TOP_K, MAX_ANSWERS, MAX_MESSAGE_BYTES
from tandem.wire.results import Classification, ComparisonProgress
from tandem.wire.v1 import inference_pb2 as pb

# Well under what a message may hold, and few enough that an answer comes soon.
_CHUNK_BYTES = MAX_MESSAGE_BYTES // 4
_CHUNK_IMAGES = 256

T = TypeVar("T")


@dataclass(frozen=True)
class Image:
    """An image, encoded or raw; `label` is the id of its true class, where it is known; compare and shadows read it."""

    data: bytes | RawImage
    name: str = ""
    label: str = ""


Images = Iterable[Image | bytes | RawImage | tuple[str, bytes | RawImage]]


@dataclass(frozen=True)
class SamplingOptions:
    """How a text is drawn; see SamplingParameters of the wire contract. `seed` None: the server picks one."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int | None = None
    allow_unknown: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Sequence[str] = ()
    random_start: bool = False
    # Words with what is added to their logits.
    logit_bias: Mapping[str, float] = field(default_factory=dict)
    num_alternatives: int = 0


Classifying = Generator[pb.ClassifyRequest, pb.ClassifyResponse, Classification]
Comparing = Generator[pb.CompareRequest, pb.CompareResponse, Comparison]


class Received:
    """What has been answered so far, as `str` tells it; empty for nothing."""

    def __init__(self, unit: str) -> None:
        self.count = 0
        self._unit = unit

    def __str__(self) -> str:
        return f"{self.count:,} {self._unit}" if self.count else ""


def classifying(model: str, images: Images, top_k: int, received: Received) -> Classifying:
    """Yield requests, take the answer to each, and return the answer to all.

    The version that answers the first message answers them all.
    """
    answers: list[Classification] = []
    for chunk in image_messages(images, top_k):
        message = yield classify_request(answers[0].model.label if answers else model, chunk, top_k)
        answers.append(convert.classification_from_wire(message))
        received.count += len(chunk)
    return join_classifications(answers)


def comparing(model_a: str, model_b: str, images: Images, top_k: int, received: Received) -> Comparing:
    """Do what `classifying` does with two models."""
    answers: list[Comparison] = []
    for chunk in image_messages(images, top_k):
        names = (answers[0].summary.a.label, answers[0].summary.b.label) if answers else (model_a, model_b)
        message = yield compare_request(*names, chunk, top_k)
        answers.append(convert.comparison_from_wire(message))
        received.count += len(chunk)
    return join_comparisons(answers, top_k or DEFAULT_TOP_K)


def image_messages(
    images: Images, top_k: int = 0, max_images: int = _CHUNK_IMAGES, max_bytes: int = _CHUNK_BYTES
) -> Iterator[list[pb.Image]]:
    """Yield the images in messages under the limits, and of no more than `max_images` and (but for one alone)
    `max_bytes`; one empty message if there are none, for the server to refuse."""
    most = min(max_images, max(MAX_ANSWERS // max(top_k, 1), 1))
    chunk: list[pb.Image] = []
    chunk_bytes = 0
    num_chunks = 0
    for image in map(_to_image, images):
        if len(image.data) > MAX_MESSAGE_BYTES - 4096:
            raise LimitExceeded(
                f"{image.name or 'an image'} has {len(image.data):,} bytes; the limit is {MAX_MESSAGE_BYTES:,}"
            )
        if chunk and (len(chunk) == most or chunk_bytes + len(image.data) > max_bytes):
            yield chunk
            chunk, chunk_bytes, num_chunks = [], 0, num_chunks + 1
        chunk.append(_checked(partial(_image_to_wire, image)))
        chunk_bytes += len(image.data)
    if chunk or not num_chunks:
        yield chunk


def _to_image(image: Image | bytes | RawImage | tuple[str, bytes | RawImage]) -> Image:
    if isinstance(image, Image):
        return image
    return Image(image) if isinstance(image, bytes | RawImage) else Image(image[1], image[0])


def _image_to_wire(image: Image) -> pb.Image:
    if isinstance(image.data, bytes):
        return pb.Image(data=image.data, name=image.name, label=image.label)
    raw = pb.RawImage(width=image.data.width, height=image.data.height, rgb=image.data.rgb)
    return pb.Image(raw=raw, name=image.name, label=image.label)


def classify_request(model: str, images: Sequence[pb.Image], top_k: int) -> pb.ClassifyRequest:
    """Return the request of Classify."""
    return _checked(lambda: pb.ClassifyRequest(model=model, images=images, top_k=top_k))


def compare_request(model_a: str, model_b: str, images: Sequence[pb.Image], top_k: int) -> pb.CompareRequest:
    """Return the request of Compare."""
    return _checked(lambda: pb.CompareRequest(model_a=model_a, model_b=model_b, images=images, top_k=top_k))


def dataset_request(
    model_a: str, model_b: str, dataset: str, split: str, top_k: int, limit: int, num_returned_images: int = 0
) -> pb.CompareDatasetRequest:
    """Return the request of CompareDataset."""
    return _checked(
        lambda: pb.CompareDatasetRequest(
            model_a=model_a,
            model_b=model_b,
            dataset=dataset,
            split=split,
            top_k=top_k,
            limit=limit,
            num_returned_images=num_returned_images,
        )
    )


def generate_request(
    model: str, prompt: str | None, max_words: int, sampling: SamplingOptions, num_texts: int = 0
) -> pb.GenerateRequest:
    """Return the request of Generate."""

    def build() -> pb.GenerateRequest:
        parameters = pb.SamplingParameters(
            max_words=max_words,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            allow_unknown=sampling.allow_unknown,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            # Text is a sequence of characters too, which nobody means.
            stop=[sampling.stop] if isinstance(sampling.stop, str) else sampling.stop,
            random_start=sampling.random_start,
            logit_bias=sampling.logit_bias,
            num_alternatives=sampling.num_alternatives,
        )
        return pb.GenerateRequest(model=model, prompt=prompt, sampling=parameters, num_texts=num_texts)

    return _checked(build)


def score_request(
    model: str, texts: str | Sequence[str], num_alternatives: int, first_is_given: bool
) -> pb.ScoreRequest:
    """Return the request of Score."""
    # Text is a sequence of characters too, which nobody means.
    given = [texts] if isinstance(texts, str) else texts
    return _checked(
        lambda: pb.ScoreRequest(
            model=model, texts=given, num_alternatives=num_alternatives, first_is_given=first_is_given
        )
    )


def alias_request(name: str, alias: str, version: int) -> pb.SetAliasRequest:
    """Return the request of SetAlias."""
    return _checked(lambda: pb.SetAliasRequest(name=name, alias=alias, version=version))


def unalias_request(name: str, alias: str) -> pb.DeleteAliasRequest:
    """Return the request of DeleteAlias."""
    return _checked(lambda: pb.DeleteAliasRequest(name=name, alias=alias))


def shadow_request(name: str, alias: str, candidate: str, share: float) -> pb.StartShadowRequest:
    """Return the request of StartShadow."""
    return _checked(lambda: pb.StartShadowRequest(name=name, alias=alias, candidate=candidate, share=share))


def shadows_request(name: str, alias: str) -> pb.GetShadowsRequest:
    """Return the request of GetShadows."""
    return _checked(lambda: pb.GetShadowsRequest(name=name, alias=alias))


def unshadow_request(name: str, alias: str) -> pb.StopShadowRequest:
    """Return the request of StopShadow."""
    return _checked(lambda: pb.StopShadowRequest(name=name, alias=alias))


def _checked(build: Callable[[], T]) -> T:
    """Return the request that `build` makes; raise InvalidRequest for a number that no field holds."""
    try:
        return build()
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"the request can't be written: {error}") from error


def join_classifications(answers: Sequence[Classification]) -> Classification:
    """Return one answer for the answers to all messages, one or more."""
    results = tuple(result for answer in answers for result in answer.results)
    return Classification(answers[0].model, results, sum((answer.timings for answer in answers), Timings()))


def join_comparisons(answers: Sequence[Comparison], top_k: int) -> Comparison:
    """Return one answer for the answers, of `top_k` classes each, to all messages, one or more."""
    results = tuple(result for answer in answers for result in answer.results)
    summary = answers[0].summary
    for answer in answers[1:]:
        summary += answer.summary
    parts = [answer.summary.evidence for answer in answers if answer.summary.evidence is not None]
    # Lists of fewer classes than five don't tell accuracy@5.
    if len(parts) == 1:
        summary = replace(summary, evidence=parts[0])
    elif len(parts) == len(answers) and top_k >= 5:
        # SciPy takes a second to import, and most comparisons are one message.
        from tandem.comparison.weighing import weigh_pairs

        labels = [each.id for part in parts if part.labelled for each in part.labelled.by_class]
        one = parts[0]
        evidence = replace(weigh_pairs(results, labels), only_in_a=one.only_in_a, only_in_b=one.only_in_b)
        summary = replace(summary, evidence=evidence)
    return Comparison(results, summary, sum((answer.timings for answer in answers), Timings()))


class Collected:
    """What CompareDataset has found so far."""

    def __init__(self, received: Received) -> None:
        self._found: list[PairResult] = []
        self._images: dict[str, bytes] = {}
        self._received = received

    def take(self, message: pb.CompareDatasetResponse) -> ComparisonProgress | Comparison:
        """Keep what `message` found; return the progress that it says, or the whole result with the last one."""
        self._received.count = message.num_done
        self._found += convert.pairs_from_wire(message.disagreements)
        self._images |= {image.name: image.data for image in message.images}
        if not message.HasField("summary"):
            return ComparisonProgress(message.num_done, message.num_images)
        summary = convert.summary_from_wire(message.summary)
        return Comparison(tuple(self._found), summary, convert.timings_from_wire(message.timings), self._images)
