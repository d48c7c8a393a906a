"""Shadows in a real server: what callers get, what is found, and how one ends; over gRPC and from the command line."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from factories import CLASS_IDS, break_weights, png, publish_classifier, publish_language_model
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from open_inference import InProcess
from terminal import Terminal
from waiting import PATIENCE_S, held, until, wait_for

from services.inference import shadow as state
from services.inference import shadow_runs, shadows
from services.inference.loading import ServedClassifier
from services.inference.server import Running, running_server
from tandem.checkpoints.registry import Registry
from tandem.client import AsyncClient, Classification, Client, ClientAccess, Image, ShadowReport
from tandem.errors import Conflict, InvalidRequest, ModelNotFound, PermissionDenied, TandemError
from tandem.settings import Settings
from tandem.volume import Volume
from tandem.wire.status import DETAILS_KEY
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

IMAGES = [Image(png(number), f"{number}.png", CLASS_IDS[number % 5]) for number in range(40)]


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """On a busy machine nothing is to be dropped because it takes long; tests that want that say so."""
    monkeypatch.setattr(shadow_runs, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(shadow_runs, "MAX_HOLD_S", PATIENCE_S)
    return monkeypatch


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    """Versions 1 to 3 of `m`, `production` being 1, which has the weights of 3."""
    volume = Volume(tmp_path / "home")
    for version, seed in ((1, 12), (2, 13), (3, 12)):
        publish_classifier(volume, "m", f"run-{version}", seed=seed)
    Registry(volume).set_alias("m", "production", 1, "test")
    return volume


def environment(volume: Volume) -> dict[str, str]:
    # Whose networks can be listened to.
    where = {"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": str(volume.home)}
    return {**where, "TANDEM_DEVICE": "cpu", "TANDEM_ENGINE": "eager"}


@pytest.fixture
async def running(volume: Volume, patient: pytest.MonkeyPatch) -> AsyncIterator[Running]:
    async with running_server(Settings.from_environment(environment(volume))) as running:
        yield running


@pytest.fixture
async def client(running: Running) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(running.address, timeout_s=PATIENCE_S) as client:
        # Before a shadow is there.
        await client.classify("m@production", IMAGES[:1])
        yield client


async def listen(running: Running, reference: str, hook: Callable[[int], object]) -> None:
    """Call `hook` with the size of each batch of a classifier, before its network sees it."""
    served = await running.engine.models.get(reference)
    assert isinstance(served, ServedClassifier)
    network: Any = cast(Any, served.runtime)._network
    network.register_forward_pre_hook(lambda _, inputs: (hook(inputs[0].shape[0]), None)[1])


async def shadowed(client: AsyncClient, count: int) -> ShadowReport:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            (report,) = await client.get_shadows("m", "production")
            if report.num_shadowed == count:
                return report
            await asyncio.sleep(0.01)


async def test_answers_are_the_same_and_the_table_is_that_of_compare(client: AsyncClient) -> None:
    before = await client.classify("m@production", IMAGES)
    begun = await client.start_shadow("m", "production", "m:2", 1.0)
    assert (begun.summary.a.label, begun.summary.b.label) == ("m:1", "m:2")
    assert (begun.num_seen, begun.num_shadowed, begun.summary.evidence) == (0, 0, None)
    parts = [await client.classify("m@production", IMAGES[first:end]) for first, end in ((0, 1), (1, 8), (8, 40))]
    assert tuple(result for part in parts for result in part.results) == before.results
    report = await shadowed(client, 40)
    assert report.summary == (await client.compare("m:1", "m:2", IMAGES)).summary
    assert report.summary.labelled is not None
    assert (report.num_seen, report.num_waiting, set(report.num_dropped.values())) == (40, 0, {0})
    # An image that does not decode is nobody's; a stream's calls count as others do.
    answers = [each async for each in client.classify_stream("m@production", [*IMAGES[:3], Image(b"junk")])]
    assert [bool(result.error) for result in answers[0].results] == [False, False, False, True]
    await shadowed(client, 43)


async def test_a_model_agrees_with_itself(client: AsyncClient) -> None:
    await client.start_shadow("m", "production", "m:3", 1.0)
    await client.classify("m@production", [image.data for image in IMAGES])
    evidence = (await shadowed(client, 40)).summary.evidence
    assert evidence is not None
    assert (evidence.num_disagreements, evidence.divergence) == (0, 0.0)
    assert evidence.labelled is None, "no label, no table"


async def test_a_share_of_the_calls_by_that_name(client: AsyncClient) -> None:
    await client.start_shadow("m", "production", "m:2", 0.25)
    for _ in range(3):
        for reference in ("m@production", "m@production", "m@production", "m@production", "m", "m:1", "m@latest"):
            await client.classify(reference, IMAGES[:2])
    report = await shadowed(client, 6)
    assert (report.num_seen, report.num_waiting) == (24, 0)
    # A name alone is its latest.
    await client.start_shadow("m", "latest", "m:2", 1.0)
    await client.classify("m", IMAGES[:2])
    assert [(each.alias, each.num_seen) for each in await client.get_shadows()] == [("latest", 2), ("production", 24)]


async def test_a_candidate_that_fails_is_nothing_to_callers(running: Running, client: AsyncClient) -> None:
    before = await client.classify("m@production", IMAGES)
    await client.start_shadow("m", "production", "m:2", 1.0)
    await listen(running, "m:2", lambda _: 1 // 0)
    async with asyncio.timeout(PATIENCE_S):
        while not (report := (await client.get_shadows())[0]).ended:
            assert (await client.classify("m@production", IMAGES)).results == before.results
            await until(lambda: not running.engine.shadows.num_images)
    assert report.num_dropped["failed"] >= state.MAX_TROUBLES
    assert "the server's log says how" in report.ended
    assert (await client.classify("m@production", IMAGES)).results == before.results


async def test_a_candidate_that_hangs_is_nothing_to_callers(
    running: Running, client: AsyncClient, patient: pytest.MonkeyPatch
) -> None:
    before = await client.classify("m@production", IMAGES)
    opened, entered = threading.Event(), threading.Event()
    await client.start_shadow("m", "production", "m:2", 1.0)

    def hang(_: int) -> None:
        entered.set()
        opened.wait(PATIENCE_S)

    await listen(running, "m:2", hang)
    # Long enough for the version that answers, whatever else the machine does.
    patient.setattr(shadow_runs, "MAX_HOLD_S", 3.0)
    patient.setattr(shadow_runs, "REST", 0)
    try:
        await client.classify("m@production", IMAGES)
        await until(entered.is_set)
        for _ in range(5):
            assert (await client.classify("m@production", IMAGES)).results == before.results
        await until(lambda: running.engine.shadows.all()[0].ended)
    finally:
        opened.set()


async def test_calls_go_first(running: Running, client: AsyncClient) -> None:
    passes = list[tuple[str, int]]()
    await client.start_shadow("m", "production", "m:2", 0.5)
    for name in ("m:1", "m:2"):
        await listen(running, name, lambda size, name=name: passes.append((name, size)))  # type: ignore[misc]
    await client.classify("m@production", IMAGES[:3])
    async with held(running.engine.scheduler):
        # Held by no call, so that the shadow asks for a turn.
        running.engine.shadows.offer("m@production", *await handed(running))
        await until(lambda: running.engine.scheduler.num_waiting == 1)
        asking = [asyncio.create_task(client.classify("m:1", IMAGES[:count])) for count in (5, 7)]
        await until(lambda: running.engine.scheduler.num_waiting == 13)
    await asyncio.gather(*asking)
    await shadowed(client, 4)
    assert passes[:2] == [("m:1", 3), ("m:1", 12)]
    assert passes[2] == ("m:1", 2), "the shadow begins with one image, which is run in a batch of two"
    assert max(size for _, size in passes[2:]) <= state.MAX_BATCH


async def handed(running: Running) -> Any:
    """Return what a call of four images would hand over."""
    engine = running.engine
    served: Any = await engine.models.get("m@production")
    images: Any = IMAGES[:4]
    sources: Any = [lambda image=image: image.data for image in images]
    return served, images, await engine.decoder.decode(sources, [served.card.preprocessing])


async def test_a_flood_is_answered_and_what_waits_is_bounded(
    running: Running, client: AsyncClient, patient: pytest.MonkeyPatch
) -> None:
    patient.setattr(shadows, "MAX_WAITING_IMAGES", 30)
    most = 0

    def look(_: int) -> None:
        nonlocal most
        most = max(most, running.engine.shadows.num_images)

    await listen(running, "m:1", look)
    before = await client.classify("m@production", IMAGES[:10])
    await client.start_shadow("m", "production", "m:2", 1.0)

    async def call() -> Classification:
        return await client.classify("m@production", IMAGES[:10])

    answers = await asyncio.gather(*(call() for _ in range(200)))
    assert {answer.results for answer in answers} == {before.results}
    await until(lambda: not running.engine.shadows.num_images)
    (report,) = await client.get_shadows()
    assert (report.num_seen, report.num_waiting) == (2000, 0)
    assert report.num_dropped["full"] + report.num_shadowed == 2000
    assert 0 < most <= 30


async def test_it_ends_when_the_alias_moves(client: AsyncClient) -> None:
    await client.start_shadow("m", "production", "m:2", 1.0)
    await client.classify("m@production", IMAGES)
    await shadowed(client, 40)
    await client.set_alias("m", "production", 2)
    assert (await client.classify("m@production", IMAGES)).model.version == 2
    (report,) = await client.get_shadows()
    assert report.ended == "m@production is m:2 now, and was m:1"
    assert (report.num_seen, report.num_shadowed) == (40, 40), "what was found is kept"
    again = await client.start_shadow("m", "production", "m:3", 1.0)
    assert (again.summary.a.label, again.num_seen, again.ended) == ("m:2", 0, "")
    await client.delete_alias("m", "production")
    assert (await client.get_shadows())[0].ended == "m@production is gone"
    assert (await client.stop_shadow("m", "production")).ended == "m@production is gone"
    assert await client.get_shadows() == ()


async def test_it_ends_with_its_candidate(client: AsyncClient, volume: Volume) -> None:
    publish_classifier(volume, "rival", "run-rival", seed=7)
    await client.start_shadow("m", "production", "rival:1", 1.0)
    await client.classify("m@production", IMAGES[:4])
    await shadowed(client, 4)
    await client.unload_model("rival")
    assert "rival:1 is no longer in memory" in (await client.get_shadows())[0].ended
    assert not (await client.classify("m@production", IMAGES[:1])).results[0].error


async def test_what_can_not_be_a_shadow_is_refused_and_harms_nothing(client: AsyncClient, volume: Volume) -> None:
    publish_language_model(volume, "words", "run-l")
    publish_classifier(volume, "plants", "run-p", classes=("oak", "ash"))
    break_weights(volume, publish_classifier(volume, "torn", "run-torn", seed=6))
    for candidate, error, said in (
        ("words:1", InvalidRequest, "is a language model"),
        ("plants:1", InvalidRequest, "no class in common"),
        ("run:run-1/1", InvalidRequest, "name a version, as NAME:VERSION"),
        ("m:9", ModelNotFound, "no version 9"),
        ("torn:1", TandemError, "can't be served"),
    ):
        with pytest.raises(error, match=said):
            await client.start_shadow("m", "production", candidate, 1.0)
    with pytest.raises(ModelNotFound, match="no alias 'staging'"):
        await client.start_shadow("m", "staging", "m:2", 1.0)
    await client.start_shadow("m", "production", "m:2", 1.0)
    with pytest.raises(Conflict, match="m@production has a shadow, m:2: stop it first"):
        await client.start_shadow("m", "production", "m:3", 1.0)
    with pytest.raises(ModelNotFound, match="m@latest has no shadow"):
        await client.stop_shadow("m", "latest")
    assert not (await client.classify("m@production", IMAGES[:1])).results[0].error


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"share": 0}, "share"),
    ({"share": -0.1}, "share"),
    ({"share": 1.1}, "share"),
    ({"share": float("nan")}, "share"),
    ({"name": "../m"}, "name"),
    ({"name": "m:1"}, "name"),
    ({"alias": ""}, "alias"),
    ({"alias": "a/b"}, "alias"),
    ({"candidate": ""}, "candidate"),
    ({"candidate": "../m"}, "candidate"),
    ({"candidate": "run:run-1/1"}, "candidate"),
]


@pytest.fixture
def host(volume: Volume, patient: pytest.MonkeyPatch) -> Iterator[InProcess]:
    host = InProcess(volume.home)
    try:
        yield host
    finally:
        host.close()


def test_each_wrong_argument_is_named(host: InProcess) -> None:
    for wrong, field in WRONG:
        request: Any = {"name": "m", "alias": "production", "candidate": "m:2", "share": 0.5, **wrong}
        with grpc.insecure_channel(host.address) as channel, pytest.raises(grpc.RpcError) as caught:
            rpc.ModelsStub(channel).StartShadow(pb.StartShadowRequest(**request))  # type: ignore[no-untyped-call]
        error: Any = caught.value
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, wrong
        rich = status_pb2.Status.FromString(dict(error.trailing_metadata())[DETAILS_KEY])
        bad = error_details_pb2.BadRequest()
        assert any(detail.Unpack(bad) for detail in rich.details)
        assert [each.field for each in bad.field_violations] == [field], wrong


def test_only_admins_start_and_stop(volume: Volume, tmp_path: Path) -> None:
    predicts, administers = "predict-token-of-the-test", "admin-token-of-the-test-1"
    tokens = tmp_path / "tokens"
    tokens.write_text(f"predict {predicts}\nadmin {administers}\n")
    tokens.chmod(0o600)
    clients = []
    host = InProcess(volume.home, TANDEM_TOKENS_FILE=str(tokens))
    try:
        for token in (predicts, administers):
            path = tmp_path / token
            path.write_text(f"{token}\n")
            path.chmod(0o600)
            clients.append(Client(host.address, PATIENCE_S, ClientAccess(token_file=path)))
        reader, admin = clients
        with pytest.raises(PermissionDenied, match="lacks the scope admin"):
            reader.start_shadow("m", "production", "m:2", 0.5)
        admin.start_shadow("m", "production", "m:2", 0.5)
        assert [each.share for each in reader.get_shadows()] == [0.5]
        with pytest.raises(PermissionDenied, match="lacks the scope admin"):
            reader.stop_shadow("m", "production")
        admin.stop_shadow("m", "production")
        assert reader.get_shadows() == ()
    finally:
        for client in clients:
            client.close()
        host.close()


@pytest.fixture
def tandem(host: InProcess, patient: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    patient.setenv("TANDEM_HOME", str(host.settings.home))
    patient.setenv("TANDEM_INFERENCE_ADDRESS", host.address)
    return Terminal(patient, capsys)


def test_the_command(tandem: Terminal, host: InProcess) -> None:
    shadow = ("models", "shadow", "m@production")
    assert tandem("models", "shadow") == "no shadows on this server\n"
    said = tandem(*shadow, code=1)
    assert "m@production has no shadow on this server: --candidate NAME:VERSION starts one" in said
    assert "m:2 sees 0.1 of the calls of m@production\nimages: 0 came" in tandem(*shadow, "--candidate", "m:2")
    assert tandem.json(*shadow, "--stop")["ended"] == "it was stopped"
    begun = tandem.json(*shadow, "--candidate", "m:2", "--share", "1")
    assert (begun["share"], begun["ended"], begun["num_images"], begun["agreement"]) == (1.0, None, 0, None)
    with Client(host.address) as client:
        client.classify("m@production", IMAGES)
        wait_for(lambda: client.get_shadows()[0].num_shadowed == 40)
        compared = client.compare("m:1", "m:2", IMAGES).summary
    document = tandem.json(*shadow)
    assert compared.evidence is not None
    assert document["kappa"] == compared.evidence.kappa
    assert document["divergence_bits"] == compared.evidence.divergence
    assert document["mcnemar"]["num_labelled"] == 40
    assert (document["num_seen"], document["num_shadowed"], document["num_waiting"]) == (40, 40, 0)
    assert document["num_dropped"] == dict.fromkeys(sorted(state.REASONS), 0)
    assert tandem.json("models", "shadow")[0].keys() == document.keys()
    printed = tandem(*shadow)
    assert "images: 40 came, 40 were seen by both, 0 wait; dropped: none" in printed
    assert "bits apart (Jensen-Shannon)" in printed
    assert "of 40 with a known class: only a right" in printed
    assert "it has ended: it was stopped" in tandem(*shadow, "--stop")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["m:1"], 1, "m:1 is no alias"),
        (["run:run-1"], 1, "run:run-1 is no alias"),
        (["--stop"], 2, "give NAME@ALIAS"),
        (["m@production", "--stop", "--candidate", "m:2"], 2, "one of the two"),
        (["m@production", "--share", "0.1"], 2, "--share goes with --candidate"),
        (["m@production", "--candidate", "m:2", "--share", "2"], 1, "share is 2; it must be above 0 and at most 1"),
    ],
)
def test_what_makes_no_sense_is_one_line(tandem: Terminal, arguments: list[str], code: int, said: str) -> None:
    assert said in tandem("models", "shadow", *arguments, code=code)
