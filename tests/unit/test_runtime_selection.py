"""Which runtime answers: the fastest that agrees with eager, and eager wherever there is none."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from services.inference.runtimes import compiled, selection
from services.inference.runtimes.check import TOLERANCE, Refused, check, check_pixels
from services.inference.runtimes.eager import EagerClassifier
from services.inference.runtimes.interface import ClassifierRuntime
from services.inference.runtimes.selection import RuntimeSelector, shared_copy
from services.inference.runtimes.turns import InTurns, at_once
from tandem.checkpoints.card import Preprocessing
from tandem.errors import CheckpointCorrupt, InvalidRequest
from tandem.models.devices import resolve_precision
from tandem.settings import Settings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZE = 16
PREPROCESSING = Preprocessing(resize=SIZE, image_size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
PIXELS = check_pixels(SIZE)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    # In bfloat16 OpenVINO keeps the bits of a row in layers 64 wide and above; narrower ones are refused on load.
    layers = (nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.AvgPool2d(7), nn.Flatten(), nn.Linear(256, 5))
    return nn.Sequential(*layers).eval().requires_grad_(False)


class Fake:
    """Answers what `answer` makes of eager's logits."""

    name = "fake"

    def __init__(self, answer: Callable[[Tensor], Tensor], dtype: str = "float32") -> None:
        self.dtype = dtype
        self._eager = EagerClassifier(network(), PREPROCESSING, CPU)
        self._answer = answer

    def predict(self, pixels: Tensor) -> Tensor:
        return self._answer(self._eager.predict(pixels))

    def warm(self) -> None:
        pass


def checked(runtime: ClassifierRuntime, on_cpu: bool = True) -> float:
    expected = EagerClassifier(network(), PREPROCESSING, CPU).predict(PIXELS)
    return check(InTurns(runtime, at_once), expected, PIXELS, on_cpu).largest


def test_the_same_answers_pass_and_the_drift_is_measured() -> None:
    assert checked(Fake(lambda logits: logits)) == 0
    shift = torch.tensor([2e-5, 0, 0, 0, 0])
    assert 1e-6 < checked(Fake(lambda logits: logits + shift)) <= TOLERANCE


class FakeBeside(Fake):
    """Runs batches beside each other, and adds `error` to those of `size`."""

    beside_from, beside_sizes = 4, (1, 2, 3)

    def __init__(self, size: int, error: float) -> None:
        super().__init__(lambda logits: logits)
        self._size, self._error = size, error

    def predict_beside(self, pixels: Tensor) -> Tensor:
        return self.predict(pixels) + (self._error if len(pixels) == self._size else 0.0)

    def on_each_stream(self, pixels: Tensor) -> list[Tensor]:
        return [self.predict(pixels), self.predict_beside(pixels)]


