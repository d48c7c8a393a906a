"""A training run, ready to go: what the driver needs to know of it, whatever it trains."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from services.trainer.curves import Curves
from services.trainer.engine.ranks import ALONE, Ranks
from services.trainer.engine.reports import Training
from tandem.checkpoints.card import Card
from tandem.data.manifest import Dataset
from tandem.jobs.spec import TrainingSpec
from tandem.models.classifiers import num_parameters


@dataclass(frozen=True)
class Job:
    """A training run.

    - `files` go into every checkpoint as they are (`network.json`, and the vocabulary of a language model).
    - `example` is an input that TensorBoard traces the network with.
    - `finish(curves)` measures the best network, which the loop holds by then, and returns metrics beyond those of its
      epoch; every process of the run must call it, the first one with the curves.
    - `sample()` returns a text that the network as it is writes, for TensorBoard; None where it writes none.
    - `test_within(seconds)` measures the network on the test split for a run that a person ends early; None where
      there is none, or it takes longer.
    - `resume_from` is a checkpoint of another run to continue, where this run has none of its own.
    """

    training: Training
    make_card: Callable[[int, int, dict[str, float]], Card]
    files: Mapping[str, bytes]
    unit: Literal["images", "words"]
    finish: Callable[[Curves | None], dict[str, float]]
    example: Tensor
    ranks: Ranks = ALONE
    resume_from: Path | None = None
    sample: Callable[[], str] | None = None
    test_within: Callable[[float], dict[str, float] | None] | None = None


def origin(spec: TrainingSpec, dataset: Dataset, network: nn.Module, run_id: str) -> dict[str, Any]:
    """Return what every card of a run says of where its weights come from."""
    return {
        "run_id": run_id,
        "seed": spec.seed,
        "num_parameters": num_parameters(network),
        "dataset": spec.dataset,
        "dataset_fingerprint": dataset.fingerprint,
        "library_versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Return the versions that the bytes of a result depend on."""
    return {name: version(name) for name in ("torch", "torchvision", "numpy")}
