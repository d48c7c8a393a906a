"""TensorBoard logs of a run: the graph once, scalars by epoch, rates and running loss by step, and at the end pictures.

Only the training process writes them; `tandem up` runs a TensorBoard over all runs.
"""

import textwrap
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from services.trainer.pictures import log_hparams
from tandem.jobs.spec import TrainingSpec

# Characters that fit into TensorBoard's column.
_LINE = 100


class Curves:
    """The event file of one run."""

    def __init__(self, run: Path, first_step: int) -> None:
        # Imported here: it takes a second, and only the training process needs it.
        from torch.utils.tensorboard import SummaryWriter

        has_points = any((run / "tensorboard").glob("events.out.tfevents.*"))
        # Points beyond the checkpoint that is resumed from, or of an attempt that left none, are drawn anew.
        purge = first_step + 1 if has_points else None
        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=purge, flush_secs=10)

    def graph(self, network: nn.Module, example: Tensor) -> None:
        """Draw the network, traced in eval mode so that dropout leaves no marks."""
        was_training = network.training
        network.eval()
        with torch.no_grad(), warnings.catch_warnings():
            # The tracer is deprecated, and is what TensorBoard's graphs are made with.
            warnings.simplefilter("ignore")
            # Not strict: language models return their state beside the logits.
            self._writer.add_graph(network, example, use_strict_trace=False)
        network.train(was_training)

    def scalars(self, metrics: Mapping[str, float], step: int, prefix: str = "") -> None:
        """Add one point to the curve of each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(prefix + name, value, step)

    def image(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Add a picture, uint8 (3, H, W)."""
        self._writer.add_image(name, pixels, step)

    def text(self, name: str, words: str, step: int) -> None:
        """Add a text, shown as it is."""
        # TensorBoard reads Markdown: what stands four blanks in is left as it is, and is not wrapped.
        lines = (part for line in words.splitlines() for part in textwrap.wrap(line, _LINE) or [""])
        self._writer.add_text(name, "\n".join(f"    {line}" for line in lines), step)

    def hyper_parameters(self, spec: TrainingSpec, metrics: Mapping[str, float]) -> None:
        """Add the spec and the final metrics to the HParams page."""
        given = spec.model_dump(mode="json", exclude={"model_name"})
        log_hparams(self._writer, {name: value for name, value in given.items() if value is not None}, metrics)

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Flush and close the files; where the attempt has failed already, that is the error to tell."""
        try:
            self._writer.close()
        except OSError:
            if kind is None:
                raise
