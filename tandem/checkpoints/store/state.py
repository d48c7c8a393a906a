"""From the changes of a model to its files on the volume, which is what everything else reads."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tandem.checkpoints.store.journal import ModelState
from tandem.checkpoints.version import Version, read_version, version_path, write_version
from tandem.errors import CheckpointCorrupt, Conflict
from tandem.volume import replace_file, to_json

IsHere = Callable[[Version], bool]


def everything(_: Version) -> bool:
    """Have every version shown, whether its checkpoint is on this volume or not."""
    return True


def write_state(directory: Path, state: ModelState, is_here: IsHere = everything) -> bool:
    """Have the model's directory say what `state` does; return whether anything had to be written.

    Versions are shown where `is_here`. An alias whose version is not stays where it was, so that what was served goes
    on being served. Raises Conflict where the directory has another checkpoint under a number of `state`.
    """
    shown = {number: version for number, version in state.versions.items() if is_here(version)}
    missing = [version for number, version in shown.items() if not _has(directory, version)]
    (directory / "versions").mkdir(parents=True, exist_ok=True)
    for version in missing:
        write_version(directory, version)
    # The history last, which nobody follows; each file is replaced whole, so that a kill in between does no harm.
    aliases = _replace(directory / "aliases.json", to_json(_aliases(directory, state.aliases, shown)))
    history = "".join(json.dumps(line) + "\n" for line in state.history).encode()
    return _replace(directory / "history.jsonl", history) or aliases or bool(missing)


def check_common(directory: Path, state: ModelState) -> None:
    """Raise Conflict if the directory has a version that `state` has not: it was published without the store."""
    for path in sorted((directory / "versions").glob("[0-9]*.json")):
        if int(path.stem) not in state.versions:
            raise _conflict(directory, int(path.stem))
        _has(directory, state.versions[int(path.stem)])


def _has(directory: Path, version: Version) -> bool:
    path = version_path(directory, version.version)
    if not path.exists():
        return False
    try:
        there = read_version(path)
    except CheckpointCorrupt:
        return False
    if there != version:
        raise _conflict(directory, version.version)
    return True


def _conflict(directory: Path, number: int) -> Conflict:
    return Conflict(
        f"{directory.name}:{number} on this volume is not that of the object store, which was published elsewhere: "
        f"train under another --name, or move {directory} away"
    )


def _aliases(directory: Path, wanted: Mapping[str, int], shown: Mapping[int, Version]) -> dict[str, int]:
    try:
        before = json.loads((directory / "aliases.json").read_bytes())
    except (OSError, ValueError):
        before = {}
    found = {alias: number if number in shown else before.get(alias) for alias, number in wanted.items()}
    return {alias: number for alias, number in found.items() if number in shown}


def _replace(path: Path, data: bytes) -> bool:
    if path.exists() and path.read_bytes() == data:
        return False
    replace_file(path, data)
    return True
