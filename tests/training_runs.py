"""Running a training loop by hand, and all that it has become."""

from collections.abc import Callable

import torch

from services.trainer.engine.reports import EpochDone, EvaluationStep, StepDone, Training
from tandem.checkpoints.tensors import from_bytes, to_bytes
from tandem.models.weights import bare_state, load_weights


def run(training: Training, until: Callable[[int], bool] = lambda _: False) -> list[EpochDone]:
    """Train to the end, or to the first step for which `until` holds."""
    epochs = []
    for report in training.fit():
        if isinstance(report, EpochDone):
            epochs.append(report)
        if isinstance(report, StepDone) and until(report.step):
            break
    return epochs


def everything(training: Training) -> bytes:
    return to_bytes(bare_state(training.served_network)) + to_bytes(training.snapshot())


def check_resume(make: Callable[[], Training], stop_at: int) -> None:
    """Stop after step `stop_at`, go on in a new one from what would be saved, and compare with one never stopped."""
    straight = make()
    run(straight)
    first = make()
    run(first, until=lambda step: step == stop_at)
    weights, state = to_bytes(bare_state(first.served_network)), to_bytes(first.snapshot())
    second = make()
    torch.manual_seed(123)
    load_weights(second.served_network, from_bytes(weights))
    second.restore(from_bytes(state))
    run(second)
    assert first.step == stop_at
    assert second.step == straight.step
    assert everything(second) == everything(straight)


def check_resume_within_evaluation(make: Callable[[], Training]) -> None:
    """As `check_resume`, stopped in the first evaluation; and both report the same."""
    straight = make()
    epochs = run(straight)
    first, second = make(), make()
    next(report for report in first.fit() if isinstance(report, EvaluationStep))
    load_weights(second.served_network, bare_state(first.served_network))
    second.restore(first.snapshot())
    assert [epoch.metrics for epoch in run(second)] == [epoch.metrics for epoch in epochs]
    assert everything(second) == everything(straight)
