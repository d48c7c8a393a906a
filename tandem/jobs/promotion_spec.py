"""The spec of the job that compares a version with the one an alias has, and moves the alias if it is better."""

from typing import Literal

from pydantic import Field

from tandem.jobs.base_spec import Job, Name, Reference

# What the job leaves in its run directory.
PROMOTION_FILE = "promotion.json"


class PromotionJob(Job):
    """Compare `model` with `against` on a split of a prepared dataset, and point `alias` at it if it passes the gate.

    - `model` is a version, or run:ID of a training run, which stands for the version that it has published.
    - `against` None is whatever has the alias; where nothing has it, the version takes it unseen.
    - `split` None is val of images; of a text test, or valid if it has no test.
    - `min_gain` is the least gain: of accuracy@1, a share; of a language model the share by which its perplexity falls.
    - `alpha` is the level of the paired test (`tandem.checkpoints.promotion`).
    """

    kind: Literal["promote_classifier", "promote_language_model"]
    model: Reference
    alias: Name
    against: Reference | None = None
    split: str | None = None
    min_gain: float = Field(0.0, ge=-1, le=1)
    alpha: float = Field(0.05, gt=0, lt=1)

    @property
    def model_name(self) -> str:
        """What the record calls the run's model."""
        return self.model
