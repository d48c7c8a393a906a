import math
from typing import get_args

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from tandem import errors
from tandem.comparison.paired import PairedTable
from tandem.comparison.results import Comparison, ComparisonSummary, ModelVersion, PairResult, ScoredClass, Timings
from tandem.data.raw_image import RawImage
from tandem.errors import QueueFull
from tandem.wire import convert
from tandem.wire.limits import MAX_ANSWERS
from tandem.wire.requests import SamplingOptions, generate_request, image_messages, score_request
from tandem.wire.results import (
    Alternative,
    ChangeKind,
    Classification,
    GenerationSummary,
    ImageResult,
    ModelChange,
    ModelDetails,
    ModelInfo,
    ModelsSnapshot,
    RuntimeDetails,
    Scoring,
    TextPiece,
    TextScore,
    TokenScore,
)
from tandem.wire.status import DETAILS_KEY, PUSHBACK_KEY, WireStatus, from_rich, from_rpc_error, to_rich, to_status
from tandem.wire.v1 import inference_pb2 as pb

VERSION = ModelVersion("digits", 3, "r1", 120, "resnet18", "float32")
SCORED = (ScoredClass(1, "n1", "one", 0.75), ScoredClass(0, "n0", "zero", 0.25))
TIMINGS = Timings(1.0, 2.0, 3.0)


class FakeRpcError:
    """What a call raises, as far as `from_rpc_error` looks."""

    def __init__(self, status: WireStatus) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.message

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return self._status.trailing_metadata


def all_errors() -> list[type[errors.TandemError]]:
    return [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.TandemError]


@pytest.mark.parametrize("kind", all_errors())
def test_each_error_has_a_status_and_comes_back_as_itself(kind: type[errors.TandemError]) -> None:
    status = to_status(kind("one line"))
    assert status.code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
    back = from_rpc_error(FakeRpcError(status), "127.0.0.1:1")
    assert type(back) is kind
    assert str(back) == "one line"


def test_a_wrong_field_travels_in_bad_request() -> None:
    status = to_status(errors.InvalidPrompt("the prompt is empty", field="prompt"))
    rich = status_pb2.Status.FromString(dict(status.trailing_metadata)[DETAILS_KEY])
    wrong = error_details_pb2.BadRequest()
    assert any(detail.Unpack(wrong) for detail in rich.details)
    assert [(each.field, each.description) for each in wrong.field_violations] == [("prompt", "the prompt is empty")]
    back = from_rpc_error(FakeRpcError(status), "")
    assert isinstance(back, errors.InvalidPrompt)
    assert back.field == "prompt"


def test_a_full_queue_says_when_to_try_again() -> None:
    status = to_status(QueueFull("full", retry_after_s=0.25))
    assert status.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = dict(status.trailing_metadata)
    assert metadata[PUSHBACK_KEY] == "250"
    info = error_details_pb2.RetryInfo()
    assert any(each.Unpack(info) for each in status_pb2.Status.FromString(metadata[DETAILS_KEY]).details)
    assert info.retry_delay.ToMilliseconds() == 250
    back = from_rpc_error(FakeRpcError(status), "")
    assert isinstance(back, errors.QueueFull)
    assert back.retry_after_s == 0.25


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServerUnavailable, "tandem up"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded, "127.0.0.1:9"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.LimitExceeded, "raw"),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Conflict, "version"),
        (grpc.StatusCode.INTERNAL, errors.TandemError, "raw"),
    ],
)
def test_statuses_that_are_not_ours_make_one_line(
    code: grpc.StatusCode, kind: type[errors.TandemError], says: str
) -> None:
    error = from_rpc_error(FakeRpcError(WireStatus(code, "raw\n text", ())), "127.0.0.1:9")
    assert type(error) is kind
    assert says in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_a_connection_that_is_lost_on_the_way_is_no_server_that_was_never_there(code: grpc.StatusCode) -> None:
    error = from_rpc_error(FakeRpcError(WireStatus(code, "Socket closed", ())), "127.0.0.1:9", "1,200 words")
    assert type(error) is errors.ServerUnavailable
    assert str(error) == "the connection to 127.0.0.1:9 was lost after 1,200 words"


