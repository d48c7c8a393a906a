"""Runs that wait for others: chains, sweeps, priorities, and a submission that is made twice."""

import json
import os
import signal

import pytest
from click.testing import CliRunner
from rig import LONG, Bench, answers
from waiting import wait_for

from tandem.cli.runs import runs
from tandem.cli.train import train
from tandem.errors import Conflict
from tandem.jobs.queue import make_celery
from tandem.jobs.runs import cancel, list_runs, resume
from tandem.jobs.store import connect

SMALL = ["--data", "words", "--model", "LSTM", "--emsize", "8", "--nhid", "8", "--batch-size", "4", "--bptt", "8"]
SMALL += ["--epochs", "1", "--num-threads", "1", "--name", "words"]


@pytest.fixture
def home(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TANDEM_HOME", str(bench.volume.home))
    monkeypatch.setenv("TANDEM_REDIS_URL", str(bench.url))
    return bench


def invoke(command: object, *arguments: str) -> str:
    result = CliRunner().invoke(command, list(arguments))  # type: ignore[arg-type]
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_an_evaluation_follows_its_training_through_a_restart_of_everything(home: Bench) -> None:
    worker = home.start_worker()
    values = [
        "--data",
        "words",
        "--model",
        "LSTM",
        "--emsize",
        "16",
        "--nhid",
        "16",
        "--batch-size",
        "4",
        "--bptt",
        "8",
    ]
    values += ["--epochs", "12", "--num-threads", "1", "--name", "words", "--evaluate", "test", "--json"]
    answer = json.loads(invoke(train, "lm", *values))
    trained, evaluated = answer["run_id"], answer["evaluation_run_id"]
    home.wait_for_step(trained, 10)
    assert home.record(evaluated).state == "WAITING"
    for process in (worker, home.broker):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    home.start_broker()
    wait_for(lambda: answers(home), "the broker")
    home.start_worker()
    done = home.wait_for_state(evaluated, "SUCCEEDED", "FAILED", "CANCELED")
    assert done.state == "SUCCEEDED", done.message
    assert home.record(trained).state == "SUCCEEDED"
    assert done.progress.metrics["ppl"] == pytest.approx(home.record(trained).progress.metrics["test_ppl"], rel=1e-3)


def test_what_waits_for_a_run_that_fails_is_canceled_and_can_be_resumed_with_it(home: Bench) -> None:
    first = home.language_model(**LONG)
    after = home.language_model(model_name="after", epochs=1, scheduling={"after": (first,)})
    cancel(first, home.volume, home.store)
    home.start_worker()
    record = home.wait_for_state(after, "CANCELED")
    assert record.message == f"run {first}, which it waited for, is CANCELED"
    app = make_celery(home.url)
    resume(first, home.volume, home.store, app)
    assert resume(after, home.volume, home.store, app).state == "WAITING"
    assert home.wait_for_state(after, "SUCCEEDED", "FAILED", "CANCELED").state == "SUCCEEDED"
    started = [home.record(run_id).started_at or "" for run_id in (first, after)]
    assert sorted(started) == started


def test_a_sweep_runs_so_many_at_a_time_and_ends_in_a_table(home: Bench) -> None:
    home.start_worker(TANDEM_SLOTS="2")
    home.start_worker()
    options = ["--sweep", "lr=0.002,0.01,0.05", "--sweep", "seed=1,2", "--max-parallel", "2", "--json"]
    answer = json.loads(invoke(train, "lm", *SMALL, *options))
    most = 0

    def has_ended() -> bool:
        nonlocal most
        records = list_runs(home.volume, lambda: home.store, sweep=answer["sweep"])
        most = max(most, sum(record.state in ("QUEUED", "RUNNING") for record in records))
        return all(record.state.is_terminal for record in records)

    wait_for(has_ended, "the end of the sweep")
    assert most == 2, "and no more, though there are three slots"
    rows = json.loads(invoke(runs, "list", "--sweep", answer["sweep"], "--json"))
    assert {row["state"] for row in rows} == {"SUCCEEDED"}
    assert sorted((row["varied"]["learning_rate"], row["varied"]["seed"]) for row in rows) == [
        (rate, seed) for rate in (0.002, 0.01, 0.05) for seed in (1, 2)
    ]
    table = invoke(runs, "list", "--sweep", answer["sweep"]).splitlines()
    losses = {row["run_id"]: row["metrics"]["val_loss"] for row in rows}
    assert [line.split()[-1] for line in table[1:]] == sorted(losses, key=lambda run_id: losses[run_id])


def test_a_sweep_goes_on_when_the_broker_has_lost_everything(home: Bench) -> None:
    answer = json.loads(invoke(train, "lm", *SMALL, "--sweep", "seed=1,2,3", "--max-parallel", "1", "--json"))
    home.start_worker()
    home.wait_for_state(answer["run_ids"][0], "SUCCEEDED")
    connect(home.url).flushall()
    for run_id in answer["run_ids"]:
        assert home.wait_for_state(run_id, "SUCCEEDED", "FAILED").state == "SUCCEEDED"


def test_the_higher_priority_goes_first(home: Bench) -> None:
    order = ["low", "normal", "high", "urgent"]
    run_ids = [home.language_model(model_name=name, epochs=1, scheduling={"priority": name}) for name in order]
    home.start_worker()
    started = [home.wait_for_state(run_id, "SUCCEEDED").started_at or "" for run_id in run_ids]
    assert sorted(started, reverse=True) == started


def test_a_repeated_submission_with_a_key_does_nothing(home: Bench) -> None:
    first = home.language_model(scheduling={"key": "nightly"})
    assert home.language_model(scheduling={"key": "nightly"}) == first
    assert len(list_runs(home.volume, lambda: None)) == 1
    with pytest.raises(Conflict, match=f"'nightly' was used for run {first}, which is another job"):
        home.language_model(epochs=3, scheduling={"key": "nightly"})
    assert len(list_runs(home.volume, lambda: None)) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sweep", "lr"], "--sweep lr: give an option of this command and its values"),
        (["--sweep", "colour=red,blue"], "--sweep colour=red,blue: give an option of this command"),
        (["--sweep", "lr=0.1,x"], "--learning-rate: Input should be a valid number"),
        (["--max-parallel", "2"], "--max-parallel is of a --sweep"),
        (["--sweep", "seed=1,2", "--key", "k"], "--key: a sweep is many runs"),
        (["--time-limit", "soon"], "'soon' is no duration"),
        (["--webhook", "ftp://x"], "--webhook: give an address that begins with http"),
        (["--after", "../x"], "../x"),
    ],
)
def test_what_makes_no_sense_is_refused(home: Bench, options: list[str], said: str) -> None:
    result = CliRunner().invoke(train, ["lm", *SMALL, *options])
    assert result.exit_code != 0
    assert said in (result.output + str(result.exception))
    assert not list_runs(home.volume, lambda: None)
