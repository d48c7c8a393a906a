"""Learning rate as a pure function of the step."""

import math

from tandem.jobs.spec import ClassifierJob


def learning_rate_at(spec: ClassifierJob, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of update `step` (from 0): linear warm-up, then the schedule of the spec."""
    warmup = spec.warmup_epochs * steps_per_epoch
    total = spec.epochs * steps_per_epoch
    if spec.epochs > spec.warmup_epochs and step < warmup:
        return spec.learning_rate * (step + 1) / (warmup + 1)
    if spec.schedule == "cosine":
        share = (step - warmup) / max(total - warmup, 1) if spec.epochs > spec.warmup_epochs else step / total
        return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
    if spec.schedule == "step":
        epoch = step // steps_per_epoch
        return float(spec.learning_rate * 0.1 ** (epoch // max(math.ceil(spec.epochs / 3), 1)))
    return spec.learning_rate
