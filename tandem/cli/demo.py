"""`tandem demo`: the whole path on real data, on this machine, in minutes; leaves nothing running."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tandem.cli.output import console, json_option, print_json
from tandem.errors import Conflict
from tandem.settings import Settings
from tandem.volume import Volume

if TYPE_CHECKING:
    from tandem.client import Client
    from tandem.jobs.broker import Broker
    from tandem.jobs.record import JobRecord
    from tandem.jobs.spec import JobSpec
    from tandem.local.stack import Stack

_NUM_CLASSIFIED = 3
_TOP_K = 3
_MOST_DISAGREEMENTS = 8
_NUM_WORDS = 80
_SERVING_TIMEOUT_S = 60.0


@click.command()
@click.option("--images", type=click.Path(exists=True, path_type=Path), help="A folder with a folder for each class.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="A UTF-8 text file.")
@click.option("--retrain", is_flag=True, help="Train again what an earlier demo trained on the same data.")
@json_option
def demo(images: Path | None, text: Path | None, retrain: bool, as_json: bool) -> None:
    """Train two classifiers and a language model, then classify, compare and generate with them.

    Uses scanned digits and Python's language reference, which come with the installed packages, or your own data.
    """
    began = time.monotonic()
    settings = replace(Settings.from_environment(), broker=None, inference_address=None)
    steps = Demo(settings, images, text, retrain, as_json)
    with _signals_interrupt():
        results = steps.run()
    results["seconds"] = round(time.monotonic() - began, 1)
    if as_json:
        print_json(results)
    else:
        _print_farewell(settings.home, results["seconds"])


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the demo as Ctrl-C does: everything is stopped on the way out."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Demo:
    """The steps in order; what they find is printed for people, and returned for programs."""

    def __init__(
        self, settings: Settings, images: Path | None, text: Path | None, retrain: bool, as_json: bool
    ) -> None:
        self._settings = settings
        self._volume = Volume(settings.home, settings.checkpoint_store)
        self._images, self._text = images, text
        self._retrain = retrain
        self._as_json = as_json
        self._out = console(stderr=as_json)

    def run(self) -> dict[str, Any]:
        """Run all steps; everything that was started is stopped when this returns or raises."""
        from tandem.client import Client
        from tandem.local.stack import Stack

        self._head("1. Data")
        self._prepare()
        self._head("2. The system: broker, trainer and inference on this machine")
        with Stack(self._settings, with_tensorboard=False, say=self._say) as stack:
            for name in ("broker", "inference"):
                self._say(f"{name:10} {stack.addresses[name]}")
            self._head("3. Training: three runs through Celery")
            runs = self._train(stack)
            with Client(stack.addresses["inference"], access=self._settings.client_access) as client:
                results = self._predict(client)
            self._head("Stopping")
        return {"runs": [run.document() for run in runs], **results, "tensorboard": str(self._volume.runs)}

    def _head(self, text: str) -> None:
        self._out.print(f"\n{text}", style="bold")

    def _say(self, text: str) -> None:
        self._out.print(f"  {text}", markup=False)

    def _prepare(self) -> None:
        from tandem.cli.progress import BarProgress
        from tandem.demo.plan import prepare
        from tandem.volume import volume_errors

        with volume_errors(self._volume.home), BarProgress() as progress:
            images, text = prepare(self._volume, self._images, self._text, progress)
        counts = ", ".join(f"{count:,} {split}" for split, count in images.num_images.items())
        self._say(f"images: {len(images.classes)} classes, {counts}, from {images.source}")
        self._say(f"text:   {text.num_tokens['train']:,} words, {text.vocabulary_size:,} different, from {text.source}")

    def _train(self, stack: "Stack") -> list["JobRecord"]:
        from tandem.demo.plan import specs, trained_before

        runs: list[JobRecord] = []
        for spec in specs(self._images is not None):
            before = None if self._retrain else trained_before(spec, self._volume)
            if before is None:
                runs.append(self._run(spec, stack.broker))
            else:
                self._say(
                    f"{before.run_id} made {before.model_name} before, on the same data (--retrain makes it anew)"
                )
                runs.append(before)
        return runs

    def _run(self, spec: "JobSpec", broker: "Broker") -> "JobRecord":
        from tandem.cli.follow import follow_run
        from tandem.jobs.queue import make_celery
        from tandem.jobs.runs import cancel
        from tandem.jobs.store import JobStore, connect
        from tandem.jobs.submit import submit

        store = JobStore(connect(broker), broker)
        run = submit(spec, self._volume, store, make_celery(broker))
        try:
            self._say(f"{run.run_id} makes {run.model_name}")
            return follow_run(run.run_id, self._volume, store, quiet=self._as_json)
        except BaseException:
            # A demo that is broken off leaves no run that the next one would have to finish first.
            with contextlib.suppress(Conflict):
                cancel(run.run_id, self._volume, store)
            raise

    def _predict(self, client: "Client") -> dict[str, Any]:
        from tandem.demo.plan import LANGUAGE_MODEL, MODEL_A, MODEL_B

        for model in (MODEL_A, MODEL_B, LANGUAGE_MODEL):
            client.wait_until_serving(model, _SERVING_TIMEOUT_S)
        return {
            "classify": self._classify(client),
            "compare": self._compare(client),
            "generate": self._generate(client),
        }

    def _classify(self, client: "Client") -> list[dict[str, Any]]:
        from tandem.data.manifest import read_index
        from tandem.demo.plan import IMAGES, MODEL_A

        directory = self._volume.dataset(IMAGES)
        index = read_index(directory, "val")
        chosen = [index[position * len(index) // _NUM_CLASSIFIED][0] for position in range(_NUM_CLASSIFIED)]
        self._head(f"4. Classify: {len(chosen)} val images by {MODEL_A}")
        answer = client.classify(MODEL_A, [(name, (directory / name).read_bytes()) for name in chosen], _TOP_K)
        for result in answer.results:
            self._say(result.name)
            for each in result.top_k:
                self._say(f"    {each.probability:7.2%}  {'█' * round(20 * each.probability):20}  {each.words}")
        return [asdict(result) for result in answer.results]

    def _compare(self, client: "Client") -> dict[str, Any]:
        from tandem.client import Comparison
        from tandem.demo.plan import IMAGES, MODEL_A, MODEL_B

        self._head(f"5. Compare: {MODEL_A} and {MODEL_B} on the same val images")
        comparison = next(
            each for each in client.compare_dataset(MODEL_A, MODEL_B, IMAGES) if isinstance(each, Comparison)
        )
        summary = comparison.summary
        agreement = 1 - summary.num_disagreements / max(summary.num_images, 1)
        self._say(
            f"{summary.num_images} images; they agree on {agreement:.1%} and differ on {summary.num_disagreements}"
        )
        if table := summary.labelled:
            self._say(f"right: {MODEL_A} {table.accuracy_a:.1%}, {MODEL_B} {table.accuracy_b:.1%}")
            self._say(f"McNemar's exact test: p = {table.exact_p:.3g}")
        for pair in comparison.disagreements[:_MOST_DISAGREEMENTS]:
            answers = f"{MODEL_A}: {pair.a[0].words} ({pair.a[0].probability:.0%})"
            answers += f"  {MODEL_B}: {pair.b[0].words} ({pair.b[0].probability:.0%})"
            self._say(f"    {pair.name}  {answers}" + (f"  truth: {pair.label}" if pair.label else ""))
        if (rest := summary.num_disagreements - _MOST_DISAGREEMENTS) > 0:
            self._say(f"    … and {rest} more")
        files = [pair.name for pair in comparison.disagreements]
        return {"num_images": summary.num_images, "num_disagreements": summary.num_disagreements, "files": files}

    def _generate(self, client: "Client") -> dict[str, Any]:
        from tandem.client import SamplingOptions, TextPiece
        from tandem.demo.plan import LANGUAGE_MODEL

        prompt = None if self._text else "The statement"
        self._head(f"6. Generate: {_NUM_WORDS} words by {LANGUAGE_MODEL}" + (f", after {prompt!r}" if prompt else ""))
        text = ""
        self._out.print("  ", end="")
        for piece in client.generate(LANGUAGE_MODEL, prompt, _NUM_WORDS, SamplingOptions(temperature=0.7, seed=1)):
            if isinstance(piece, TextPiece):
                text += piece.text
                self._out.print(piece.text.replace("\n", "\n  "), end="", markup=False, soft_wrap=True)
        self._out.print()
        return {"prompt": prompt, "text": text}


def _print_farewell(home: Path, seconds: float) -> None:
    click.echo(f"\nDone in {seconds:.0f} s; nothing is left running. To go on:")
    click.echo(f"  export TANDEM_HOME={home} PATH=$PWD/.venv/bin:$PATH")
    click.echo("  tandem up --detach              the same system, with TensorBoard; 'tandem status' says where")
    click.echo(f"  tensorboard --logdir {home}/runs    the curves and graphs alone")
    click.echo("  tandem classify demo-resnet18 IMAGE…")
