"""Checkpoint directories: written whole or not at all, verified by their manifest when read. Free of torch.

    runs/<run_id>/checkpoints/step-00001234/
        model.safetensors  model.json  [network.json  vocabulary.json]  trainer_state.safetensors
        manifest.json      {"format_version": 1, "files": {name: {"size": bytes, "sha256": hex}}}

Order of a save: temporary directory (`.tmp-`), files and manifest, all fsynced with it, renamed, parent fsynced.
Only then do pointers (`latest.json`, `best.json`) move. A checkpoint that is replaced stands aside meanwhile (`.old-`);
one that is removed loses its name first (`.gone-`).
"""

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tandem.errors import CheckpointCorrupt
from tandem.volume import fsync_directory, replace_json, to_json, volume_errors, write_together

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
VOCABULARY_FILE = "vocabulary.json"
NETWORK_FILE = "network.json"
_STEP = re.compile(r"step-(\d{8,})")

# Size and SHA-256 of each file.
Entries = dict[str, tuple[int, str]]


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
    with staged_checkpoint(checkpoint, files) as staged:
        place_checkpoint(staged, checkpoint)
    return manifest_digest(checkpoint)


@contextmanager
def staged_checkpoint(checkpoint: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Write `files` beside the place of `checkpoint`, for `place_checkpoint`; gone again if the block fails.

    That is what takes time. The name is nobody else's, so that an attempt that is over, and does not know, spoils
    nothing of the next one's.
    """
    temporary = checkpoint.with_name(f".tmp-{checkpoint.name}.{secrets.token_hex(4)}")
    with volume_errors(checkpoint):
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_files(temporary, files)
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def place_checkpoint(temporary: Path, checkpoint: Path) -> None:
    """Move what was staged to its place, durably."""
    # A directory can't be renamed over another: between the two renames the checkpoint is absent, never half there.
    old = checkpoint.with_name(f".old-{checkpoint.name}")
    _remove(old)
    if checkpoint.exists():
        checkpoint.rename(old)
    try:
        temporary.rename(checkpoint)
    except OSError:
        if old.exists():
            old.rename(checkpoint)
        raise
    fsync_directory(checkpoint.parent)
    _remove(old)


def _remove(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)


def remove_checkpoints(checkpoints: Iterable[Path]) -> None:
    """Remove checkpoints, each renamed before its files go, so that no reader finds a part of it under its name."""
    for checkpoint in checkpoints:
        doomed = checkpoint.with_name(f".gone-{checkpoint.name}")
        with volume_errors(checkpoint):
            _remove(doomed)
            checkpoint.rename(doomed)
            shutil.rmtree(doomed)


def clear_leftovers(run: Path) -> None:
    """Remove what killed saves left behind; a checkpoint that stood aside for one that never came goes back."""
    directory = run / "checkpoints"
    with volume_errors(directory):
        for old in directory.glob(".old-*"):
            place = old.with_name(old.name.removeprefix(".old-"))
            if not place.exists() and _is_whole(old):
                old.rename(place)
        for pattern in (".tmp-*", ".old-*", ".gone-*"):
            for leftover in directory.glob(pattern):
                shutil.rmtree(leftover)
        for pattern in (".latest.json.*", ".best.json.*"):
            for pointer in run.glob(pattern):
                pointer.unlink()


def _is_whole(checkpoint: Path) -> bool:
    try:
        verify(checkpoint)
    except CheckpointCorrupt:
        return False
    return True


def _write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    directory.mkdir()
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest = to_json({"format_version": 1, "files": entries})
    write_together(directory, {**files, MANIFEST_FILE: manifest})


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


def _read_manifest(checkpoint: Path, digest: str | None) -> Entries:
    path = checkpoint / MANIFEST_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointCorrupt(f"{checkpoint} is no checkpoint: it has no {MANIFEST_FILE}") from None
    except OSError as error:
        raise CheckpointCorrupt(f"{path} can't be read as a manifest of format 1") from error
    entries = parse_manifest(data, path)
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointCorrupt(f"{path} is not the one that was registered")
    return entries


def parse_manifest(data: bytes, path: Path) -> Entries:
    """Return size and SHA-256 of each file; raise CheckpointCorrupt naming `path` if `data` is no manifest."""
    try:
        document = json.loads(data)
        # Without its final newline it has been cut short, and only happens to say the same.
        if document["format_version"] != 1 or not document["files"] or not data.endswith(b"\n"):
            raise ValueError("format")
        entries = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in document["files"].items()}
        # A name is no way out of the directory.
        if any("/" in name or name in ("", ".", "..") for name in entries):
            raise ValueError("name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorrupt(f"{path} can't be read as a manifest of format 1") from error
    return entries


def _read_file(checkpoint: Path, name: str, entries: Entries) -> bytes:
    path = checkpoint / name
    if name not in entries:
        raise CheckpointCorrupt(f"the manifest of {checkpoint} lists no {name}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointCorrupt(f"{path} can't be read: {error.strerror}") from error
    _check_file(path, len(data), hashlib.sha256(data).hexdigest(), entries[name])
    return data


def _check_file(path: Path, num_bytes: int, sha256: str, entry: tuple[int, str]) -> None:
    if num_bytes != entry[0]:
        raise CheckpointCorrupt(f"{path} has {num_bytes} bytes; its manifest says {entry[0]}")
    if sha256 != entry[1]:
        raise CheckpointCorrupt(f"{path} is altered: its SHA-256 is not the manifest's")


def verify(checkpoint: Path) -> str:
    """Check every file of a checkpoint, a piece at a time in memory; return the SHA-256 of its manifest.

    Raises CheckpointCorrupt naming the first file that is missing, cut short or altered.
    """
    for name, entry in _read_manifest(checkpoint, None).items():
        path = checkpoint / name
        try:
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                num_bytes = file.tell()
        except OSError as error:
            raise CheckpointCorrupt(f"{path} can't be read: {error.strerror}") from error
        _check_file(path, num_bytes, sha256, entry)
    return manifest_digest(checkpoint)


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
