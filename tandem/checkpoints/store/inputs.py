"""What a run begins with, in the store: its spec and the file of weights that it names, the spec last."""

from pathlib import Path

from tandem.checkpoints.store.objects import ObjectStore
from tandem.errors import RunNotFound
from tandem.volume import replace_file, volume_errors

SPEC_FILE = "job.json"


def share_inputs(store: ObjectStore, run: Path) -> None:
    """Upload what the run directory `run` begins with; without its spec, which comes last, it is absent."""
    for file in sorted((run / "weights").glob("*")):
        store.upload(f"runs/{run.name}/weights/{file.name}", file)
    store.put(f"runs/{run.name}/{SPEC_FILE}", (run / SPEC_FILE).read_bytes())


def bring_inputs(store: ObjectStore, run: Path) -> None:
    """Have in the run directory `run` what the run begins with; raise RunNotFound where the store has no such run."""
    spec = store.get(f"runs/{run.name}/{SPEC_FILE}")
    if spec is None:
        raise RunNotFound(f"run {run.name} is neither on this volume nor in {store.address}")
    with volume_errors(run):
        (run / "weights").mkdir(parents=True, exist_ok=True)
        for name in store.sizes(f"runs/{run.name}/weights"):
            store.download(name, run / "weights" / name.rpartition("/")[2])
        replace_file(run / SPEC_FILE, spec)