def test_what_runs_beside_others_has_the_same_bits_at_each_size_or_is_refused() -> None:
    assert checked(FakeBeside(2, 0.0)) == 0
    for size in (1, 3):
        with pytest.raises(Refused, match=f"in a batch of {size} beside others differ"):
            checked(FakeBeside(size, 1e-6))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda logits: logits * 1.01, "differ from eager's by"),
        (lambda logits: logits.flip(1), "differ from eager's by"),
        (lambda logits: logits * torch.nan, "not finite"),
        (lambda logits: logits[:, :4], "not finite numbers of the shape"),
        (lambda logits: logits + 1e-6 * len(logits), "in a batch of 1 differ"),
        (lambda logits: logits + 1e-6 * torch.arange(len(logits)).unsqueeze(1), "in a batch of 1 differ"),
    ],
)
def test_what_is_not_eager_is_refused(answer: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(Refused, match=said):
        checked(Fake(answer))


def test_int8_is_named_told_and_keeps_rows_apart() -> None:
    asked: list[int] = []

    def calibration() -> Tensor:
        asked.append(1)
        return PIXELS

    selected = RuntimeSelector(CPU, "auto", "int8").select(network(), PREPROCESSING, calibration=calibration)
    assert (selected.runtime.name, selected.runtime.dtype) == ("openvino", "int8")
    assert selected.keeps_rows
    assert asked == [1]
    assert 0 < selected.drift.mean <= selected.drift.largest < 0.5
    # For Compare.
    assert selected.eager.dtype == "float32"
    expected = EagerClassifier(network(), PREPROCESSING, CPU).predict(PIXELS)
    assert torch.equal(selected.eager.predict(PIXELS), expected)
    assert not torch.equal(selected.runtime.predict(PIXELS), expected)
    # Another one of the same structure has ranges, and answers, of its own.
    other = RuntimeSelector(CPU, "openvino", "int8").select(network(1), PREPROCESSING)
    assert not torch.equal(other.runtime.predict(PIXELS), selected.runtime.predict(PIXELS))


def test_int8_where_it_can_not_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    for device, engine in ((CUDA, "auto"), (CPU, "eager"), (CPU, "compiled")):
        with pytest.raises(InvalidRequest, match="TANDEM_PRECISION=int8 is OpenVINO's, on a CPU"):
            RuntimeSelector(device, engine, "int8")
    monkeypatch.setattr(selection, "find_spec", lambda _: None)
    with pytest.raises(InvalidRequest, match="the package nncf is not installed"):
        RuntimeSelector(CPU, "auto", "int8")


def test_bfloat16_has_no_tolerance_but_no_neighbours_either() -> None:
    assert checked(Fake(lambda logits: logits * 1.01, "bfloat16")) > TOLERANCE
    with pytest.raises(Refused, match="in a batch of 1 differ"):
        checked(Fake(lambda logits: logits + 0.01 * len(logits), "bfloat16"))


def test_on_a_gpu_the_last_bit_may_change_with_the_batch() -> None:
    checked(Fake(lambda logits: logits + 1e-6 * len(logits)), on_cpu=False)


def test_the_images_of_the_check_are_the_same_each_time_and_all_differ() -> None:
    pixels = check_pixels(64)
    assert pixels.shape == (32, 3, 64, 64)
    assert torch.equal(pixels, check_pixels(64))
    assert len({bytes(image.numpy().tobytes()) for image in pixels}) == 32
    # Neighbouring pixels of a scene are alike, those of noise are not.
    steps = (pixels.float()[..., 1:] - pixels.float()[..., :-1]).abs().mean((1, 2, 3))
    assert steps[:8].min() > 60
    assert steps[12:].max() < 20


def test_auto_takes_the_faster_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    times: dict[str, tuple[float, ...]] = {"openvino": (1.0, 9.0), "eager": (2.0, 9.5)}
    measured = []

    def measure(runtimes: dict[str, ClassifierRuntime], pixels: Tensor) -> dict[str, tuple[float, ...]]:
        measured.append(list(runtimes))
        return times

    monkeypatch.setattr(selection, "measure", measure)
    selector = RuntimeSelector(CPU)
    selected = selector.select(network(), PREPROCESSING)
    assert (selected.runtime.name, selected.eager.name, selected.runtime.dtype) == ("openvino", "eager", "float32")
    assert "1.00 and 9.00 ms for 1 and 32 images, against eager 2.00 and 9.50 ms" in selected.reason
    times = {"openvino": (3.0, 9.0), "eager": (2.0, 9.5)}
    # Another version of the same network: the times are known.
    assert selector.select(network(1), PREPROCESSING).runtime.name == "openvino"
    assert measured == [["openvino", "eager"]]
    assert RuntimeSelector(CPU).select(network(), PREPROCESSING).runtime.name == "eager"


def test_measuring_takes_turns_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "TIME_LIMIT_S", 0.0)
    turns: list[tuple[str, int]] = []

    def counted(name: str) -> ClassifierRuntime:
        return Fake(lambda logits: turns.append((name, len(logits))) or logits)  # type: ignore[func-returns-value]

    times = selection.measure({"a": counted("a"), "b": counted("b")}, PIXELS)
    assert turns == [("a", 1), ("b", 1), ("a", 32), ("b", 32)]
    assert set(times) == {"a", "b"}
    assert min(min(each) for each in times.values()) > 0


