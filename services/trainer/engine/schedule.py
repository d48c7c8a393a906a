"""Learning rate and image size as pure functions of the step."""

import math

from tandem.jobs.spec import ClassifierJob, TrainingSpec

# Of one cycle: where it begins below the peak, where it ends below the beginning, and the share that it rises for
# (torch.optim.lr_scheduler.OneCycleLR's defaults, after Smith and Topin 2018).
_DIVISOR, _FINAL_DIVISOR, _RISE = 25.0, 1e4, 0.3
_SIZE_STEP = 8


def learning_rate_at(spec: TrainingSpec, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of update `step` (from 0): warm-up, then the schedule of the spec.

    What `anneal` takes off depends on the evaluations, and is not in it.
    """
    peak, total, warmup = spec.learning_rate, spec.epochs * steps_per_epoch, _warmup_epochs(spec) * steps_per_epoch
    if spec.schedule == "onecycle":
        return _one_cycle(peak, step, warmup, total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    share = (step - warmup) / max(total - warmup, 1)
    if spec.schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * share))
    if spec.schedule == "linear":
        return peak * (1 - share)
    if isinstance(spec, ClassifierJob) and spec.schedule == "step":
        length = spec.step_epochs or max(math.ceil(spec.epochs / 3), 1)
        return float(peak * spec.step_factor ** (step // steps_per_epoch // length))
    return peak


def _warmup_epochs(spec: TrainingSpec) -> float:
    if spec.warmup_epochs is None and spec.schedule == "anneal":
        return 0.0
    if spec.warmup_epochs is None:
        return _RISE * spec.epochs if spec.schedule == "onecycle" else min(1.0, spec.epochs / 2)
    # As long as the whole run it would never end.
    return spec.warmup_epochs if spec.warmup_epochs < spec.epochs else 0.0


def _one_cycle(peak: float, step: int, rise: float, total: int) -> float:
    low, end = peak / _DIVISOR, peak / _DIVISOR / _FINAL_DIVISOR
    # OneCycleLR counts to the last step, and so does this.
    top, last = max(rise - 1, 0.0), total - 1
    if step <= top:
        return _between(low, peak, step / top if top else 1.0)
    return _between(peak, end, (step - top) / max(last - top, 1))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def image_size_at(spec: ClassifierJob, epoch: int, final: int) -> int:
    """Return the side of training images in `epoch` (from 0): it grows by steps of 8 from `start_size` to `final`."""
    if spec.start_size is None or spec.start_size >= final:
        return final
    share = epoch / (spec.growth * spec.epochs)
    if share >= 1:
        return final
    grown = spec.start_size + share * (final - spec.start_size)
    return min(spec.start_size + int((grown - spec.start_size) / _SIZE_STEP + 0.5) * _SIZE_STEP, final)
