"""Load, unload, aliases and the watch of models, over gRPC and from the command line."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from factories import break_weights, png, publish_classifier
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from open_inference import InProcess
from waiting import PATIENCE_S, wait_for

from tandem.checkpoints.registry import Registry
from tandem.client import AsyncClient, Client
from tandem.errors import (
    InvalidName,
    InvalidReference,
    InvalidRequest,
    ModelNotFound,
    ModelUnloaded,
    QueueFull,
    TandemError,
    Unavailable,
    VolumeReadOnly,
)
from tandem.volume import Volume
from tandem.wire.limits import MAX_WATCHERS
from tandem.wire.results import ModelChange, ModelsSnapshot
from tandem.wire.status import DETAILS_KEY
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    volume = Volume(tmp_path_factory.mktemp("aliases"))
    for number in (1, 2):
        publish_classifier(volume, "m", f"run-m-{number}", seed=number)
    return volume


@pytest.fixture(scope="module")
def server(volume: Volume) -> Iterator[InProcess]:
    server = InProcess(volume.home)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="module")
def client(server: InProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        client.wait_until_serving("m", timeout_s=PATIENCE_S)
        yield client


class Watch:
    """What a watcher has been told, in a thread of its own."""

    def __init__(self, address: str) -> None:
        self.told: list[Any] = []
        self.error: TandemError | None = None
        self._client = Client(address)
        self._updates = self._client.watch_models()
        self.told.append(next(self._updates))
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            self.told.extend(self._updates)
        except TandemError as error:
            self.error = error

    def wait_for(self, *changes: ModelChange) -> None:
        """Wait until these have been told, in this order."""

        def come() -> bool:
            rest = iter(self.told)
            return all(change in rest for change in changes)

        wait_for(come)

    def close(self) -> None:
        self._client.close()
        self._thread.join(240)
        assert not self._thread.is_alive()


@pytest.fixture
def watch(server: InProcess, client: Client) -> Iterator[Watch]:
    watch = Watch(server.address)
    try:
        yield watch
    finally:
        watch.close()


def test_an_alias_is_served_when_the_call_ends(volume: Volume, client: Client, watch: Watch) -> None:
    assert isinstance(watch.told[0], ModelsSnapshot)
    assert [model.name for model in watch.told[0].models] == ["m"]
    with pytest.raises(ModelNotFound, match="no alias 'production'"):
        client.classify("m@production", [png(0)])
    for version, previous in ((1, 0), (2, 1), (1, 2)):
        move = client.set_alias("m", "production", version)
        assert (move.model.aliases["production"], move.previous_version) == (version, previous)
        assert client.classify("m@production", [png(0)]).model.version == version
    gone = client.delete_alias("m", "production")
    assert (gone.model.aliases, gone.previous_version) == ({"latest": 2, "best": 1}, 1)
    with pytest.raises(ModelNotFound):
        client.classify("m@production", [png(0)])
    with pytest.raises(ModelNotFound):
        client.delete_alias("m", "production")
    watch.wait_for(
        ModelChange("alias_set", "m", 1, "production"),
        ModelChange("alias_set", "m", 2, "production", 1),
        ModelChange("alias_set", "m", 1, "production", 2),
        ModelChange("alias_deleted", "m", 0, "production", 1),
    )
    lines = (volume.model("m") / "history.jsonl").read_text().splitlines()
    last = [{key: json.loads(line)[key] for key in ("alias", "from", "to", "by")} for line in lines[-2:]]
    assert last == [
        {"alias": "production", "from": 2, "to": 1, "by": "SetAlias"},
        {"alias": "production", "from": 1, "to": None, "by": "DeleteAlias"},
    ]


def test_load_and_unload(client: Client, watch: Watch) -> None:
    client.load_model("m:1")
    client.load_model("m")
    assert client.unload_model("m") == (1, 2)
    with pytest.raises(ModelUnloaded):
        client.classify("m", [png(0)])
    (model,) = client.list_models()
    assert (model.loaded, model.out_of_service) == ((), True)
    loaded = client.load_model("m:2")
    assert (loaded.model.label, loaded.model.dtype, loaded.load_ms > 0) == ("m:2", "float32", True)
    (model,) = client.list_models()
    assert (model.loaded, model.out_of_service) == ((2,), False)
    watch.wait_for(
        ModelChange("unloaded", "m", 1, reason="it was unloaded"),
        ModelChange("unloaded", "m", reason="it was taken out of service"),
        ModelChange("loaded", "m", 2),
    )
    with pytest.raises(ModelNotFound):
        client.load_model("nope")
    with pytest.raises(ModelNotFound):
        client.unload_model("nope")


def test_what_is_published_and_what_fails_is_told(volume: Volume, client: Client, watch: Watch) -> None:
    version = publish_classifier(volume, "torn", "run-torn", seed=6)
    watch.wait_for(ModelChange("published", "torn", 1), ModelChange("loaded", "torn", 1))
    client.unload_model("torn")
    break_weights(volume, version)
    with pytest.raises(TandemError, match="can't be served"):
        client.load_model("torn")
    wait_for(lambda: any(isinstance(each, ModelChange) and each.kind == "failed" for each in watch.told))
    (failed,) = [each for each in watch.told if isinstance(each, ModelChange) and each.kind == "failed"]
    assert (failed.name, failed.version) == ("torn", 1)
    assert failed.reason.startswith("model.safetensors is altered")
    (model,) = [model for model in client.list_models() if model.name == "torn"]
    assert model.failed == {1: failed.reason}


INVALID = [
    ("LoadModel", pb.LoadModelRequest(model="../x"), "model"),
    ("LoadModel", pb.LoadModelRequest(), "model"),
    ("UnloadModel", pb.UnloadModelRequest(name="m:1"), "name"),
    ("UnloadModel", pb.UnloadModelRequest(), "name"),
    ("SetAlias", pb.SetAliasRequest(name="../m", alias="x", version=1), "name"),
    ("SetAlias", pb.SetAliasRequest(name="m", alias="", version=1), "alias"),
    ("SetAlias", pb.SetAliasRequest(name="m", alias="a/b", version=1), "alias"),
    ("SetAlias", pb.SetAliasRequest(name="m", alias="latest", version=1), "alias"),
    ("SetAlias", pb.SetAliasRequest(name="m", alias="best", version=1), "alias"),
    ("SetAlias", pb.SetAliasRequest(name="m", alias="x"), "version"),
    ("SetAlias", pb.SetAliasRequest(name="m", alias="x", version=-1), "version"),
    ("DeleteAlias", pb.DeleteAliasRequest(name="m@x", alias="x"), "name"),
    ("DeleteAlias", pb.DeleteAliasRequest(name="m", alias="latest"), "alias"),
]


@pytest.mark.parametrize(("method", "request_", "field"), INVALID)
def test_each_wrong_argument_is_named(server: InProcess, method: str, request_: Any, field: str) -> None:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        getattr(rpc.ModelsStub(channel), method)(request_)  # type: ignore[no-untyped-call]
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    rich = status_pb2.Status.FromString(dict(error.trailing_metadata())[DETAILS_KEY])
    wrong = error_details_pb2.BadRequest()
    assert any(detail.Unpack(wrong) for detail in rich.details)
    assert [each.field for each in wrong.field_violations] == [field]


def test_versions_and_models_that_are_not_there(volume: Volume, client: Client) -> None:
    with pytest.raises(ModelNotFound, match="no version 9"):
        client.set_alias("m", "x", 9)
    with pytest.raises(ModelNotFound):
        client.set_alias("nope", "x", 1)
    assert not (volume.models / "nope").exists()
    with pytest.raises(InvalidRequest, match="can't be written"):
        client.set_alias("m", "x", 2**40)


async def test_the_asyncio_client(server: InProcess, client: Client) -> None:
    async with AsyncClient(server.address) as other:
        updates = other.watch_models()
        assert isinstance(await anext(updates), ModelsSnapshot)
        assert (await other.load_model("m")).model.version == 2
        assert (await other.set_alias("m", "canary", 1)).previous_version == 0
        async for update in updates:
            if update == ModelChange("alias_set", "m", 1, "canary"):
                break
        assert (await other.delete_alias("m", "canary")).previous_version == 1
        await updates.aclose()
        with pytest.raises(InvalidName):
            await other.unload_model("m:1")
        with pytest.raises(InvalidReference):
            await other.load_model("m:1:2")


def test_watchers_are_bounded(client: Client) -> None:
    watches = [client.watch_models() for _ in range(MAX_WATCHERS)]
    try:
        for each in watches:
            next(each)
        with pytest.raises(QueueFull):
            next(client.watch_models())
    finally:
        for each in watches:
            each.close()
    wait_for(lambda: watches_again(client))


def watches_again(client: Client) -> bool:
    updates = client.watch_models()
    try:
        return isinstance(next(updates), ModelsSnapshot)
    except QueueFull:
        return False
    finally:
        updates.close()


def test_a_server_that_stops_says_so_at_once(tmp_path: Path) -> None:
    server = InProcess(tmp_path)
    watch = Watch(server.address)
    try:
        # There is no volume yet, and so no models.
        assert watch.told == [ModelsSnapshot(())]
        server.loop.call_soon_threadsafe(server.stop.set)
        # Before the grace is over that calls under way have, and then are cut off without a word.
        wait_for(lambda: watch.error is not None)
        assert type(watch.error) is Unavailable
        assert "the server is stopping" in str(watch.error)
    finally:
        server.close()
        watch.close()


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Volume]:
    """A volume with a model, mounted so that nobody can write it."""
    kept, home = tmp_path / "kept", tmp_path / "home"
    publish_classifier(Volume(kept), "m", "run-m")
    home.mkdir()
    for options in (["--bind", str(kept), str(home)], ["-o", "remount,bind,ro", str(home)]):
        mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
        if mounted.returncode:
            subprocess.run(["umount", str(home)], capture_output=True)
            pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    try:
        yield Volume(home)
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_a_volume_that_is_read_only_is_said_in_one_line(read_only: Volume) -> None:
    server = InProcess(read_only.home)
    request = pb.SetAliasRequest(name="m", alias="production", version=1)
    try:
        with Client(server.address) as client, grpc.insecure_channel(server.address) as channel:
            with pytest.raises(VolumeReadOnly, match="this server can't write the volume"):
                client.set_alias("m", "production", 1)
            with pytest.raises(grpc.RpcError) as caught:
                rpc.ModelsStub(channel).SetAlias(request)  # type: ignore[no-untyped-call]
            error: Any = caught.value
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
            assert client.classify("m", [png(0)]).model.version == 1
    finally:
        server.close()
    assert Registry(read_only).aliases("m") == {"latest": 1, "best": 1}


def test_the_commands(
    server: InProcess,
    volume: Volume,
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tandem.cli.main import main

    def tandem(*arguments: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["tandem", "models", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        assert caught.value.code == code, printed.err
        return printed.err if code else printed.out

    monkeypatch.setenv("TANDEM_HOME", str(volume.home))
    monkeypatch.setenv("TANDEM_INFERENCE_ADDRESS", server.address)
    assert "m:1 (squeezenet1_1, float32) answers" in tandem("load", "m:1")
    assert json.loads(tandem("load", "m", "--json"))["model"]["version"] == 2
    assert tandem("alias", "m", "live", "1") == "m@live is m:1\n"
    assert json.loads(tandem("alias", "m", "live", "2", "--local", "--json")) == {
        "name": "m",
        "aliases": {"latest": 2, "best": 1, "live": 2},
        "previous_version": 1,
    }
    assert tandem("alias", "m", "live", "--delete") == "m@live is gone, before m:2\n"
    assert "give a VERSION, or --delete" in tandem("alias", "m", "live", code=2)
    assert "moves by itself" in tandem("alias", "m", "latest", "1", code=1)
    assert "versions that were in memory: 1, 2" in tandem("unload", "m")
    assert json.loads(tandem("unload", "m", "--json")) == {"name": "m", "versions": []}
    tandem("load", "m")


def test_the_watch_of_the_command_line(server: InProcess, client: Client) -> None:
    client.load_model("m")
    environment = {"TANDEM_INFERENCE_ADDRESS": server.address, "PATH": "/usr/bin:/bin", "HOME": "/nowhere"}
    command = [sys.executable, "-m", "tandem", "models", "watch", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            models = {model["name"]: model for model in json.loads(process.stdout.readline())["models"]}
            assert models["m"]["versions"] == [1, 2]
            client.set_alias("m", "seen", 1)
            for line in process.stdout:
                if json.loads(line)["kind"] == "alias_set":
                    break
            client.delete_alias("m", "seen")
        finally:
            process.send_signal(2)
        assert process.wait(240) == 130
