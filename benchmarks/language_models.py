"""Claims, on a CPU, for the well-known example's LSTM and Transformer.

Both are 200 wide, with 2 layers, 33,278 words, bptt 35 and a batch of 20:

1. training reaches 1.3 times the words/s of the reference's loop (`benchmarks.plain_words`) or more;
2. it reaches 0.95 of the words/s of the bare step or more: forward, loss, backward, clip and update on a window that is
   at hand, with the same network, optimizer and precision.

Ours is measured at the precision that `--precision auto` picks, and in float32. All ways take turns, so that they see
the same machine; the table has medians over the rounds, and of the ratios round by round. The text is random.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import torch

from benchmarks.plain_words import PlainRecurrent, PlainTransformer, PlainWords
from services.trainer.engine.language_model import LanguageModelTraining
from services.trainer.engine.reports import StepDone
from tandem.jobs.presets import load_preset
from tandem.jobs.spec import LanguageModelJob
from tandem.models.devices import resolve_precision
from tandem.models.language_models import LanguageModelShape, ModelState, build_language_model, detach

ROUNDS, STEPS = 7, 12
VOCABULARY, WIDTH, BPTT, BATCH = 33_278, 200, 35, 20
WORDS = BPTT * BATCH


def main() -> None:
    """Print words/s of each way, and the ratios that the claims are about."""
    auto = resolve_precision("auto", torch.device("cpu"))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, auto is {auto}")
    print(f"n = {ROUNDS} rounds of {STEPS} steps\n")
    print("| network | way | words/s | min | max | / reference | / its bare step |\n|---|---|---|---|---|---|---|")
    for name in ("LSTM", "Transformer"):
        speeds = measured(ways(name))
        for way, values in speeds.items():
            bare = speeds.get(f"{way}, bare step", ())
            cells = [f"{value:,.0f}" for value in (statistics.median(values), min(values), max(values))]
            ratios = (ratio(values, speeds["reference"]), ratio(values, bare))
            print(f"| {name} | {way} |", " | ".join([*cells, *ratios]), "|", flush=True)


def ratio(values: Sequence[float], others: Sequence[float]) -> str:
    """Return the median ratio, round by round."""
    return f"{statistics.median(a / b for a, b in zip(values, others, strict=True)):.2f}" if others else ""


def ways(name: str) -> dict[str, Callable[[], object]]:
    """Return a training step of each way."""
    text = torch.randint(VOCABULARY, (WORDS * (ROUNDS + 2) * STEPS + BATCH,))
    plain = PlainRecurrent(VOCABULARY, WIDTH, 0.2) if name == "LSTM" else PlainTransformer(VOCABULARY, WIDTH, 2, 0.2)
    rate = 20.0 if name == "LSTM" else 5.0
    rows = text[: len(text) // BATCH * BATCH].view(BATCH, -1).T.contiguous()
    steps: dict[str, Callable[[], object]] = {"reference": PlainWords(plain, rows, BPTT, rate).step}
    for precision in ("auto", "float32"):
        training = ours(name, text, precision)
        steps[precision] = stepper(report for report in training.fit() if isinstance(report, StepDone))
        # A network of its own: the loop's must not be trained by it.
        steps[f"{precision}, bare step"] = bare_step(ours(name, text, precision), text)
    return steps


def stepper(steps: Iterable[object]) -> Callable[[], object]:
    """Return a function that takes the next of `steps`."""
    iterator = iter(steps)
    return lambda: next(iterator)


def ours(name: str, text: torch.Tensor, precision: str) -> LanguageModelTraining:
    """Return the loop of the compatible preset."""
    preset = {**load_preset(f"compat-{name.lower()}"), "precision": precision}
    spec = LanguageModelJob.model_validate({"dataset": "d", "model_name": "m", **preset})
    shape = LanguageModelShape(spec.model, VOCABULARY, WIDTH, WIDTH, 2, 2, 0.2, False, 4 * BPTT)
    return LanguageModelTraining(spec, build_language_model(shape), text, text[:1000], torch.device("cpu"))


def bare_step(training: LanguageModelTraining, text: torch.Tensor) -> Callable[[], object]:
    """Return the step on one window that is at hand."""
    inputs, targets = text[:WORDS].view(BATCH, BPTT), text[1 : WORDS + 1].view(BATCH, BPTT)
    state: ModelState | None = None

    def step() -> None:
        nonlocal state
        found = training._loss(inputs, targets, state)
        state = detach(found.state)
        training.optimizer.zero_grad(set_to_none=True)
        (found.objective / WORDS).backward()
        torch.nn.utils.clip_grad_norm_(training.network.parameters(), training.spec.clip_norm)
        training.optimizer.step()

    return step


def measured(steps: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Return words/s of each way in each round; the first round is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(STEPS):
                step()
            speeds[name].append(STEPS * WORDS / (time.perf_counter() - began))
    return {name: values[1:] for name, values in speeds.items()}


if __name__ == "__main__":
    main()
