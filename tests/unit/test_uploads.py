"""Uploads beside a run: nothing of it waits for the store, and the store gets what the volume keeps."""

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from factories import classifier_card, classifier_files, queued_record
from object_stores import S3Server
from waiting import wait_for

from services.trainer.stored_runs import StoredRuns
from services.trainer.uploads import Uploads
from tandem.checkpoints.files import WEIGHTS_FILE, list_checkpoints, remove_checkpoints, verify, write_checkpoint
from tandem.checkpoints.pins import pin
from tandem.checkpoints.store.attempts import begin_attempt
from tandem.checkpoints.store.inputs import share_inputs
from tandem.checkpoints.store.objects import ObjectStore
from tandem.checkpoints.store.transfer import list_stored, upload_checkpoint
from tandem.errors import RunNotFound, StoreUnavailable, Superseded
from tandem.volume import Volume

SPEC = b'{"kind": "train_classifier", "dataset": "d", "model_name": "m", "arch": "squeezenet1_1"}\n'


def save(run: Path, step: int, acc1: float = 50.0) -> Path:
    card = classifier_card("squeezenet1_1", run_id=run.name).model_copy(
        update={"step": step, "metrics": {"val_acc1": acc1, "val_loss": 1.0}}
    )
    checkpoint = run / "checkpoints" / f"step-{step:08d}"
    write_checkpoint(checkpoint, classifier_files(card, step))
    return checkpoint


def steps(store: ObjectStore, run_id: str = "r") -> list[int]:
    return [stored.step for stored in list_stored(store, run_id)]


def soon(seconds: float = 30.0) -> Callable[[], bool]:
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() < deadline


def test_the_store_follows_the_volume(s3: S3Server, tmp_path: Path) -> None:
    run = tmp_path / "r"
    first = save(run, 1)
    with Uploads(s3.store, run, 1) as uploads:
        assert uploads.finish(soon())
        assert steps(s3.store) == [1]
        save(run, 2)
        remove_checkpoints([first])
        assert uploads.finish(soon())
        assert steps(s3.store) == [2]
    assert list((run / "uploading").iterdir()) == []


def test_what_is_damaged_or_gone_with_its_disk_stays_in_the_store(s3: S3Server, tmp_path: Path) -> None:
    run = tmp_path / "r"
    first, second = save(run, 1), save(run, 2)
    with Uploads(s3.store, run, 1) as uploads:
        assert uploads.finish(soon())
        manifest = first / "manifest.json"
        manifest.write_bytes(manifest.read_bytes().replace(b"0", b"1", 1))
        assert uploads.finish(soon())
        assert steps(s3.store) == [1, 2]
        remove_checkpoints([second])
        assert uploads.finish(soon())
        assert steps(s3.store) == [1, 2]
        shutil.rmtree(run / "checkpoints")
        assert uploads.finish(soon())
        assert steps(s3.store) == [1, 2]
        # From here on the run prunes as ever.
        save(run, 3)
        assert uploads.finish(soon())
        assert steps(s3.store) == [3]


