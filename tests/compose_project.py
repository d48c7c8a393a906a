"""The real compose.yaml on an engine, by either generation of Compose, as a person would use it."""

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine import Engine
from waiting import PATIENCE_S

ROOT = Path(__file__).parents[1]
OVERRIDE = ROOT / "tests" / "compose" / "host_network.yaml"
SERVICES = ("redis", "trainer", "inference", "tensorboard")


def current_compose() -> list[str] | None:
    """Return the command of Compose 2 or later, None where it is not here."""
    done = subprocess.run(["docker", "compose", "version"], capture_output=True) if shutil.which("docker") else None
    return ["docker", "compose"] if done is not None and done.returncode == 0 else None


def old_compose() -> list[str] | None:
    """Return the command of docker-compose 1, None where it is not here."""
    path = shutil.which("docker-compose")
    if path is None:
        return None
    version = subprocess.run([path, "version", "--short"], capture_output=True, text=True).stdout
    return [path] if version.startswith("1.") else None


@dataclass
class Project:
    """A project of compose.yaml; `variables` are those of the file."""

    engine: Engine
    command: list[str]
    name: str
    variables: dict[str, str]
    files: tuple[Path, ...] = (ROOT / "compose.yaml", OVERRIDE)
    profiles: tuple[str, ...] = ("cli",)
    environment: dict[str, str] = field(default_factory=dict)

    def compose(self, *arguments: str, code: int | None = 0) -> "subprocess.CompletedProcess[str]":
        """Run a command of Compose, which is to exit with `code` (None: with any)."""
        options = [word for path in self.files for word in ("--file", str(path))]
        options += [word for profile in self.profiles for word in ("--profile", profile)]
        kept = {name: value for name, value in self.engine.environment.items() if not name.startswith("TANDEM_")}
        done = subprocess.run(
            [*self.command, "--project-name", self.name, "--project-directory", str(ROOT), *options, *arguments],
            env={**kept, **self.variables},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        said = f"{' '.join(arguments)} → {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert code is None or done.returncode == code, said
        return done

    def cli(self, *arguments: str, code: int = 0) -> str:
        """Run `docker compose run --rm cli …`; return what it printed."""
        done = self.compose("run", "--rm", "-T", "cli", *arguments, code=code)
        assert "Traceback" not in done.stderr
        return done.stdout if code == 0 else done.stderr.strip().splitlines()[-1]

    def json(self, *arguments: str) -> Any:
        return json.loads(self.cli(*arguments, "--json").splitlines()[-1])

    def container(self, service: str) -> dict[str, Any]:
        """Return what `docker inspect` says of the container of `service`."""
        labels = (f"com.docker.compose.project={self.name}", f"com.docker.compose.service={service}")
        # Those of 'run' are other ones of the same service.
        options = [
            word for label in (*labels, "com.docker.compose.oneoff=False") for word in ("--filter", f"label={label}")
        ]
        (found,) = self.engine.run("ps", "--all", "--quiet", *options).split()
        answer: list[dict[str, Any]] = json.loads(self.engine.run("inspect", found))
        return answer[0]

    def wait_until_healthy(self, *services: str) -> None:
        """Return when Docker calls them healthy; fail with their log."""
        deadline = time.monotonic() + PATIENCE_S
        for service in services:
            while self.health(service) != "healthy":
                assert time.monotonic() < deadline, f"{service}: {self.health(service)}\n{self.logs(service)}"
                time.sleep(0.3)

    def health(self, service: str) -> str:
        state = self.container(service)["State"]
        # A container that has ended keeps the health it had.
        return str(state["Health"]["Status"]) if state["Running"] else str(state["Status"])

    def logs(self, service: str) -> str:
        return self.compose("logs", service, code=None).stdout[-3000:]

    def pids(self, service: str) -> list[int]:
        """Return the host's ids of the processes of a container, that of its init first."""
        lines = self.engine.run("top", self.container(service)["Id"], "-eo", "pid").splitlines()[1:]
        first = self.container(service)["State"]["Pid"]
        return sorted((int(line) for line in lines), key=lambda pid: pid != first)

    def kill(self, service: str) -> None:
        """Kill a container's first process, and with it all others: not by Docker, which would call it wanted."""
        before = self.container(service)["State"]["StartedAt"]
        os.kill(self.container(service)["State"]["Pid"], 9)
        deadline = time.monotonic() + PATIENCE_S
        while self.container(service)["State"]["StartedAt"] == before:
            assert time.monotonic() < deadline, f"{service} was not started again"
            time.sleep(0.2)
