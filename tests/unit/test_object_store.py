"""Checkpoints in an object store: whole or absent, whatever is killed, flipped or away, and whoever else writes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from brokers import free_port
from factories import classifier_card, classifier_files
from object_stores import S3Server

from tandem.checkpoints.files import MANIFEST_FILE, MODEL_FILE, WEIGHTS_FILE, list_checkpoints, verify, write_checkpoint
from tandem.checkpoints.store.attempts import begin_attempt, check_attempt
from tandem.checkpoints.store.objects import ObjectStore
from tandem.checkpoints.store.transfer import (
    Stored,
    download_checkpoint,
    list_stored,
    remove_stored,
    upload_checkpoint,
)
from tandem.errors import CheckpointCorrupt, InvalidRequest, StoreUnavailable, Superseded
from tandem.settings import Settings
from tandem.volume import Volume


def saved(home: Path, step: int = 1, seed: int = 0, **changes: object) -> Path:
    card = classifier_card("squeezenet1_1", run_id="r").model_copy(update={"step": step, **changes})
    checkpoint = Volume(home).run("r") / "checkpoints" / f"step-{step:08d}"
    write_checkpoint(checkpoint, classifier_files(card, seed))
    return checkpoint


def upload(store: ObjectStore, checkpoint: Path) -> str:
    return upload_checkpoint(store, "r", checkpoint.name, checkpoint)


def files_of(checkpoint: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in checkpoint.iterdir()}


def test_a_checkpoint_goes_there_and_comes_back_in_the_same_bytes(s3: S3Server, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "a")
    digest = upload(s3.store, checkpoint)
    (stored,) = list_stored(s3.store, "r")
    assert (stored.step, stored.name) == (1, checkpoint.name)
    assert stored.num_bytes == sum(file.stat().st_size for file in checkpoint.iterdir())
    there = stored.place(Volume(tmp_path / "b"))
    download_checkpoint(s3.store, stored, there, digest)
    assert files_of(there) == files_of(checkpoint)
    assert not list(there.parent.glob(".tmp-*"))


def test_the_manifest_is_uploaded_last_and_removed_first(tmp_path: Path) -> None:
    class Noting(ObjectStore):
        told: list[str] = []  # noqa: RUF012

        def put(self, name: str, data: bytes) -> None:
            self.told.append(f"+{name.rpartition('/')[2]}")
            super().put(name, data)

        def upload(self, name: str, file: Path) -> None:
            self.told.append(f"+{file.name}")
            super().upload(name, file)

        def remove(self, names: Iterable[str]) -> None:
            names = list(names)
            self.told += [f"-{name.rpartition('/')[2]}" for name in names]
            super().remove(names)

    store = Noting(f"file://{tmp_path}/store")
    upload(store, saved(tmp_path / "a"))
    assert store.told[-1] == f"+{MANIFEST_FILE}"
    assert store.told.count(f"+{MANIFEST_FILE}") == 1
    remove_stored(store, list_stored(store, "r"))
    assert store.told[3] == f"-{MANIFEST_FILE}"
    assert store.sizes("runs/r/checkpoints") == {}


@pytest.mark.parametrize("puts", range(3))
def test_an_upload_that_is_torn_is_no_checkpoint_and_goes_on_later(s3: S3Server, tmp_path: Path, puts: int) -> None:
    checkpoint = saved(tmp_path / "a")
    s3.puts_left = puts
    with pytest.raises(StoreUnavailable, match="tandem-test"):
        upload(s3.store, checkpoint)
    s3.puts_left = None
    assert list_stored(s3.store, "r") == []
    assert len(s3.store.sizes("runs/r/checkpoints")) == puts
    upload(s3.store, checkpoint)
    (stored,) = list_stored(s3.store, "r")
    download_checkpoint(s3.store, stored, stored.place(Volume(tmp_path / "b")))


def test_a_process_that_is_killed_in_the_middle_of_an_upload_leaves_no_checkpoint(s3: S3Server, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "a")
    script = (
        "import sys, time; from pathlib import Path; from tandem.checkpoints.store import objects, transfer\n"
        "put = objects.ObjectStore.put\n"
        "objects.ObjectStore.put = lambda *a: (print('now', flush=True), time.sleep(60))\n"
        "path = Path(sys.argv[2])\n"
        "transfer.upload_checkpoint(objects.ObjectStore(sys.argv[1]), 'r', path.name, path)\n"
    )
    command = [sys.executable, "-c", script, s3.address, str(checkpoint)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
    assert {name.rpartition("/")[2] for name in s3.store.sizes("runs/r")} == {MODEL_FILE, WEIGHTS_FILE}
    assert list_stored(s3.store, "r") == []


@pytest.mark.parametrize("file", [WEIGHTS_FILE, MODEL_FILE, MANIFEST_FILE])
def test_a_bit_that_is_flipped_in_the_store_is_found(s3: S3Server, tmp_path: Path, file: str) -> None:
    upload(s3.store, saved(tmp_path / "a"))
    (stored,) = list_stored(s3.store, "r")
    s3.flip(f"{stored.prefix}/{file}")
    place = stored.place(Volume(tmp_path / "b"))
    with pytest.raises(CheckpointCorrupt):
        download_checkpoint(s3.store, stored, place)
    assert list(place.parent.iterdir()) == []


@pytest.mark.parametrize("file", [WEIGHTS_FILE, MANIFEST_FILE])
def test_a_file_that_is_gone_from_the_store_is_missed(s3: S3Server, tmp_path: Path, file: str) -> None:
    upload(s3.store, saved(tmp_path / "a"))
    (stored,) = list_stored(s3.store, "r")
    s3.store.remove([f"{stored.prefix}/{file}"])
    place = stored.place(Volume(tmp_path / "b"))
    with pytest.raises(CheckpointCorrupt, match=file):
        download_checkpoint(s3.store, stored, place)
    assert not place.exists()


def test_a_manifest_can_name_no_file_outside(s3: S3Server, tmp_path: Path) -> None:
    import hashlib

    for name in ("../../../evil", "..", ""):
        data = f'{{"format_version": 1, "files": {{"{name}": {{"size": 1, "sha256": "0"}}}}}}\n'.encode()
        folder = f"step-00000001.{hashlib.sha256(data).hexdigest()[:16]}"
        s3.store.put(f"runs/r/checkpoints/{folder}/{MANIFEST_FILE}", data)
        place = tmp_path / "b" / "step-00000001"
        with pytest.raises(CheckpointCorrupt, match="manifest of format 1"):
            download_checkpoint(s3.store, Stored("r", "step-00000001", folder, 1), place)
        assert not place.exists()


def test_two_attempts_that_save_the_same_step_spoil_nothing(s3: S3Server, tmp_path: Path) -> None:
    """The one's weights beside the other's card would be no checkpoint; each lies under its own digest."""
    first, second = saved(tmp_path / "a", seed=0), saved(tmp_path / "b", seed=1)
    digests = {upload(s3.store, first), upload(s3.store, second)}
    stored = list_stored(s3.store, "r")
    assert len(digests) == len(stored) == 2
    for each in stored:
        place = tmp_path / each.digits / each.name
        download_checkpoint(s3.store, each, place)
        assert verify(place) in digests


def test_the_same_bytes_twice_are_the_same_objects(s3: S3Server, tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert upload(s3.store, first) == upload(s3.store, second)
    assert len(list_stored(s3.store, "r")) == 1


def test_a_damaged_checkpoint_is_not_uploaded(s3: S3Server, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "a")
    (checkpoint / WEIGHTS_FILE).write_bytes(b"torn")
    with pytest.raises(CheckpointCorrupt):
        upload(s3.store, checkpoint)
    assert s3.store.sizes("runs/r") == {}


def test_an_attempt_learns_from_the_store_that_a_later_one_has_begun(s3: S3Server) -> None:
    begin_attempt(s3.store, "r", 1)
    check_attempt(s3.store, "r", 1)
    begin_attempt(s3.store, "r", 2)
    with pytest.raises(Superseded, match="attempt 2 of run r has begun; attempt 1 stops"):
        check_attempt(s3.store, "r", 1)
    with pytest.raises(Superseded):
        begin_attempt(s3.store, "r", 1)
    check_attempt(s3.store, "r", 2)


def test_what_exists_is_not_created_again(s3: S3Server, tmp_path: Path) -> None:
    for store in (s3.store, ObjectStore(f"file://{tmp_path}/store"), ObjectStore("memory://test/store")):
        assert store.create("one", b"first")
        assert not store.create("one", b"second")
        assert store.get("one") == b"first"
        assert store.get("two") is None


def test_a_store_that_is_not_there_is_one_line_in_seconds(tmp_path: Path, s3: S3Server) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        began = time.monotonic()
        with pytest.raises(StoreUnavailable) as caught:
            list_stored(s3.store, "r")
        assert time.monotonic() - began < 20
    assert "s3://tandem-test/prefix" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreUnavailable, match="no-such-bucket"):
        ObjectStore("s3://no-such-bucket/x").put("name", b"")


@pytest.mark.parametrize(
    "address", ["bucket/prefix", "s3:/bucket", "s3://", "ftp://host/x", "s3://key:secret@bucket/x", "/var/store"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest, match="write s3://BUCKET/PREFIX"):
        Settings.from_environment({"TANDEM_CHECKPOINT_STORE": address})


def test_settings_know_the_store(tmp_path: Path) -> None:
    environment = {"TANDEM_CHECKPOINT_STORE": "s3://bucket/a/", "TANDEM_CHECKPOINT_CACHE": "1GiB"}
    settings = Settings.from_environment(environment)
    assert (settings.checkpoint_store, settings.checkpoint_cache) == ("s3://bucket/a", 2**30)
    assert Settings.from_environment({}).checkpoint_store is None


def test_a_protocol_whose_package_is_missing_is_told_with_the_remedy() -> None:
    with pytest.raises(InvalidRequest, match=r"pip install 'tandem\[s3\]'"):
        ObjectStore("gs://bucket/x").get("name")


def test_nothing_of_a_store_is_imported_where_there_is_none(tmp_path: Path) -> None:
    """s3fs takes 0.9 s to import; a command that needs none pays none, and with a store only where it is asked."""
    script = (
        "import sys; from pathlib import Path; from tandem.checkpoints.registry import Registry\n"
        "from tandem.volume import Volume; Registry(Volume(Path(sys.argv[1]), 's3://bucket/x')).names()\n"
        "print([name for name in ('fsspec', 's3fs', 'boto3', 'botocore', 'aiohttp') if name in sys.modules])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout == "[]\n"
    assert list_checkpoints(tmp_path) == []
