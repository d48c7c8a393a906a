"""An engine, the images, and a project that is up with data and models in it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from base_images import make_base_images
from brokers import free_port
from compose_project import SERVICES, Project, current_compose, old_compose
from engine import Engine, engine_for_tests
from samples import write_sentences, write_shapes


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short path on a disk: pytest's own may be too long for a socket, and in memory."""
    path = Path(os.environ.get("TMPDIR", "/var/tmp"), f"tandem-test-{secrets.token_hex(4)}")
    path.mkdir(mode=0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def engine(place: Path) -> Iterator[Engine]:
    (place / "engine").mkdir()
    with engine_for_tests(place / "engine") as engine:
        yield engine


@pytest.fixture(scope="module")
def built(engine: Engine, place: Path) -> Iterator[Project]:
    """The real images, and a project of them that is not up; the newest Compose there is has built them."""
    command = current_compose() or old_compose()
    if command is None:
        pytest.skip("no Compose is here: apt-get install docker-compose")
    tag = place.name.rpartition("-")[2]
    images = make_base_images(engine, place, tag)
    password, work = place / "secrets" / "redis_password", place / "work"
    password.parent.mkdir(mode=0o700)
    password.write_text(f"{secrets.token_hex(16)}\n")
    password.chmod(0o444)
    write_shapes(work / "shapes")
    write_sentences(work / "text.txt")
    variables = {
        **images.variables,
        "TANDEM_RUNTIME": "runc",
        "TANDEM_TAG": tag,
        "TANDEM_REDIS_PASSWORD_FILE": str(password),
        "TANDEM_SECRETS": str(password.parent),
        "TANDEM_WORK": str(work),
        # What a file's owner would see from another host must not reach this one's.
        "TANDEM_PUBLIC_ADDRESS": "127.0.0.1",
        **{name: str(free_port()) for name in _PORTS},
    }
    project = Project(engine, command, f"tandem-test-{tag}", variables)
    try:
        # One first: side by side they would each pack the layer that they share, of 6 GB.
        project.compose("build", "trainer")
        project.compose("build")
        yield project
    finally:
        project.compose("--profile", "metrics", "down", "--volumes", "--timeout", "1", code=None)
        ours = [f"tandem-{image}:{tag}" for image in ("trainer", "inference", "cli")]
        engine.run("rmi", "--force", *ours, images.prometheus, images.system)


_PORTS = ("TANDEM_PORT", "TANDEM_TENSORBOARD_PORT", "TANDEM_PROMETHEUS_PORT", "TANDEM_PUBLIC_PORT")


@pytest.fixture(scope="module")
def project(built: Project) -> Project:
    """The project, up."""
    built.compose("up", "--detach")
    built.wait_until_healthy(*SERVICES)
    return built


@pytest.fixture(scope="module")
def trained(project: Project) -> Project:
    """The project with data, two classifiers and a language model in it, by the command line in its container."""
    project.cli("data", "prepare", "image-folder", "--source", "shapes", "--name", "shapes")
    project.cli("data", "prepare", "text", "--source", "text.txt", "--name", "words")
    for arch, name in (("resnet18", "a"), ("squeezenet1_1", "b")):
        options = ("--arch", arch, "--data", "shapes", "--epochs", "1", "--batch-size", "16", "--name", name)
        project.cli("train", "classifier", *options)
    project.cli("train", "lm", "--model", "LSTM", "--data", "words", "--epochs", "1", "--name", "lm", *LM, "--follow")
    assert {run["state"] for run in project.json("runs", "list")} == {"SUCCEEDED"}
    return project


LM = ("--emsize", "16", "--nhid", "16", "--bptt", "8", "--batch-size", "4")
