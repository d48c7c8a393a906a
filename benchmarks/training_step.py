"""Claim: the training loop of language models takes at most 1/0.95 of the time of the bare step on ready tensors.

The bare step is forward, loss, backward, clip and update on one batch that is at hand, with the same network, optimizer
and threads. Loop and bare step take turns, so that both see the same machine.
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from services.trainer.engine.language_model import LanguageModelTraining
from services.trainer.engine.reports import StepDone, Training
from tandem.jobs.spec import LanguageModelJob
from tandem.models.language_models import LanguageModelShape, ModelState, build_language_model, detach

ROUNDS = 7
STEPS = {"LSTM 200, vocabulary 33,278": 20, "Transformer 200, vocabulary 33,278": 20}
VOCABULARY = 33_278


def main() -> None:
    """Print the median step of loop and bare step, and the median of their ratios round by round."""
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"| network | loop ms | bare ms | bare / loop | n = {ROUNDS} rounds |\n|---|---|---|---|---|")
    for name, steps in STEPS.items():
        loops, bares = rounds(*language_model(name.split()[0]), steps)
        ratio = statistics.median(b / a for a, b in zip(loops, bares, strict=True))
        print(f"| {name} | {statistics.median(loops):.1f} | {statistics.median(bares):.1f} | {ratio:.3f} | |")


def rounds(training: Training, bare: Callable[[], None], steps: int) -> tuple[list[float], list[float]]:
    """Return milliseconds a step of the loop and of the bare step, a pair for each round after the first."""
    reports = (report for report in training.fit() if isinstance(report, StepDone))
    loops, bares = [], []
    for _ in range(ROUNDS + 1):
        loops.append(milliseconds(lambda: next(reports), steps))
        bares.append(milliseconds(bare, steps))
    return loops[1:], bares[1:]


def milliseconds(step: Callable[[], object], count: int) -> float:
    """Return the mean time of `count` steps."""
    began = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - began) / count * 1000


def language_model(model: str) -> tuple[LanguageModelTraining, Callable[[], None]]:
    """Return the loop over a text of random words, and its bare step; bptt 35, batch 20."""
    spec = LanguageModelJob.model_validate({"dataset": "d", "model_name": "m", "model": model})
    shape = LanguageModelShape(spec.model, VOCABULARY, 200, 200, 2, 2, 0.2, False, 140)
    text = torch.randint(VOCABULARY, (400_000,))
    training = LanguageModelTraining(spec, build_language_model(shape), text, text[:1000], torch.device("cpu"))
    inputs, targets = text[:700].view(20, 35), text[1:701].view(20, 35)
    state: ModelState | None = None

    def bare() -> None:
        nonlocal state
        logits, after = training.network(inputs, state)
        state = detach(after)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(training.network.parameters(), spec.clip_norm)
        training.optimizer.step()

    return training, bare


if __name__ == "__main__":
    main()
