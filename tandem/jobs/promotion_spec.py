"""The spec of the job that compares a version with the one an alias has, and moves the alias if it is better."""

from typing import Literal, Self

from pydantic import Field, model_validator

from tandem.comparison.evidence import ALPHA
from tandem.jobs.base_spec import Job, Name, Reference

# What the job leaves in its run directory.
PROMOTION_FILE = "promotion.json"

# Of 9999 resamples ten are beyond either end.
MIN_TEXT_ALPHA = 0.002


class PromotionJob(Job):
    """Compare `model` with `against` on a split of a prepared dataset, and point `alias` at it if it passes the gate.

    - `model` is a version, or run:ID of a training run, which stands for the version that it has published.
    - `against` None is whatever has the alias; where nothing has it, the version takes it unseen.
    - `split` None is val of images; of a text test, or valid if it has no test.
    - `min_gain` is the least gain found: of accuracy@1, a share; of a language model that of its perplexity.
    - `alpha` is the level of the paired test (`tandem.checkpoints.promotion`).
    """

    kind: Literal["promote_classifier", "promote_language_model"]
    model: Reference
    alias: Name
    against: Reference | None = None
    split: str | None = None
    min_gain: float = Field(0.0, ge=0, le=1)
    alpha: float = Field(ALPHA, gt=0, lt=1)

    @model_validator(mode="after")
    def _alpha_can_be_told(self) -> Self:
        if self.kind == "promote_language_model" and self.alpha < MIN_TEXT_ALPHA:
            raise ValueError(f"alpha {self.alpha:g} is finer than a bootstrap can tell: {MIN_TEXT_ALPHA:g} or above")
        return self

    @property
    def model_name(self) -> str:
        """What the record calls the run's model."""
        return self.model
