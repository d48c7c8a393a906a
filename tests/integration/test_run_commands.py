"""`tandem runs` on real runs: cancel and remove, several at once, and a webhook at the end."""

import json

import pytest
from click.testing import CliRunner, Result
from receiver import receiver
from rig import Bench
from waiting import wait_for

from tandem.checkpoints.registry import Registry
from tandem.cli.runs import runs
from tandem.jobs.runs import cancel


@pytest.fixture
def home(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TANDEM_HOME", str(bench.volume.home))
    monkeypatch.setenv("TANDEM_REDIS_URL", str(bench.url))
    return bench


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(runs, list(arguments))


def test_several_runs_are_paused_resumed_and_canceled_at_once(home: Bench) -> None:
    names = [home.language_model(model_name=f"m{number}") for number in range(3)]
    said = invoke("pause", *names)
    assert said.output.splitlines() == [f"run {name} is PAUSED" for name in names]
    assert {row["state"] for row in json.loads(invoke("list", "--json").output)} == {"PAUSED"}
    assert json.loads(invoke("resume", names[0], "--json").output)["state"] == "QUEUED"
    said = invoke("cancel", *names, "--wait")
    assert said.output.splitlines() == [f"run {name} is CANCELED" for name in names]
    said = invoke("cancel", names[0])
    assert (said.exit_code, said.output) == (0, f"run {names[0]} is CANCELED\n"), "twice is once"
    assert "is CANCELED" in str(invoke("pause", names[0]).exception)
    assert invoke("cancel").exit_code == 2


def test_a_run_is_removed_when_nothing_needs_it(home: Bench) -> None:
    home.start_worker()
    needed = home.language_model(epochs=1)
    home.wait_for_state(needed, "SUCCEEDED")
    assert "needed by model words:1; --force" in str(invoke("remove", needed).exception)
    waiting = home.language_model(scheduling={"after": (needed,), "priority": "low"}, model_name="other", epochs=1)
    home.wait_for_state(waiting, "SUCCEEDED")
    canceled = home.language_model(epochs=500)
    home.wait_for_step(canceled, 10)
    assert "'tandem runs cancel' ends it first" in str(invoke("remove", canceled).exception)
    cancel(canceled, home.volume, home.store)
    home.wait_for_state(canceled, "CANCELED")
    assert invoke("remove", canceled).output == f"run {canceled} is removed\n"
    assert not home.volume.run(canceled).exists()
    assert canceled not in invoke("list").output
    assert "no run" in str(invoke("show", canceled).exception)
    assert invoke("remove", needed, "--force").exit_code == 0
    assert Registry(home.volume).names() == ["other", "words"], "the registry tells that its checkpoint is gone"


def test_the_webhook_hears_of_each_end_and_no_failure_of_it_touches_the_run(home: Bench) -> None:
    with receiver() as (address, got):
        canceled = home.language_model(scheduling={"webhook": f"{address}/ended"})
        cancel(canceled, home.volume, home.store)
        home.start_worker()
        wait_for(lambda: got, "the first webhook")
        assert (got[0][1]["run_id"], got[0][1]["state"]) == (canceled, "CANCELED"), "it ended before there was a worker"
        unheard = home.language_model(scheduling={"webhook": "http://127.0.0.1:9/nobody"}, epochs=1)
        heard = home.language_model(scheduling={"webhook": f"{address}/ended"}, epochs=1)
        for run_id in (unheard, heard):
            assert home.wait_for_state(run_id, "SUCCEEDED", "FAILED").state == "SUCCEEDED"
        wait_for(lambda: len(got) == 2, "the second webhook")
    document = got[1][1]
    assert (document["run_id"], document["state"], document["model_version"]) == (heard, "SUCCEEDED", 2)
