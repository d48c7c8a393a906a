"""The `tandem` command as a person types it, without a process of its own."""

import json
import sys
from typing import Any

import pytest

from tandem.cli.main import main


class Terminal:
    """Runs the command in this process, as the console script does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """Run `tandem ARGUMENTS`, which is to exit with `code`; return stdout, or the one line of a failure."""
        self._monkeypatch.setattr(sys, "argv", ["tandem", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = self._capsys.readouterr()
        assert caught.value.code == code, printed.err
        if code == 0:
            return printed.out
        if code == 1:
            assert printed.err.startswith("tandem: ")
            assert printed.err.count("\n") == 1
        return printed.err

    def json(self, *arguments: object) -> Any:
        return json.loads(self(*arguments, "--json"))
