"""A volume of the test's own, and a system that is up."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from shell import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "home")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A system that is up, for a module's tests."""
    shell = Shell(tmp_path_factory.mktemp("system") / "home")
    shell("up", "--detach", "--no-tensorboard")
    try:
        yield shell
    finally:
        shell("down")
