"""The heartbeat: a file that is young while the worker lives, also while the broker does not."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from services.trainer.health import Heartbeat, check
from tandem.errors import BrokerUnavailable, Unavailable
from tandem.settings import Settings, heartbeat_file


@dataclass
class Worker:
    """A worker whose clock, loop and broker the test holds."""

    path: Path
    now: float = 1000.0
    has_broker: bool = True
    heartbeat: Heartbeat = field(init=False)

    def __post_init__(self) -> None:
        self.heartbeat = Heartbeat(self.path, self.ping, lambda: self.now)

    def ping(self) -> None:
        if not self.has_broker:
            raise BrokerUnavailable("away")

    def beats(self, seconds: float, turns: bool) -> bool:
        """Let time pass, the loop turning or not; return whether the last beat touched the file."""
        until = self.now + seconds
        touched = False
        while self.now < until:
            self.now += 2.0
            if turns:
                self.heartbeat.loop_turned()
            self.path.unlink(missing_ok=True)
            self.heartbeat.beat()
            touched = self.path.exists()
        return touched


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(tmp_path / "heartbeat")


def test_a_loop_that_turns_beats_and_one_that_hangs_does_not(worker: Worker) -> None:
    assert worker.beats(60, turns=True)
    assert worker.beats(4, turns=False), "one turn may be late"
    assert not worker.beats(4, turns=False)
    assert worker.beats(2, turns=True)


def test_a_broker_that_is_away_stops_no_heart(worker: Worker) -> None:
    worker.beats(10, turns=True)
    worker.has_broker = False
    assert worker.beats(3600, turns=False)
    worker.has_broker = True
    assert worker.beats(40, turns=False), "Celery has not tried again yet"
    assert not worker.beats(30, turns=False), "and now it hangs"


def test_a_loop_that_turns_needs_no_broker(worker: Worker) -> None:
    worker.has_broker = False
    assert worker.beats(120, turns=True)


def test_a_worker_that_never_turned_has_no_heart(worker: Worker) -> None:
    assert not worker.beats(10, turns=False)


def test_a_beat_makes_an_old_file_young(worker: Worker) -> None:
    worker.path.write_bytes(b"")
    os.utime(worker.path, (0, 0))
    worker.heartbeat.loop_turned()
    worker.heartbeat.beat()
    assert abs(worker.path.stat().st_mtime - time.time()) < 5


def test_no_link_is_followed_and_a_file_that_can_not_be_is_said_once(
    worker: Worker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "other"
    worker.path.symlink_to(other)
    for _ in range(3):
        worker.heartbeat.loop_turned()
        worker.heartbeat.beat()
    assert not other.exists()
    (record,) = caplog.records
    assert "set TANDEM_HEARTBEAT_FILE" in record.getMessage()


@pytest.mark.parametrize(
    ("age_s", "says"),
    [(0, None), (28, None), (32, r"was 32 s ago, 30 s are allowed"), (-3600, r"was 3600 s ago")],
)
def test_the_check_looks_at_the_age(tmp_path: Path, age_s: float, says: str | None) -> None:
    path = tmp_path / "heartbeat"
    path.write_bytes(b"")
    os.utime(path, (time.time() - age_s,) * 2)
    if says is None:
        check(path)
    else:
        with pytest.raises(Unavailable, match=says):
            check(path)


def run_check(path: Path, code: str = "from services.trainer.health import main; main()") -> tuple[int, str, str]:
    # A variable of no concern to it is wrong.
    environment = {**os.environ, "TANDEM_HEARTBEAT_FILE": str(path), "TANDEM_LEASE_S": "soon"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    return ended.returncode, ended.stdout, ended.stderr


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    code, out, error = run_check(path)
    assert (code, out) == (1, "")
    assert error == (
        f"tandem trainer: no heartbeat at {path}: No such file or directory; "
        "is the worker up, with the same TANDEM_HEARTBEAT_FILE?\n"
    )
    path.write_bytes(b"")
    assert run_check(path) == (0, "", "")


def test_the_check_imports_nothing_slow(tmp_path: Path) -> None:
    path = tmp_path / "heartbeat"
    path.write_bytes(b"")
    slow = "{'torch', 'celery', 'kombu', 'redis', 'pydantic', 'prometheus_client', 'tempfile'}"
    code = f"import sys; from services.trainer.health import main; main(); print({slow} & set(sys.modules))"
    assert run_check(path, code) == (0, "set()\n", "")


def test_the_file_lies_in_the_temporary_directory_by_default() -> None:
    assert heartbeat_file({}) == Path("/tmp/tandem-worker.heartbeat")
    assert Settings.from_environment({"TMPDIR": "/var/tmp"}).heartbeat_file == Path("/var/tmp/tandem-worker.heartbeat")
    assert heartbeat_file({"TANDEM_HEARTBEAT_FILE": "/run/beat", "TMPDIR": "/var/tmp"}) == Path("/run/beat")