def test_what_a_version_pins_stays_in_the_store(s3: S3Server, tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    run = volume.run("r")
    first = save(run, 1)
    save(run, 2)
    volume.run("other").mkdir()
    pin(first, "run", "other")
    with Uploads(s3.store, run, 1) as uploads:
        assert uploads.finish(soon())
        shutil.rmtree(first)
        assert uploads.finish(soon())
    assert steps(s3.store) == [1, 2]


def test_objects_of_others_are_passed_over(s3: S3Server, tmp_path: Path) -> None:
    run = tmp_path / "r"
    save(run, 1)
    for name in ("checkpoints/README", "checkpoints/other/manifest.json", "attempts/README"):
        s3.store.put(f"runs/r/{name}", b"something")
    with Uploads(s3.store, run, 1) as uploads:
        assert uploads.finish(soon())
    assert steps(s3.store) == [1]


def test_an_error_of_our_own_is_told_and_tried_again(
    s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "r"
    save(run, 1)
    failures = iter([ValueError("a slip")])

    class Slips(ObjectStore):
        def sizes(self, folder: str) -> dict[str, int]:
            for failure in failures:
                raise failure
            return super().sizes(folder)

    with Uploads(Slips(s3.address), run, 1) as uploads:
        assert uploads.finish(soon())
    assert steps(s3.store) == [1]
    assert "a slip" in caplog.text
    assert "Traceback" in caplog.text


def test_a_checkpoint_that_is_removed_while_it_goes_up_is_whole_in_the_store(s3: S3Server, tmp_path: Path) -> None:
    run = tmp_path / "r"
    checkpoint = save(run, 1)

    class Slow(ObjectStore):
        def upload(self, name: str, file: Path) -> None:
            if checkpoint.exists():
                remove_checkpoints([checkpoint])
            super().upload(name, file)

    with Uploads(Slow(s3.address), run, 1) as uploads:
        wait_for(lambda: steps(s3.store) == [1] or not checkpoint.exists(), "the upload")
        assert uploads.finish(soon())
    assert list_checkpoints(run) == []
    assert steps(s3.store) in ([1], [])


def test_a_store_that_goes_away_is_told_once_and_catches_up(
    s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "r"
    save(run, 1)
    s3.is_away = True
    with caplog.at_level(logging.INFO), Uploads(s3.store, run, 1) as uploads:
        assert not uploads.finish(soon(6.0))
        save(run, 2)
        uploads.look()
        s3.is_away = False
        assert uploads.finish(soon())
    assert steps(s3.store) == [1, 2]
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert "run r goes on, and what it saves is uploaded later: the object store s3://" in told[0]
    assert "run r: the object store has all checkpoints again" in caplog.text


def test_nobody_waits_for_a_store_that_is_away(s3: S3Server, tmp_path: Path) -> None:
    run = tmp_path / "r"
    save(run, 1)
    s3.is_away = True
    began = time.monotonic()
    with Uploads(s3.store, run, 1) as uploads:
        uploads.look()
        uploads.check()
    assert time.monotonic() - began < 2.0


def test_a_damaged_checkpoint_is_passed_over(s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "r"
    save(run, 1)
    (save(run, 2) / WEIGHTS_FILE).write_bytes(b"torn")
    with Uploads(s3.store, run, 1) as uploads:
        assert uploads.finish(soon())
    assert steps(s3.store) == [1]
    assert "not uploaded" in caplog.text


def test_an_earlier_attempt_uploads_nothing_more(s3: S3Server, tmp_path: Path) -> None:
    run = tmp_path / "r"
    run.mkdir()
    with Uploads(s3.store, run, 1) as uploads:
        assert uploads.finish(soon())
        begin_attempt(s3.store, "r", 2)
        save(run, 1)
        with pytest.raises(Superseded, match="attempt 2 of run r has begun"):
            uploads.finish(soon())
        with pytest.raises(Superseded):
            uploads.check()
    assert steps(s3.store) == []


def other_host(tmp_path: Path, s3: S3Server) -> tuple[StoredRuns, Path]:
    volume = Volume(tmp_path / "other", s3.address)
    return StoredRuns(volume), volume.run("r")


def begun_elsewhere(tmp_path: Path, s3: S3Server, **accuracies: float) -> Path:
    """Have a run in the store whose checkpoints are those of another host."""
    run = tmp_path / "here" / "r"
    run.mkdir(parents=True)
    (run / "job.json").write_bytes(SPEC)
    (run / "weights").mkdir()
    (run / "weights" / "first.pth").write_bytes(b"weights")
    share_inputs(s3.store, run)
    for name, acc1 in accuracies.items():
        checkpoint = save(run, int(name.removeprefix("step")), acc1)
        upload_checkpoint(s3.store, "r", checkpoint.name, checkpoint)
    return run


def nothing() -> None:
    pass


def test_another_host_gets_the_newest_checkpoint_the_best_and_the_inputs(s3: S3Server, tmp_path: Path) -> None:
    run = begun_elsewhere(tmp_path, s3, step1=70.0, step2=60.0, step3=50.0)
    runs, there = other_host(tmp_path, s3)
    runs.bring(queued_record("r", saved_step=3), nothing)
    assert [path.name for path in list_checkpoints(there)] == ["step-00000001", "step-00000003"]
    for checkpoint in list_checkpoints(there):
        assert verify(checkpoint) == verify(run / "checkpoints" / checkpoint.name)
    assert (there / "job.json").read_bytes() == SPEC
    assert (there / "weights" / "first.pth").read_bytes() == b"weights"


def test_a_newest_that_is_damaged_gives_its_place_to_the_one_before(s3: S3Server, tmp_path: Path) -> None:
    begun_elsewhere(tmp_path, s3, step1=50.0, step2=60.0)
    s3.flip(f"{list_stored(s3.store, 'r')[-1].prefix}/{WEIGHTS_FILE}")
    runs, there = other_host(tmp_path, s3)
    runs.bring(queued_record("r", saved_step=2), nothing)
    assert [path.name for path in list_checkpoints(there)] == ["step-00000001"]


def test_a_torn_checkpoint_here_is_mended_from_the_store(s3: S3Server, tmp_path: Path) -> None:
    run = begun_elsewhere(tmp_path, s3, step1=50.0)
    runs, there = other_host(tmp_path, s3)
    runs.bring(queued_record("r", saved_step=1), nothing)
    (there / "checkpoints" / "step-00000001" / WEIGHTS_FILE).write_bytes(b"torn")
    runs.bring(queued_record("r", saved_step=1), nothing)
    assert verify(there / "checkpoints" / "step-00000001") == verify(run / "checkpoints" / "step-00000001")


def test_what_is_newer_here_stays(s3: S3Server, tmp_path: Path) -> None:
    begun_elsewhere(tmp_path, s3, step1=50.0)
    runs, there = other_host(tmp_path, s3)
    shutil.copytree(tmp_path / "here" / "r", there)
    save(there, 2)
    runs.bring(queued_record("r", saved_step=2), nothing)
    assert [path.name for path in list_checkpoints(there)] == ["step-00000001", "step-00000002"]


def test_a_first_attempt_begins_without_the_store_and_a_later_one_does_not_begin_anew(
    s3: S3Server, tmp_path: Path
) -> None:
    begun_elsewhere(tmp_path, s3, step1=50.0)
    runs, there = other_host(tmp_path, s3)
    there.mkdir(parents=True)
    (there / "job.json").write_bytes(SPEC)
    s3.is_away = True
    runs.bring(queued_record("r"), nothing)
    with pytest.raises(StoreUnavailable):
        runs.bring(queued_record("r", attempt=1, saved_step=1), nothing)
    assert list_checkpoints(there) == []
    s3.is_away = False
    runs.bring(queued_record("r", attempt=1, saved_step=1), nothing)
    assert len(list_checkpoints(there)) == 1


def test_a_run_that_is_nowhere_is_refused(s3: S3Server, tmp_path: Path) -> None:
    runs, _ = other_host(tmp_path, s3)
    with pytest.raises(RunNotFound, match="neither on this volume nor in s3://"):
        runs.bring(queued_record("r"), nothing)


def test_without_a_store_nothing_is_done(tmp_path: Path) -> None:
    runs = StoredRuns(Volume(tmp_path))
    runs.bring(queued_record("r"), nothing)
    assert runs.uploads(tmp_path / "r", 1) is None
    assert list(tmp_path.iterdir()) == []
