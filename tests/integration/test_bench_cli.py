"""`tandem bench train` as a person types it: tables, JSON, two processes over gloo, refusals, and Ctrl-C."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from rig import processes
from samples import write_image_dataset
from shell import Shell
from waiting import wait_for

from tandem.volume import Volume

QUICK = ("--arch", "squeezenet1_1", "--image-size", "32", "--batch-size", "16", "--limit-train-images", "96")


@pytest.fixture
def tandem(tmp_path: Path) -> Shell:
    """The command on a fresh volume, with a folder for what is passing."""
    (tmp_path / "passing").mkdir()
    return Shell(tmp_path / "home", {"TMPDIR": str(tmp_path / "passing")})


def left(shell: Shell) -> list[str]:
    names = (path.name for path in Path(shell.environment["TMPDIR"]).iterdir())
    # torch's own cache, which it keeps from one program to the next.
    return [name for name in names if not name.startswith("torchinductor_")]


def test_one_and_two_processes_on_the_cpu(tandem: Shell) -> None:
    report = tandem.json("bench", "train", "--devices", "cpu,cpu+cpu", *QUICK)
    one, two = report["rows"]
    assert (one["device"], one["num_processes"]) == ("cpu", 1)
    assert (two["device"], two["num_processes"]) == ("cpu+cpu", 2)
    for row in report["rows"]:
        assert row["num_images"] == 96, "the images of all processes count once"
        assert row["images_per_s"] == pytest.approx(96 / row["seconds"])
        assert 0 < row["ratio"] < 10
        assert sum(row["shares"].values()) == pytest.approx(1.0)
    assert one["shares"]["communication"] == 0.0
    assert report["machine"]["torch"]
    assert not tandem.home.exists(), "nothing is left on the volume"
    assert left(tandem) == []


def test_a_prepared_dataset_and_the_table(tandem: Shell) -> None:
    write_image_dataset(Volume(tandem.home), "shapes")
    before = sorted(tandem.home.rglob("*"))
    printed = tandem("bench", "train", "--data", "shapes", "--devices", "cpu", "--arch", "squeezenet1_1",
                     "--batch-size", "8", "--epochs", "2").stdout  # fmt: skip
    heading, row = next(
        (line, below)
        for line, below in zip(printed.splitlines(), printed.splitlines()[1:], strict=False)
        if "images/s" in line
    )
    for word in ("device", "seconds", "epochs", "ratio", "data", "forward", "backward", "update", "communication"):
        assert word in heading
    assert row.split()[0] == "cpu"
    assert row.split()[3:5] == ["2", "120"]
    assert "squeezenet1_1, 32 px, batch 8, images of shapes" in printed
    assert "medians of n turns" in printed
    assert sorted(tandem.home.rglob("*")) == before


def test_refusals_are_one_line_each(tandem: Shell) -> None:
    assert "device 'cuda:31' is not here" in tandem.error("bench", "train", "--devices", "cpu,cuda:31", *QUICK)
    assert "no dataset 'absent'" in tandem.error("bench", "train", "--data", "absent", "--devices", "cpu", *QUICK)
    few = ("--devices", "cpu", *QUICK[:-1], "32")
    told = tandem("bench", "train", *few, code=1).stderr.splitlines()
    assert told[0].startswith("measuring cpu")
    assert "an epoch of 2 steps is too short to measure" in told[1]
    assert len(told) == 2
    assert left(tandem) == []


@pytest.mark.parametrize("devices", ["cpu", "cpu+cpu"])
def test_ctrl_c_leaves_nothing(tandem: Shell, devices: str) -> None:
    process = tandem.popen("bench", "train", "--devices", devices, *QUICK[:-1], "20000")
    wait_for(lambda: children_of(process))
    assert process.stderr is not None
    assert "measuring" in process.stderr.readline()
    children = children_of(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out == ""
    for child in children:
        wait_for(lambda child=child: not Path(f"/proc/{child}").exists())  # type: ignore[misc]
    assert left(tandem) == []


def children_of(process: "subprocess.Popen[str]") -> list[int]:
    """Return the ids of the measuring processes that have `process` for a parent."""
    named = f"services.trainer.bench --parent {process.pid}"
    return [pid for pid, command in processes() if named in command and pid != os.getpid()]