def test_a_call_that_a_stopping_server_never_began_may_be_tried_again() -> None:
    error = from_rpc_error(FakeRpcError(WireStatus(grpc.StatusCode.CANCELLED, "CANCELLED", ())), "127.0.0.1:9")
    assert type(error) is errors.ServerUnavailable
    assert str(error) == "the inference server at 127.0.0.1:9 is stopping; try again"


def test_messages_hold_no_more_images_than_their_answers_may() -> None:
    assert [len(chunk) for chunk in image_messages([b"x"] * 300, top_k=5)] == [256, 44]
    assert [len(chunk) for chunk in image_messages([b"x"] * 300, top_k=1000)] == [100, 100, 100]
    assert [len(chunk) for chunk in image_messages([b"x"] * 2, top_k=MAX_ANSWERS * 9)] == [1, 1]


def test_damaged_details_are_passed_over() -> None:
    status = WireStatus(grpc.StatusCode.NOT_FOUND, "gone", ((DETAILS_KEY, b"\xff\xff"),))
    assert type(from_rpc_error(FakeRpcError(status), "")) is errors.NotFound


def test_a_reason_that_names_no_error_of_ours_is_not_trusted() -> None:
    rich = status_pb2.Status(code=5, message="x")
    rich.details.add().Pack(error_details_pb2.ErrorInfo(reason="__doc__", domain="tandem"))
    status = WireStatus(grpc.StatusCode.NOT_FOUND, "x", ((DETAILS_KEY, rich.SerializeToString()),))
    assert type(from_rpc_error(FakeRpcError(status), "")) is errors.NotFound


def test_answers_survive_the_wire() -> None:
    answer = Classification(VERSION, (ImageResult("a.png", SCORED), ImageResult("b.png", error="broken")), TIMINGS)
    assert convert.classification_from_wire(convert.classification_to_wire(answer)) == answer
    summary = ComparisonSummary(VERSION, VERSION, 3, 1, 1, PairedTable(1, 1, 1, 0))
    pair = PairResult("a", "n1", SCORED, SCORED[::-1], False)
    comparison = Comparison((pair, PairResult("b", error="broken")), summary, TIMINGS)
    assert convert.comparison_from_wire(convert.comparison_to_wire(comparison)) == comparison
    assert comparison.disagreements == (pair,)
    unlabelled = ComparisonSummary(VERSION, VERSION, 3, 1, 1, None)
    assert convert.summary_from_wire(convert.summary_to_wire(unlabelled)) == unlabelled
    assert (summary + unlabelled).labelled == summary.labelled
    assert (summary + summary).num_images == 6


def test_statistics_travel_with_the_table() -> None:
    summary = ComparisonSummary(VERSION, VERSION, 10, 10, 0, PairedTable(0, 1, 9, 0))
    labelled = convert.summary_to_wire(summary).labelled
    assert labelled.mcnemar_exact_p == pytest.approx(22 / 1024)
    assert labelled.mcnemar_mid_p == pytest.approx(12 / 1024)
    assert (labelled.accuracy_a, labelled.accuracy_b) == (0.1, 0.9)


def test_texts_and_models_survive_the_wire() -> None:
    piece = TextPiece(" a b", ("a", "b"))
    assert convert.generation_from_wire(convert.piece_to_wire(piece)) == piece
    summary = GenerationSummary(VERSION, 2, 3, 2**64 - 1, "length", ("x",), 1.5, TIMINGS)
    assert convert.generation_from_wire(convert.generation_to_wire(summary)) == summary
    assert summary.perplexity == pytest.approx(4.4817, abs=1e-4)
    info = ModelInfo("m", "classifier", 3, {"best": 2}, (1, 2, 3), (3,), {2: "altered"}, True)
    assert convert.info_from_wire(convert.info_to_wire(info)) == info
    runtime = RuntimeDetails("openvino", "bfloat16", "openvino: the only one tried", 0.5, 0.25)
    details = ModelDetails(VERSION, "classifier", {"val_loss": 0.5}, 12, ("n0", "n1"), 64, 0, runtime)
    assert convert.details_from_wire(convert.details_to_wire(details)) == details


