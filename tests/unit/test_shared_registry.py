"""The registry of several hosts that share an object store and no volume: one number a version, one history."""

import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from factories import publish_classifier
from object_stores import S3Server

from tandem.checkpoints.files import WEIGHTS_FILE, verify
from tandem.checkpoints.registry import Registry, Version
from tandem.checkpoints.room import bytes_on_disk
from tandem.checkpoints.store.cache import StoreCache
from tandem.checkpoints.store.journal import Behind, Change, Journal
from tandem.checkpoints.store.transfer import list_stored, upload_checkpoint
from tandem.cli.main import tandem
from tandem.errors import Conflict, StoreUnavailable
from tandem.volume import Volume


def host(directory: Path, store: str | None) -> Volume:
    volume = Volume(directory, store)
    volume.models.mkdir(parents=True)
    return volume


def publish(volume: Volume, run_id: str, seed: int = 0) -> Version:
    """As a trainer does: the checkpoint is in the store before it is a version."""
    plain = Volume(volume.home)
    version = publish_classifier(plain, "scratch", run_id, seed)
    checkpoint = volume.home / version.checkpoint
    registry = Registry(volume)
    if volume.store is not None:
        assert registry._journal is not None
        upload_checkpoint(registry._journal.store, run_id, checkpoint.name, checkpoint)
    return registry.publish("shapes", "classifier", run_id, checkpoint, version.metrics)


def test_hosts_that_share_no_volume_number_their_versions_together(s3: S3Server, tmp_path: Path) -> None:
    one, other = host(tmp_path / "one", s3.address), host(tmp_path / "other", s3.address)
    assert [publish(one, "r1").version, publish(other, "r2").version, publish(one, "r3").version] == [1, 2, 3]
    for volume in (one, other):
        registry = Registry(volume)
        registry.catch_up("shapes")
        assert [version.run_id for version in registry.versions("shapes")] == ["r1", "r2", "r3"]
        assert registry.aliases("shapes")["latest"] == 3
        assert [line["to"] for line in registry.history("shapes") if line["alias"] == "latest"] == [1, 2, 3]