@pytest.mark.parametrize("engine", ["auto", "openvino"])
def test_eager_answers_where_another_is_refused_or_fails(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    selector = RuntimeSelector(CPU, engine)
    for build, said in (
        (lambda *_: Fake(lambda logits: logits * 1.1), "openvino is refused: its probabilities differ"),
        (lambda *_: 1 // 0, "openvino can't run this network (ZeroDivisionError)"),
        (lambda *_: __import__("no_such_package"), "openvino is not installed"),
    ):
        monkeypatch.setattr(selector, "_build", build)
        selected = selector.select(network(), PREPROCESSING)
        assert selected.runtime is selected.eager
        assert said in selected.reason


def test_a_network_whose_answers_are_no_numbers_is_refused() -> None:
    broken = network()
    next(broken.parameters()).fill_(torch.nan)
    with pytest.raises(CheckpointCorrupt, match="finite"):
        RuntimeSelector(CPU).select(broken, PREPROCESSING)


@pytest.mark.skipif(resolve_precision("auto", CPU) != "bfloat16", reason="this CPU has no bfloat16 instructions")
@pytest.mark.parametrize("engine", ["eager", "auto", "openvino"])
def test_bfloat16_is_named_and_eager_beside_it_stays_in_float32(engine: str) -> None:
    exact = EagerClassifier(network(), PREPROCESSING, CPU).predict(PIXELS)
    selected = RuntimeSelector(CPU, engine, "bfloat16").select(network(), PREPROCESSING)
    assert selected.runtime.dtype == "bfloat16"
    assert selected.drift.largest > 0
    assert f"within {selected.drift.largest:.1e} of eager's" in selected.reason
    assert torch.equal(selected.eager.predict(PIXELS), exact)
    assert selected.eager.dtype == "float32"


def test_eager_is_eager() -> None:
    selected = RuntimeSelector(CPU, "eager").select(network(), PREPROCESSING)
    assert selected.runtime is selected.eager
    assert selected.reason == "eager in float32: it was asked for"


def test_what_can_not_be_had_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "resolve_precision", lambda *_: "float32")
    with pytest.raises(InvalidRequest, match=r"TANDEM_PRECISION=bfloat16.*TANDEM_PRECISION=float32"):
        RuntimeSelector(CPU, "auto", "bfloat16")
    with pytest.raises(InvalidRequest, match="TANDEM_DEVICE=cpu"):
        RuntimeSelector(CUDA, "openvino")
    monkeypatch.setattr(selection, "find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="openvino is not installed"):
        RuntimeSelector(CPU, "openvino")
    monkeypatch.setattr(compiled, "which", lambda name: None)
    with pytest.raises(InvalidRequest, match=r"no C\+\+ compiler"):
        RuntimeSelector(CPU, "compiled")
    RuntimeSelector(CPU, "auto")


@pytest.mark.parametrize("name", ["TANDEM_ENGINE", "TANDEM_PRECISION"])
def test_settings_name_what_there_is(name: str) -> None:
    settings = Settings.from_environment({})
    assert (settings.engine, settings.precision) == ("auto", "float32")
    with pytest.raises(InvalidRequest, match=rf"{name}='int4' is none of .*, "):
        Settings.from_environment({name: "int4"})


def test_a_shared_copy_has_modules_of_its_own_around_the_same_weights() -> None:
    first = network()
    second = shared_copy(first)
    assert second is not first
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert {id(each) for each in first.modules()}.isdisjoint(id(each) for each in second.modules())


def test_openvino_is_imported_only_where_it_is_used() -> None:
    code = "import sys, services.inference.server; assert 'openvino' not in sys.modules; print('none')"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout == "none\n", done.stderr
