"""The `tandem` command as a person types it, on a volume of the test's own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Shell:
    """Runs `tandem` in a process of its own."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def full_environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
        return {**kept, "TANDEM_HOME": str(self.home), **self.environment}

    def popen(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "tandem", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.full_environment,
            start_new_session=True,
        )

    def __call__(self, *arguments: str, code: int = 0, timeout_s: float = 200.0) -> "subprocess.CompletedProcess[str]":
        process = self.popen(*arguments)
        out, err = process.communicate(timeout=timeout_s)
        assert process.returncode == code, f"tandem {' '.join(arguments)} → {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err, err
        return subprocess.CompletedProcess(arguments, code, out, err)

    def json(self, *arguments: str, timeout_s: float = 200.0) -> Any:
        return json.loads(self(*arguments, "--json", timeout_s=timeout_s).stdout.splitlines()[-1])

    def error(self, *arguments: str, code: int = 1) -> str:
        """Return the one line that the command ends with."""
        lines = self(*arguments, code=code).stderr.strip().splitlines()
        if code == 1:
            assert len(lines) == 1, lines
            assert lines[0].startswith("tandem: ")
        return lines[-1]
