"""Claims of durable jobs, on 2 CPU cores with the settings that users have (lease 5 s):

- cancel to CANCELED with a checkpoint: p95 < 2 s for a small model
- SIGKILL of a worker to stepping again on another: p95 < 10 s
- submit to the first step on a warm worker: < 4 s
- a supervisor costs < 1 % of a core
- 10,000 queued jobs: submit >= 500/s, `tandem runs list` < 1 s, none lost over a SIGKILL of the broker
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.plant import Plant, children, cpu_s, plant, wait_for
from services.trainer.reaper import Reaper
from tandem.checkpoints.files import list_checkpoints, read_verified
from tandem.jobs.queue import send_run
from tandem.jobs.record import State
from tandem.jobs.runs import cancel
from tandem.jobs.scheduling import Scheduling
from tandem.jobs.submit import submit, submit_all

N = 20
NUM_QUEUED = 10_000
COST_S = 60.0


def main() -> None:
    """Print the figures."""
    print(f"| from, to | median s | p95 s | max s | n = {N} |\n|---|---|---|---|---|")
    with plant() as made:
        made.start_worker()
        _first_steps(made)
        _print("cancel → CANCELED, with a checkpoint", [_cancel(made) for _ in range(N)])
    with plant() as made:
        made.start_worker()
        made.start_worker()
        _print("SIGKILL of the worker → a step on another", [_take_over(made) for _ in range(N)])
    _print_cost()
    _print_queue()


def _print(name: str, times: list[float]) -> None:
    ordered = sorted(times)
    p95 = ordered[max(0, round(0.95 * len(ordered)) - 1)]
    print(f"| {name} | {statistics.median(times):.2f} | {p95:.2f} | {ordered[-1]:.2f} | |", flush=True)


def _first_steps(made: Plant) -> None:
    """Print the time from submit to the first step, and what it consists of."""
    rows = [_first_step(made) for _ in range(N)]
    names = ("submit itself", "→ the attempt's process is told", "→ ready to step", "→ first step is done")
    _print("submit → first step, all", [sum(row) for row in rows])
    for number, name in enumerate(names):
        _print(f"&nbsp; {name}", [row[number] for row in rows])


def _first_step(made: Plant) -> tuple[float, ...]:
    began = time.time()
    run_id = made.submit()
    submitted = time.time()
    run = made.volume.run(run_id)
    told = wait_for((run / "process.json").exists)
    wait_for(lambda: _events(run, "progress"))
    ready, first = (float(_events(run, kind)[0]["at"]) for kind in ("started", "progress"))
    times = (submitted - began, told - submitted, ready - told, first - ready)
    cancel(run_id, made.volume, made.store)
    wait_for(lambda: made.record(run_id).state is State.CANCELED)
    # The next process has to be ready, as when somebody submits now and then.
    made.await_spares()
    return times


def _events(run: Path, kind: str) -> list[dict[str, float]]:
    try:
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines() if line.endswith("}")]
    except FileNotFoundError:
        return []
    return [event for event in events if event["type"] == kind]


def _cancel(made: Plant) -> float:
    run_id = made.submit()
    wait_for(lambda: made.record(run_id).progress.step > 20)
    before = made.record(run_id).progress.step
    began = time.time()
    cancel(run_id, made.volume, made.store)
    ended = wait_for(lambda: made.record(run_id).state is State.CANCELED)
    newest = list_checkpoints(made.volume.run(run_id))[-1]
    read_verified(newest)
    assert int(newest.name.removeprefix("step-")) >= before
    return ended - began


def _take_over(made: Plant) -> float:
    run_id = made.submit()
    wait_for(lambda: made.record(run_id).saved_step > 0)
    holder = int((made.store.lease(run_id) or "").split("/")[1])
    worker = next(each for each in made.processes if each.poll() is None and holder in children(each.pid))
    began = time.time()
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    wait_for(lambda: made.record(run_id).attempt == 2 and _steps_of_second(made, run_id))
    took = time.time() - began
    cancel(run_id, made.volume, made.store)
    wait_for(lambda: made.record(run_id).state is State.CANCELED)
    made.start_worker()
    made.await_spares()
    return took


def _steps_of_second(made: Plant, run_id: str) -> bool:
    return any(event.get("attempt") == 2 for event in _events(made.volume.run(run_id), "progress"))


def _print_cost() -> None:
    with plant() as made:
        worker = made.start_worker()
        run_id = made.submit()
        wait_for(lambda: made.record(run_id).progress.step > 20)
        (child,) = (each for each in children(worker.pid) if children(each))
        before, began = (cpu_s(child), cpu_s(worker.pid)), time.monotonic()
        time.sleep(COST_S)
        after, spent = (cpu_s(child), cpu_s(worker.pid)), time.monotonic() - began
        shares = [100 * (late - early) / spent for early, late in zip(before, after, strict=True)]
        print(
            f"\nA supervisor costs {shares[0]:.2f} % of a core while its run computes, "
            f"the worker's parent {shares[1]:.2f} %"
        )
        print(f"(over {spent:.0f} s, n = 1).", flush=True)


def _print_queue() -> None:
    with plant() as made:
        one_by_one = _rate(lambda: [made.submit() for _ in range(1000)], 1000)
        jobs = [(made.spec(seed=number), Scheduling()) for number in range(NUM_QUEUED - 1000)]
        at_once = _rate(lambda: submit_all(jobs, made.volume, made.store, made.app), len(jobs))
        print(f"\nSubmitted one after another: {one_by_one:.0f} jobs/s (n = 1000); as a sweep is: {at_once:.0f} jobs/s")
        environment = {**os.environ, "TANDEM_HOME": str(made.volume.home), "TANDEM_REDIS_URL": made.url}
        for options in ((), ("--all", "--json")):
            times = [_list(environment, options) for _ in range(N)]
            command = " ".join(("tandem runs list", *options))
            print(f"`{command}` with {NUM_QUEUED:,}: {statistics.median(times):.2f} s (n = {N})")
        submit(made.spec(seed=-1 % 2**31), made.volume, made.store, made.app)
        made.restart_broker()
        reaper = Reaper(made.store, made.volume, 5.0, lambda record: send_run(made.app, record))
        began = time.monotonic()
        reaper.sweep()
        took = time.monotonic() - began
        there = made.store.count_by_state()["QUEUED"]
        print(f"After SIGKILL of the broker {there:,} of {NUM_QUEUED + 1:,} are queued; its sweep took {took:.2f} s")
        times = [_timed(reaper.sweep) for _ in range(N)]
        print(f"A reaper's sweep over them: {1000 * statistics.median(times):.0f} ms (n = {N})", flush=True)


def _rate(action: Callable[[], object], count: int) -> float:
    return count / _timed(action)


def _timed(action: Callable[[], object]) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


def _list(environment: dict[str, str], options: tuple[str, ...]) -> float:
    command = [str(Path(sys.executable).with_name("tandem")), "runs", "list", *options]
    return _timed(lambda: subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL))


if __name__ == "__main__":
    main()
