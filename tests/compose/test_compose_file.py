"""compose.yaml as both generations of Compose read it; neither needs an engine for that."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_project import ROOT, current_compose, old_compose

FILES = {"plain": ("compose.yaml",), "tls": ("compose.yaml", "deploy/compose/tls.yaml")}
GENERATIONS = {"current": current_compose, "1.29.2": old_compose}


@pytest.fixture(params=GENERATIONS)
def command(request: pytest.FixtureRequest) -> list[str]:
    found = GENERATIONS[request.param]()
    if found is None:
        pytest.skip(f"Compose {request.param} is not here: .ci/run installs it on Debian")
    return found


def configured(command: list[str], files: tuple[str, ...], folder: Path, **variables: str) -> Any:
    """Return the project that Compose makes of the files; fail on any complaint."""
    # Where they lie, 1.29.2 misses no secret.
    for name in ("redis_password", "server.crt", "server.key", "tokens", "ca.crt", "token"):
        (folder / name).touch()
    options = [word for name in files for word in ("--file", str(ROOT / name))]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    secrets = {"TANDEM_REDIS_PASSWORD_FILE": str(folder / "redis_password"), "TANDEM_SECRETS": str(folder)}
    done = subprocess.run(
        [*command, *options, "--profile", "cli", "--profile", "metrics", "config"],
        env={**kept, **secrets, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_the_file_is_clean(command: list[str], files: tuple[str, ...], tmp_path: Path) -> None:
    services = configured(command, files, tmp_path)["services"]
    assert set(services) == {"redis", "trainer", "inference", "tensorboard", "cli", "prometheus", "grafana"}
    assert {services[name].get("runtime") for name in ("trainer", "inference", "cli")} == {"nvidia"}
    assert not any("runtime" in services[name] for name in ("redis", "tensorboard", "prometheus", "grafana"))


def test_one_variable_serves_a_host_without_a_gpu(command: list[str], tmp_path: Path) -> None:
    services = configured(command, FILES["plain"], tmp_path, TANDEM_RUNTIME="runc")["services"]
    assert {services[name]["runtime"] for name in ("trainer", "inference", "cli")} == {"runc"}


def test_every_service_is_closed_and_bounded(command: list[str], tmp_path: Path) -> None:
    for name, service in configured(command, FILES["plain"], tmp_path)["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] is True, name
        assert service["init"] is True, name
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}, name
