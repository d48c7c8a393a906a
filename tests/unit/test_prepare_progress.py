import sys

import pytest

from tandem.cli import progress as module
from tandem.cli.progress import BarProgress


def test_lines_come_every_few_seconds_and_not_at_all_for_quick_work(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = [0.0]
    lines = module._Lines(clock=lambda: now[0])
    lines.start("preparing images", 2000)
    for _ in range(20):
        now[0] += 0.6
        lines.advance(100)
    lines.start("looking", None)
    now[0] += 5
    lines.start("writing", None)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "preparing images: 900 of 2,000 (45%)",
        "preparing images: 1,800 of 2,000 (90%)",
        "writing …",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with BarProgress() as progress:
        progress.start("looking", None)
        progress.start("preparing images", 10)
        progress.advance(10)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "preparing images" in captured.err
    assert "10/10" in captured.err
