"""Checkpoint directories: written whole or not at all, verified by their manifest when read. Free of torch.

    runs/<run_id>/checkpoints/step-00001234/
        model.safetensors  model.json  [network.json  vocabulary.json]  trainer_state.safetensors
        manifest.json      {"format_version": 1, "files": {name: {"size": bytes, "sha256": hex}}}

Order of a save: temporary directory, each file fsynced, manifest, directory fsynced, renamed, parent fsynced. Only then
do pointers (`latest.json`, `best.json`) move.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tandem.errors import CheckpointCorrupt
from tandem.volume import fsync_directory, replace_json, to_json, volume_errors, write_durably

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
VOCABULARY_FILE = "vocabulary.json"
NETWORK_FILE = "network.json"
_STEP = re.compile(r"step-(\d{8,})")


def step_directory(run: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies in the run directory `run`."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint directory's name; raise CheckpointCorrupt if it has none."""
    match = _STEP.fullmatch(checkpoint.name)
    if match is None:
        raise CheckpointCorrupt(f"{checkpoint.name!r} is not the name of a checkpoint")
    return int(match[1])


def write_checkpoint(checkpoint: Path, files: Mapping[str, bytes]) -> str:
    """Write `files` as the checkpoint directory `checkpoint`; return the SHA-256 of its manifest.

    One of that name that is there already (an attempt that was stopped before it evaluated its last epoch left it) is
    replaced once the new one is whole. Raises VolumeUnavailable (full, read-only); then nothing is left behind.
    """
    temporary = checkpoint.with_name(f".tmp-{checkpoint.name}")
    with volume_errors(checkpoint):
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        try:
            _write_files(temporary, files)
            _move_into_place(temporary, checkpoint)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return manifest_digest(checkpoint)


def _move_into_place(temporary: Path, checkpoint: Path) -> None:
    # A directory can't be renamed over another: between the two renames the checkpoint is absent, never half there.
    old = checkpoint.with_name(f".old-{checkpoint.name}")
    _remove(old)
    if checkpoint.exists():
        checkpoint.rename(old)
    temporary.rename(checkpoint)
    fsync_directory(checkpoint.parent)
    _remove(old)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def remove_checkpoints(run: Path, keep: Collection[Path]) -> None:
    """Remove the checkpoints of a run that are not in `keep`, oldest first, and what a killed save left behind.

    A checkpoint is renamed before its files go, so that no reader finds a part of it under its name.
    """
    for checkpoint in list_checkpoints(run):
        if checkpoint not in keep:
            doomed = checkpoint.with_name(f".old-{checkpoint.name}")
            _remove(doomed)
            checkpoint.rename(doomed)
    for leftover in (*(run / "checkpoints").glob(".old-*"), *(run / "checkpoints").glob(".tmp-*")):
        shutil.rmtree(leftover)


def _write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    directory.mkdir()
    for name, data in files.items():
        write_durably(directory / name, data)
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    write_durably(directory / MANIFEST_FILE, to_json({"format_version": 1, "files": entries}))
    fsync_directory(directory)


def manifest_digest(checkpoint: Path) -> str:
    """Return the SHA-256 of the manifest, which stands for every byte of the checkpoint."""
    return hashlib.sha256((checkpoint / MANIFEST_FILE).read_bytes()).hexdigest()


def read_verified(
    checkpoint: Path, names: tuple[str, ...] | None = None, digest: str | None = None
) -> dict[str, bytes]:
    """Return the files `names` (None: all) of a checkpoint after checking them against its manifest.

    The bytes returned are the bytes that were hashed. `digest` is the manifest's own SHA-256, where the caller knows
    it. Raises CheckpointCorrupt naming the first file that is missing, cut short or altered.
    """
    entries = _read_manifest(checkpoint, digest)
    wanted = names if names is not None else tuple(entries)
    return {name: _read_file(checkpoint, name, entries) for name in wanted if name in entries or _must_have(name)}


def _must_have(name: str) -> bool:
    # A classifier has no vocabulary, an older checkpoint no table of layers; all else that is asked for must be there.
    return name not in (VOCABULARY_FILE, NETWORK_FILE)


def _read_manifest(checkpoint: Path, digest: str | None) -> dict[str, Any]:
    try:
        data = (checkpoint / MANIFEST_FILE).read_bytes()
        document = json.loads(data)
        entries = document["files"] if document["format_version"] == 1 else None
        if not isinstance(entries, dict):
            raise TypeError("files")
    except FileNotFoundError:
        raise CheckpointCorrupt(f"{checkpoint} is no checkpoint: it has no {MANIFEST_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{checkpoint / MANIFEST_FILE} can't be read as a manifest of format 1") from error
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointCorrupt(f"{checkpoint / MANIFEST_FILE} is not the one that was registered")
    return entries


def _read_file(checkpoint: Path, name: str, entries: dict[str, Any]) -> bytes:
    path = checkpoint / name
    if name not in entries:
        raise CheckpointCorrupt(f"the manifest of {checkpoint} lists no {name}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointCorrupt(f"{path} can't be read: {error.strerror}") from error
    entry = entries[name]
    if len(data) != entry["size"]:
        raise CheckpointCorrupt(f"{path} has {len(data)} bytes; its manifest says {entry['size']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointCorrupt(f"{path} is altered: its SHA-256 is not the manifest's")
    return data


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, oldest first, unverified."""
    directory = run / "checkpoints"
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if _STEP.fullmatch(path.name)), key=step_of)


def write_pointer(run: Path, name: str, checkpoint: Path, metrics: Mapping[str, float]) -> None:
    """Point `<name>.json` of the run (`latest`, `best`) at `checkpoint`, atomically."""
    document = {"checkpoint": checkpoint.name, "step": step_of(checkpoint), "metrics": dict(metrics)}
    with volume_errors(run):
        replace_json(run / f"{name}.json", document)


def read_pointer(run: Path, name: str) -> Path | None:
    """Return the checkpoint that `<name>.json` of the run points at, None where there is no such pointer."""
    try:
        document = json.loads((run / f"{name}.json").read_bytes())
        checkpoint = run / "checkpoints" / str(document["checkpoint"])
        step_of(checkpoint)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointCorrupt(f"{run / name}.json can't be read") from error
    return checkpoint
