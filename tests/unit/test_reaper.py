"""The reaper, by a clock of its own: those of other hosts may be hours ahead or behind, and Redis' may jump."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from factories import queued_record
from fake_store import FakeStore

from services.trainer.holder import Holder
from services.trainer.reaper import Reaper
from tandem.errors import Superseded
from tandem.jobs import record as machine
from tandem.jobs.failures import Failure
from tandem.jobs.fence import Fence
from tandem.jobs.record import State
from tandem.jobs.runs import mirror
from tandem.volume import Volume

LEASE_S = 5.0


class Setting:
    """One run, and a reaper that looks at it each second."""

    def __init__(self, home: Path, **changes: Any) -> None:
        self.volume, self.store = Volume(home), FakeStore()
        self.record = queued_record("r", **changes)
        self.volume.run("r").mkdir(parents=True)
        mirror(self.volume, self.record)
        self.store.create(self.record)
        store: Any = self.store
        self.reaper = Reaper(store, self.volume, LEASE_S, self.store.send, clock=lambda: self.store.now)

    def after(self, seconds: int) -> list[str]:
        """Return the messages there are when so many seconds have gone by."""
        for _ in range(seconds):
            self.store.now += 1.0
            self.reaper.sweep()
        return self.store.queue

    def start(self) -> None:
        self.record = self.store.update("r", machine.start)


@pytest.mark.parametrize("at", ["2001-01-01T00:00:00.000Z", "2101-01-01T00:00:00.000Z"])
def test_a_waiting_run_without_a_message_is_sent_again_whatever_the_clock_of_its_host_says(
    at: str, tmp_path: Path
) -> None:
    setting = Setting(tmp_path, submitted_at=at, updated_at=at)
    assert setting.after(9) == [], "its message may be on its way"
    assert setting.after(3) == ["r"]
    assert setting.after(30) == ["r"], "and once"


def test_a_run_whose_lease_has_lapsed_is_requeued(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.store.acquire_lease("r", "elsewhere/1/1/x", LEASE_S)
    setting.start()
    assert setting.after(5) == []
    assert setting.after(4) == ["r"]
    assert setting.store.records["r"].error is Failure.WORKER_LOST


def test_a_lease_that_comes_back_was_a_jump_of_the_brokers_clock(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.start()
    assert setting.after(1) == []
    setting.store.acquire_lease("r", "elsewhere/1/1/x", LEASE_S)
    assert setting.after(4) == []


def test_a_holder_that_died_on_this_machine_is_seen_at_once(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    process = subprocess.Popen(["sleep", "60"])
    setting.store.acquire_lease("r", Holder.of(process.pid).token() + "/x", 3600.0)
    setting.start()
    assert setting.after(1) == []
    process.kill()
    process.wait()
    assert setting.after(1) == ["r"]


def test_a_holder_that_lives_on_this_machine_is_left_alone(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.store.acquire_lease("r", Holder.of(os.getpid()).token() + "/x", 3600.0)
    setting.start()
    assert setting.after(30) == []


def test_after_a_restart_of_the_broker_holders_get_the_time_to_come_back(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.start()
    setting.store.restart()
    assert setting.after(10) == []
    assert setting.after(3) == ["r"]


def test_a_run_that_can_not_be_seen_to_keeps_no_other_waiting(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.store.missing = ["gone", "r"]
    setting.store.records["gone"] = machine.start(queued_record("gone"))
    setting.start()
    setting.after(9)
    assert setting.store.missing == [], "what is gone has no mirror to be brought up to date"
    assert "r" in setting.store.queue


def test_what_is_lost_is_fenced_off_though_nothing_follows_it(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.start()
    setting.store.update("r", machine.request_cancel)
    setting.after(9)
    assert setting.store.records["r"].state is State.CANCELED
    with pytest.raises(Superseded), Fence(setting.volume.run("r")).held(1):
        pass


def test_a_message_of_a_canceled_run_keeps_no_delayed_one_waiting(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.store.queue.append("canceled long ago")
    setting.start()
    setting.store.update("r", lambda record: machine.requeue(record, "full", Failure.VOLUME))
    setting.store.delay("r", "default", 3.0)
    assert setting.after(4) == ["canceled long ago", "r"]


def test_a_backoff_is_waited_for_and_its_end_wakes_once(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.start()
    after = setting.store.update("r", lambda record: machine.requeue(record, "full", Failure.VOLUME))
    assert after.delayed
    setting.store.delay("r", "default", 5.0)
    assert setting.after(4) == []
    assert setting.after(1) == ["r"]
    assert not setting.store.records["r"].delayed
    assert setting.after(5) == ["r"]


def test_a_broker_that_is_a_second_behind_gets_the_newer_record_from_the_volume(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    before = setting.record
    setting.start()
    done = setting.store.update("r", lambda record: machine.finish(record, 1))
    mirror(setting.volume, done)
    setting.store.records["r"] = before
    setting.store.restart()
    assert setting.after(1) == []
    assert setting.store.records["r"] == done


def test_a_broker_that_lost_everything_gets_the_unfinished_runs_back(tmp_path: Path) -> None:
    setting = Setting(tmp_path)
    setting.store.forget()
    assert setting.after(1) == []
    assert setting.store.records["r"] == setting.record
    assert setting.after(10) == ["r"]


def test_a_sweep_asks_for_no_lease_by_itself_while_all_are_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every worker sweeps once a second: what it asks for each run grows with the square of the fleet."""
    setting, asked = Setting(tmp_path), list[str]()
    setting.start()
    setting.store.acquire_lease("r", "elsewhere/1/1/x", 100.0)
    monkeypatch.setattr(setting.store, "lease", lambda run_id: asked.append(run_id))
    monkeypatch.setattr(setting.store, "held_leases", lambda run_ids: dict.fromkeys(run_ids, "elsewhere/1/1/x"))
    assert setting.after(5) == []
    assert asked == []