def test_scores_survive_the_wire_and_their_sums_are_weighted_by_tokens() -> None:
    tokens = (
        TokenScore("a", 3, -1.5, (Alternative("b", 2, -0.5), Alternative("a", 3, -1.5))),
        TokenScore("x", 0, -2.5),
    )
    answer = Scoring(VERSION, (TextScore(tokens, ("zebra",), 1), TextScore((TokenScore("a", 3, -7.0),))), TIMINGS)
    message = convert.scoring_to_wire(answer)
    assert convert.scoring_from_wire(message) == answer
    first, whole = message.results[0].summary, message.summary
    assert (first.num_tokens, first.sum_log_probability, first.mean_log_probability, first.num_unknown) == (
        2,
        -4,
        -2,
        1,
    )
    assert first.perplexity == pytest.approx(math.exp(2))
    # Three tokens of 11 nats, not the mean of two means.
    assert (whole.num_tokens, whole.num_unknown) == (3, 1)
    assert whole.mean_log_probability == pytest.approx(-11 / 3)
    assert answer.summary.perplexity == whole.perplexity
    # Far beyond what a double holds.
    assert math.isfinite(TextScore((TokenScore("a", 3, -1e9),)).summary.perplexity)


def test_each_change_of_a_model_survives_the_wire() -> None:
    for kind in get_args(ChangeKind):
        change = ModelChange(kind, "m", 2, "production", 1, "why")
        assert convert.update_from_wire(convert.update_to_wire(change)) == change
    snapshot = ModelsSnapshot((ModelInfo("m", "classifier", 1, {}, (1,), ()),))
    assert convert.update_from_wire(convert.update_to_wire(snapshot)) == snapshot
    later = pb.WatchModelsResponse(change=pb.ModelChange(name="m"))
    later.change.ParseFromString(b"\x08\x63")
    assert convert.update_from_wire(later) is None


@pytest.mark.parametrize("kind", [errors.ModelNotFound, errors.InvalidImage, errors.Unavailable])
def test_an_error_within_a_stream_comes_back_as_itself(kind: type[errors.TandemError]) -> None:
    back = from_rich(to_rich(to_status(kind("one line"))))
    assert (type(back), str(back)) == (kind, "one line")


def test_an_error_within_a_stream_that_is_not_ours() -> None:
    back = from_rich(to_rich(WireStatus(grpc.StatusCode.INTERNAL, "internal error 12", ())))
    assert str(back) == "the inference server failed: internal error 12"


def test_raw_images_reach_the_wire() -> None:
    ((first, second),) = image_messages([("a", RawImage(2, 1, b"123456")), b"encoded"])
    assert (first.name, first.raw.width, first.raw.height, first.raw.rgb) == ("a", 2, 1, b"123456")
    assert (second.WhichOneof("content"), second.data) == ("data", b"encoded")


@pytest.mark.parametrize("texts", ["the cat", ["the cat"]])
def test_one_text_is_not_its_letters(texts: str | list[str]) -> None:
    assert list(score_request("m", texts, 0, False).texts) == ["the cat"]


def test_how_a_text_is_drawn_reaches_the_wire() -> None:
    options = SamplingOptions(0.5, 3, 0.9, 7, True, 0.1, 1.2, ("a", "<eos>"), True)
    parameters = generate_request("m", None, 9, options).sampling
    assert (parameters.max_words, parameters.temperature, parameters.top_k, parameters.top_p) == (9, 0.5, 3, 0.9)
    assert (parameters.seed, parameters.allow_unknown, parameters.min_p) == (7, True, 0.1)
    assert (parameters.repetition_penalty, parameters.random_start) == (1.2, True)
    assert list(parameters.stop) == ["a", "<eos>"]
    assert list(generate_request("m", None, 1, SamplingOptions(stop="the")).sampling.stop) == ["the"]
