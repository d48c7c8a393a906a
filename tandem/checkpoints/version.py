"""A version of a model as its file says it: models/<name>/versions/0003.json."""

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter

from tandem.errors import CheckpointCorrupt, InvalidName
from tandem.names import check_name
from tandem.volume import replace_json


@dataclass(frozen=True)
class Version:
    """A registered checkpoint; `checkpoint` is a path relative to the volume, `sha256` that of its manifest."""

    name: str
    version: int
    kind: str
    run_id: str
    checkpoint: str
    sha256: str
    metrics: dict[str, float]
    created_at: str

    __pydantic_config__ = ConfigDict(extra="forbid")


_VERSION = TypeAdapter(Version)


def version_path(directory: Path, number: int) -> Path:
    """Return the file of a version in a model's directory."""
    return directory / "versions" / f"{number:04d}.json"


def read_version(path: Path) -> Version:
    """Read the file of a version; raise CheckpointCorrupt if it is damaged."""
    try:
        version = _VERSION.validate_json(path.read_bytes(), strict=True)
        check_name(version.name, "model")
    except (OSError, ValueError, InvalidName) as error:
        raise CheckpointCorrupt(f"{path} can't be read as a model version") from error
    return version


def write_version(directory: Path, version: Version) -> None:
    """Write the file of a version, atomically."""
    replace_json(version_path(directory, version.version), asdict(version))