def test_two_that_publish_at_once_get_two_numbers(s3: S3Server, tmp_path: Path) -> None:
    volumes = [host(tmp_path / f"host-{number}", s3.address) for number in range(4)]
    published: list[int] = []
    threads = [
        threading.Thread(target=lambda i=i, volume=volume: published.append(publish(volume, f"r{i}").version))
        for i, volume in enumerate(volumes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(published) == [1, 2, 3, 4]


def test_publishing_again_returns_the_version_that_there_is(s3: S3Server, tmp_path: Path) -> None:
    one, other = host(tmp_path / "one", s3.address), host(tmp_path / "other", s3.address)
    first = publish(one, "r1")
    assert publish(other, "r1") == first
    assert len(s3.store.sizes("models/shapes")) == 1


def test_an_alias_moves_from_where_its_mover_saw_it(s3: S3Server, tmp_path: Path) -> None:
    one, other = host(tmp_path / "one", s3.address), host(tmp_path / "other", s3.address)
    publish(one, "r1")
    publish(other, "r2")
    Registry(one).set_alias("shapes", "production", 1, "one", expected=None)
    with pytest.raises(Conflict, match="production is shapes:1 by now"):
        Registry(other).set_alias("shapes", "production", 2, "other", expected=None)
    Registry(other).set_alias("shapes", "production", 2, "other", expected=1)
    Registry(one).catch_up("shapes")
    assert Registry(one).aliases("shapes")["production"] == 2
    assert Registry(one).delete_alias("shapes", "production", "one") == 2
    Registry(other).note("shapes", {"by": "other", "alias": "production"})
    Registry(one).catch_up("shapes")
    assert [line["by"] for line in Registry(one).history("shapes")][-4:] == ["one", "other", "one", "other"]


def test_a_change_is_never_overwritten(s3: S3Server, tmp_path: Path) -> None:
    one, other = Journal(s3.store), Journal(s3.store)
    one.append(tmp_path / "one" / "m", Change((), {"a": 1}, ()))
    with pytest.raises(Behind):
        other.append(tmp_path / "other" / "m", Change((), {"a": 2}, ()))
    other.pull(tmp_path / "other" / "m")
    state = other.read(tmp_path / "other" / "m")
    assert state is not None
    assert state.aliases == {"a": 1}


def test_a_change_whose_answer_was_lost_is_made_once(s3: S3Server, tmp_path: Path) -> None:
    journal = Journal(s3.store)
    create = journal.store.create

    def create_and_be_told_nothing(name: str, data: bytes) -> bool:
        assert create(name, data)
        return create(name, data)

    journal.store.create = create_and_be_told_nothing  # type: ignore[method-assign]
    journal.append(tmp_path / "m", Change((), {"a": 1}, ()))
    assert len(s3.store.sizes("models/m")) == 1


def test_without_the_store_nothing_changes(s3: S3Server, tmp_path: Path) -> None:
    volume = host(tmp_path / "one", s3.address)
    publish(volume, "r1")
    registry, before = Registry(volume), Registry(volume).history("shapes")
    s3.is_away = True
    with pytest.raises(StoreUnavailable):
        registry.set_alias("shapes", "production", 1, "test")
    assert registry.aliases("shapes") == {"latest": 1, "best": 1}
    assert registry.history("shapes") == before
    assert registry.resolve("shapes").label == "shapes:1"


def test_a_store_that_is_set_later_gets_what_the_volume_has(s3: S3Server, tmp_path: Path) -> None:
    publish(host(tmp_path / "one", None), "r1")
    Registry(Volume(tmp_path / "one", s3.address)).set_alias("shapes", "production", 1, "test")
    other = host(tmp_path / "other", s3.address)
    Registry(other).catch_up("shapes")
    assert Registry(other).aliases("shapes") == {"latest": 1, "best": 1, "production": 1}
    assert len(Registry(other).history("shapes")) == 3


def test_two_models_of_one_name_are_not_mixed(s3: S3Server, tmp_path: Path) -> None:
    publish(host(tmp_path / "one", None), "r1")
    publish(host(tmp_path / "other", s3.address), "r2")
    with pytest.raises(Conflict, match="is not that of the object store, which was published elsewhere"):
        Registry(Volume(tmp_path / "one", s3.address)).catch_up("shapes")
    assert Registry(Volume(tmp_path / "one")).versions("shapes")[0].run_id == "r1"


def test_a_version_of_another_host_is_fetched_when_it_is_loaded(s3: S3Server, tmp_path: Path) -> None:
    version = publish(host(tmp_path / "one", s3.address), "r1")
    registry = Registry(host(tmp_path / "other", s3.address))
    registry.catch_up("shapes")
    located = registry.resolve("shapes")
    assert verify(located.checkpoint) == version.sha256


# What a server keeps.


def test_a_cache_shows_a_version_once_its_checkpoint_is_there(s3: S3Server, tmp_path: Path) -> None:
    version = publish(host(tmp_path / "trainer", s3.address), "r1")
    cache = StoreCache(host(tmp_path / "server", s3.address), s3.store, 10**9)
    assert cache.refresh()
    assert not cache.refresh()
    located = Registry(Volume(tmp_path / "server")).resolve("shapes@latest")
    assert (located.label, verify(located.checkpoint)) == ("shapes:1", version.sha256)


def test_a_cache_goes_on_with_what_it_has_while_the_store_is_away(s3: S3Server, tmp_path: Path) -> None:
    publish(host(tmp_path / "trainer", s3.address), "r1")
    cache = StoreCache(host(tmp_path / "server", s3.address), s3.store, 10**9)
    cache.refresh()
    s3.is_away = True
    with pytest.raises(StoreUnavailable):
        cache.refresh()
    assert cache.registry.resolve("shapes").checkpoint.is_dir()
    s3.is_away = False
    publish(Volume(tmp_path / "trainer", s3.address), "r2", seed=1)
    assert cache.refresh()
    assert cache.registry.resolve("shapes").label == "shapes:2"


def test_a_new_version_that_is_damaged_leaves_the_one_before(s3: S3Server, tmp_path: Path) -> None:
    trainer = host(tmp_path / "trainer", s3.address)
    publish(trainer, "r1")
    cache = StoreCache(host(tmp_path / "server", s3.address), s3.store, 10**9)
    cache.refresh()
    publish(trainer, "r2", seed=1)
    (stored,) = list_stored(s3.store, "r2")
    s3.flip(f"{stored.prefix}/{WEIGHTS_FILE}")
    cache.refresh()
    assert cache.registry.aliases("shapes")["latest"] == 1
    assert cache.registry.resolve("shapes").label == "shapes:1"
    before = s3.num_requests
    cache.refresh()
    # It is not fetched again each time.
    assert s3.num_requests - before <= 4


def test_a_version_without_a_manifest_is_absent(s3: S3Server, tmp_path: Path) -> None:
    publish(host(tmp_path / "trainer", s3.address), "r1")
    (stored,) = list_stored(s3.store, "r1")
    s3.store.remove([f"{stored.prefix}/manifest.json"])
    cache = StoreCache(host(tmp_path / "server", s3.address), s3.store, 10**9)
    cache.refresh()
    assert cache.registry.names() == []


def test_a_cache_holds_what_aliases_name_and_then_the_newest(s3: S3Server, tmp_path: Path) -> None:
    trainer = host(tmp_path / "trainer", s3.address)
    versions = [publish(trainer, f"r{number}", seed=number) for number in range(4)]
    Registry(trainer).set_alias("shapes", "production", 2, "test")
    one = bytes_on_disk(trainer.home / versions[0].checkpoint)
    server = host(tmp_path / "server", s3.address)
    cache = StoreCache(server, s3.store, int(3.5 * one))
    cache.refresh()
    # best is 1 (all are equally good), production 2, latest 4.
    assert [version.version for version in cache.registry.versions("shapes")] == [1, 2, 4]
    Registry(trainer).set_alias("shapes", "production", 3, "test")
    cache.refresh()
    assert [version.version for version in cache.registry.versions("shapes")] == [1, 3, 4]
    assert sorted(path.name for path in server.runs.glob("*/checkpoints/*") if path.is_dir()) == ["step-00000001"] * 3
    assert cache.registry.aliases("shapes") == {"latest": 4, "best": 1, "production": 3}


def test_an_alias_that_a_server_moves_forgets_none_that_it_does_not_show(s3: S3Server, tmp_path: Path) -> None:
    trainer = host(tmp_path / "trainer", s3.address)
    versions = [publish(trainer, f"r{number}", seed=number) for number in range(3)]
    Registry(trainer).set_alias("shapes", "old", 2, "test")
    one = bytes_on_disk(trainer.home / versions[0].checkpoint)
    cache = StoreCache(host(tmp_path / "server", s3.address), s3.store, int(2.5 * one))
    cache.refresh()
    assert cache.registry.aliases("shapes") == {"latest": 3, "best": 1}
    cache.registry.set_alias("shapes", "production", 3, "test")
    registry = Registry(trainer)
    registry.catch_up("shapes")
    assert registry.aliases("shapes") == {"latest": 3, "best": 1, "old": 2, "production": 3}


def test_a_cache_removes_nothing_that_is_a_trainers(s3: S3Server, tmp_path: Path) -> None:
    volume = host(tmp_path / "both", s3.address)
    for number in range(3):
        publish(volume, f"r{number}", seed=number)
        (volume.run(f"r{number}") / "job.json").write_text("{}")
    StoreCache(volume, s3.store, 1).refresh()
    assert len(list(volume.runs.glob("*/checkpoints/step-*"))) == 3


def test_the_command_line_lists_what_other_hosts_have_published(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(host(tmp_path / "trainer", s3.address), "r1")
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path / "laptop"))
    monkeypatch.setenv("TANDEM_CHECKPOINT_STORE", s3.address)
    done = CliRunner().invoke(tandem, ["models", "list", "--json"])
    assert [model["name"] for model in json.loads(done.stdout)] == ["shapes"]
    s3.is_away = True
    done = CliRunner().invoke(tandem, ["models", "list", "--json"])
    assert (done.exit_code, len(json.loads(done.stdout))) == (0, 1)
    assert done.stderr.startswith("tandem: as this volume has it: the object store s3://")
