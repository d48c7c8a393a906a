"""The calls of the inference service, over gRPC, against a real server with real checkpoints of small networks."""

import asyncio
import json
from collections.abc import Iterator

import grpc
import pytest
from factories import (
    CLASS_IDS,
    MODELS,
    break_weights,
    png,
    publish_classifier,
    publish_language_model,
    write_image_dataset,
)
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from inference_server import ServerProcess, start_server, wait_for

from tandem.client import (
    AsyncClient,
    Client,
    Comparison,
    ComparisonProgress,
    GenerationSummary,
    Image,
    SamplingOptions,
    TextPiece,
)
from tandem.errors import (
    CheckpointCorrupt,
    DatasetNotFound,
    DeadlineExceeded,
    InvalidPrompt,
    InvalidReference,
    InvalidRequest,
    LimitExceeded,
    ModelNotFound,
    RunNotFound,
    ServerUnavailable,
    TandemError,
)
from tandem.volume import Volume
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

BROKEN_PLACES = (3, 40)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    volume = Volume(directory / "home")
    publish_classifier(volume, "a", "run-a", seed=0)
    publish_classifier(volume, "b", "run-b", seed=1, classes=CLASS_IDS[::-1])
    publish_classifier(volume, "three", "run-three", seed=2, classes=CLASS_IDS[:3], arch="shufflenet_v2_x0_5")
    for model in MODELS:
        publish_language_model(volume, model, f"run-{model}", model)
    write_image_dataset(volume, "shapes", 70, BROKEN_PLACES)
    server = start_server(directory, volume)
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.log.read_text()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as client:
        client.wait_until_serving("Transformer")
        client.wait_until_serving("a")
        yield client


def text_of(client: Client, model: str, seed: int, max_words: int = 60, prompt: str | None = None) -> str:
    pieces = client.generate(model, prompt, max_words, SamplingOptions(seed=seed))
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


class TestClassify:
    def test_one_image(self, client: Client) -> None:
        answer = client.classify("a", [("one.png", png(1))])
        assert (answer.model.label, answer.model.architecture, answer.model.dtype) == (
            "a:1",
            "squeezenet1_1",
            "float32",
        )
        (result,) = answer.results
        assert result.name == "one.png"
        assert len(result.top_k) == 5
        assert sum(each.probability for each in result.top_k) == pytest.approx(1, abs=1e-5)
        assert sorted(result.top_k, key=lambda each: -each.probability) == list(result.top_k)
        assert result.top_k[0].words == f"thing {result.top_k[0].id[1:]}"
        assert answer.timings.compute_ms > 0

    def test_alone_and_among_forty_the_probabilities_are_identical(self, client: Client) -> None:
        for model in ("a", "three"):
            together = client.classify(model, [png(number) for number in range(41)]).results
            alone = [client.classify(model, [png(number)]).results[0] for number in range(41)]
            assert tuple(alone) == together

    def test_a_broken_image_fails_alone(self, client: Client) -> None:
        images = [png(0), b"junk", png(1), b"", png(2)[:200]]
        results = client.classify("a", images).results
        assert [bool(result.error) for result in results] == [False, True, False, True, True]
        assert results[0] == client.classify("a", [png(0)]).results[0]
        assert all(not result.top_k for result in results if result.error)

    def test_all_broken_is_still_an_answer(self, client: Client) -> None:
        assert all(result.error for result in client.classify("a", [b"x", b"y"]).results)

    def test_top_k(self, client: Client) -> None:
        assert [len(client.classify("three", [png(1)], top_k).results[0].top_k) for top_k in (0, 1, 2, 99)] == [
            3,
            1,
            2,
            3,
        ]
        with pytest.raises(InvalidRequest, match="top_k is -1") as caught:
            client.classify("a", [png(1)], -1)
        assert caught.value.field == "top_k"

    def test_many_go_out_in_several_messages(self, client: Client) -> None:
        answer = client.classify("a", [(str(number), png(number % 5)) for number in range(600)], 1)
        assert [result.name for result in answer.results] == [str(number) for number in range(600)]

    @pytest.mark.parametrize(
        ("reference", "kind"),
        [
            ("nope", ModelNotFound),
            ("a:9", ModelNotFound),
            ("a@production", ModelNotFound),
            ("run:nope", RunNotFound),
            ("../a", InvalidReference),
            ("", InvalidReference),
            ("LSTM", InvalidRequest),
        ],
    )
    def test_a_wrong_model(self, client: Client, reference: str, kind: type[TandemError]) -> None:
        with pytest.raises(kind):
            client.classify(reference, [png(0)])

    def test_no_images_and_too_many(self, server: ServerProcess, client: Client) -> None:
        with pytest.raises(InvalidRequest, match="no images"):
            client.classify("a", [])
        with grpc.insecure_channel(server.address) as channel:
            stub = rpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
            with pytest.raises(grpc.RpcError, match="limit is 1024"):
                stub.Classify(pb.ClassifyRequest(model="a", images=[pb.Image(data=b"x")] * 1025))
            with pytest.raises(grpc.RpcError) as caught:
                stub.Classify(pb.ClassifyRequest(model="a", images=[pb.Image(data=bytes(65 << 20))]))
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(LimitExceeded):
            client.classify("a", [bytes(65 << 20)])

    def test_a_deadline_is_honoured(self, server: ServerProcess) -> None:
        with Client(server.address, timeout_s=0.002) as hasty, pytest.raises(DeadlineExceeded):
            hasty.classify("a", [png(number) for number in range(200)])

    def test_a_run_is_a_model_too(self, client: Client) -> None:
        answer = client.classify("run:run-a/1", [png(0)])
        assert answer.model.label == "run:run-a/1"
        assert answer.results == client.classify("a", [png(0)]).results


class TestCompare:
    @pytest.mark.parametrize("count", [1, 2, 33, 70])
    def test_a_model_agrees_with_itself_at_any_batch_size(self, client: Client, count: int) -> None:
        answer = client.compare("three", "three:1", [png(number) for number in range(count)])
        assert answer.summary.num_images == count
        assert answer.summary.num_disagreements == 0
        assert all(result.a == result.b for result in answer.results)

    def test_classes_are_matched_by_id(self, client: Client) -> None:
        images = [Image(png(number), f"{number}.png", CLASS_IDS[number % 5]) for number in range(20)]
        answer = client.compare("a", "b", images)
        for number, result in enumerate(answer.results):
            first = client.classify("a", [png(number)]).results[0].top_k[0].id
            second = client.classify("b", [png(number)]).results[0].top_k[0].id
            assert result.agree == (first == second)
        table = answer.summary.labelled
        assert table is not None
        assert table.num_examples == 20
        right_a = sum(result.a[0].id == result.label for result in answer.results)
        assert table.accuracy_a == right_a / 20

    def test_what_can_not_be_known_is_left_out(self, client: Client) -> None:
        assert client.compare("a", "b", [png(0)]).summary.labelled is None
        foreign = client.compare("a", "b", [Image(png(0), label="elsewhere")])
        assert foreign.summary.labelled is None
        answer = client.compare("a", "b", [png(0), b"junk"])
        assert (answer.summary.num_images, answer.summary.num_errors) == (1, 1)
        assert len(answer.failures) == 1

    def test_a_dataset_with_progress(self, client: Client) -> None:
        steps = list(client.compare_dataset("a", "b", "shapes"))
        assert all(isinstance(step, ComparisonProgress) for step in steps[:-1])
        assert steps[0] == ComparisonProgress(0, 70)
        answer = steps[-1]
        assert isinstance(answer, Comparison)
        assert answer.summary.num_images == 68
        assert {result.name for result in answer.failures} == {
            f"val/{CLASS_IDS[place % 5]}/val_{place}.png" for place in BROKEN_PLACES
        }
        assert answer.summary.num_disagreements == len(answer.disagreements)
        assert answer.summary.labelled is not None
        assert answer.summary.labelled.num_examples == 68
        inline = client.compare("a", "b", [Image(png(5), "x", CLASS_IDS[0])]).results[0]
        if not inline.agree:
            (same,) = [each for each in answer.disagreements if each.name.endswith("/val_5.png")]
            assert (same.a, same.b) == (inline.a, inline.b)

    def test_a_dataset_with_itself_and_a_limit(self, client: Client) -> None:
        *_, answer = client.compare_dataset("three", "three", "shapes", limit=10)
        assert isinstance(answer, Comparison)
        assert (answer.summary.num_images, answer.summary.num_disagreements) == (9, 0)

    def test_wrong_requests(self, client: Client) -> None:
        with pytest.raises(InvalidRequest, match="LSTM:1 is a language model") as caught:
            client.compare("a", "LSTM", [png(0)])
        assert caught.value.field == "model_b"
        for dataset, split in (("nope", "val"), ("shapes", "test")):
            with pytest.raises(DatasetNotFound):
                list(client.compare_dataset("a", "b", dataset, split))
        for dataset, split in (("../x", "val"), ("shapes", "../val")):
            with pytest.raises(InvalidRequest):
                list(client.compare_dataset("a", "b", dataset, split))


class TestGenerate:
    @pytest.mark.parametrize("model", MODELS)
    def test_text_comes_in_pieces_and_ends_with_a_summary(self, client: Client, model: str) -> None:
        *pieces, summary = client.generate(model, "the cat", 150, SamplingOptions(seed=4))
        assert isinstance(summary, GenerationSummary)
        assert len(pieces) > 1
        words = [word for piece in pieces if isinstance(piece, TextPiece) for word in piece.words]
        assert len(words) == summary.num_words == 150
        assert (summary.num_prompt_tokens, summary.seed, summary.finish_reason) == (2, 4, "length")
        assert summary.model.architecture == model
        assert "<unk>" not in words
        assert 0 < summary.mean_negative_log_probability < 20

    @pytest.mark.parametrize("model", ["LSTM", "Transformer"])
    def test_the_same_seed_gives_the_same_words(self, client: Client, model: str) -> None:
        assert text_of(client, model, 7) == text_of(client, model, 7)
        assert text_of(client, model, 7) != text_of(client, model, 8)
        assert text_of(client, model, 7, 20) == text_of(client, model, 7, 60)[: len(text_of(client, model, 7, 20))]

    async def test_neighbours_do_not_change_the_words(self, server: ServerProcess, client: Client) -> None:
        cases = [(model, seed) for model in ("LSTM", "Transformer") for seed in range(4)]
        alone = [text_of(client, model, seed, 150) for model, seed in cases]

        async def write(shared: AsyncClient, model: str, seed: int) -> str:
            pieces = shared.generate(model, None, 150, SamplingOptions(seed=seed))
            return "".join([piece.text async for piece in pieces if isinstance(piece, TextPiece)])

        async with AsyncClient(server.address) as shared:
            texts, classified = await asyncio.gather(
                asyncio.gather(*(write(shared, *case) for case in cases)),
                asyncio.gather(*(shared.classify("a", [png(number)]) for number in range(20))),
            )
        assert texts == alone
        assert len(classified) == 20

    def test_a_seed_is_picked_and_told(self, client: Client) -> None:
        *pieces, summary = client.generate("GRU", None, 30)
        assert isinstance(summary, GenerationSummary)
        text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
        assert text_of(client, "GRU", summary.seed, 30) == text

    def test_greedy_text_has_no_chance_in_it(self, client: Client) -> None:
        texts = set()
        for seed in (1, 2):
            pieces = client.generate("LSTM", "the dog", 20, SamplingOptions(temperature=0.0, seed=seed))
            texts.add("".join(piece.text for piece in pieces if isinstance(piece, TextPiece)))
        assert len(texts) == 1

    def test_a_long_prompt_and_unknown_words(self, client: Client) -> None:
        *_, summary = client.generate("GRU", "the cat zebra\n" * 300 + "zebra yak", 3)
        assert isinstance(summary, GenerationSummary)
        assert summary.unknown_words == ("zebra", "yak")
        assert summary.num_prompt_tokens == 300 * 4 + 2

    @pytest.mark.parametrize("prompt", ["", "  \n"])
    def test_an_empty_prompt(self, client: Client, prompt: str) -> None:
        with pytest.raises(InvalidPrompt, match="the prompt is empty") as caught:
            list(client.generate("LSTM", prompt))
        assert caught.value.field == "prompt"

    def test_an_overlong_prompt(self, client: Client) -> None:
        with pytest.raises(InvalidPrompt, match="65,536"):
            list(client.generate("LSTM", "the " * 65_537))

    @pytest.mark.parametrize(
        ("max_words", "sampling", "field"),
        [
            (100_001, SamplingOptions(), "sampling.max_words"),
            (-1, SamplingOptions(), "sampling.max_words"),
            (1, SamplingOptions(temperature=-1.0), "sampling.temperature"),
            (1, SamplingOptions(temperature=float("nan")), "sampling.temperature"),
            (1, SamplingOptions(top_p=1.5), "sampling.top_p"),
            (1, SamplingOptions(top_k=-1), "sampling.top_k"),
        ],
    )
    def test_nonsense_is_refused_with_its_field(
        self, client: Client, max_words: int, sampling: SamplingOptions, field: str
    ) -> None:
        with pytest.raises(InvalidRequest) as caught:
            list(client.generate("LSTM", None, max_words, sampling))
        assert caught.value.field == field

    def test_numbers_that_no_field_holds(self, client: Client) -> None:
        with pytest.raises(InvalidRequest):
            list(client.generate("LSTM", None, 10**12))

    def test_a_classifier_does_not_write(self, client: Client) -> None:
        with pytest.raises(InvalidRequest, match="a:1 is a classifier"):
            list(client.generate("a"))

    async def test_a_storm_of_cancelled_texts_leaves_the_server_well(self, server: ServerProcess) -> None:
        async def leave(client: AsyncClient, seed: int) -> None:
            async for _ in client.generate("LSTM", None, 100_000, SamplingOptions(seed=seed)):
                break

        async with AsyncClient(server.address) as client:
            await asyncio.gather(*(leave(client, seed) for seed in range(40)))
            answer = await asyncio.wait_for(client.classify("a", [png(0)]), 5)
            assert not answer.results[0].error


class TestModels:
    def test_list_and_get(self, client: Client) -> None:
        models = {model.name: model for model in client.list_models()}
        assert models["a"].kind == "classifier"
        assert models["LSTM"].kind == "language_model"
        assert models["a"].aliases == {"latest": 1, "best": 1}
        assert models["a"].loaded == (1,)
        details = client.get_model("b")
        assert details.class_ids == CLASS_IDS[::-1]
        assert (details.image_size, details.vocabulary_size) == (32, 0)
        assert client.get_model("LSTM").vocabulary_size > 10
        with pytest.raises(ModelNotFound):
            client.get_model("nope")

    def test_health_and_reflection(self, server: ServerProcess, client: Client) -> None:
        with grpc.insecure_channel(server.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "tandem.v1.Inference", "models/a", "models/LSTM"):
                answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                stub.Check(health_pb2.HealthCheckRequest(service="models/nope"))
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            assert {"tandem.v1.Inference", "tandem.v1.Models", "grpc.health.v1.Health"} <= set(
                ProtoReflectionDescriptorDatabase(channel).get_services()
            )
        with pytest.raises(DeadlineExceeded, match="'nope' is not served"):
            client.wait_until_serving("nope", timeout_s=0.3)

    def test_models_appear_and_are_swapped_without_a_restart(self, server: ServerProcess, client: Client) -> None:
        with pytest.raises(ModelNotFound):
            client.classify("new", [png(0)])
        publish_classifier(server.volume, "new", "run-new-1", seed=3)
        client.wait_until_serving("new", timeout_s=10)
        assert client.classify("new", [png(0)]).model.version == 1
        publish_classifier(server.volume, "new", "run-new-2", seed=4)
        wait_for(lambda: client.classify("new", [png(0)]).model.version == 2)
        assert client.classify("new:1", [png(0)]).model.version == 1

    def test_a_broken_version_is_refused_and_the_old_one_goes_on(self, server: ServerProcess, client: Client) -> None:
        publish_classifier(server.volume, "torn", "run-torn-1", seed=5)
        client.wait_until_serving("torn", timeout_s=10)
        before = client.classify("torn", [png(0)])
        # Broken before it is published, so that the server never sees it whole.
        version = publish_classifier(server.volume, "staged", "run-torn-2", seed=6)
        break_weights(server.volume, version)
        document = json.loads((server.volume.model("staged") / "versions" / "0001.json").read_bytes())
        document.update(name="torn", version=2)
        (server.volume.model("torn") / "versions" / "0002.json").write_text(json.dumps(document))
        (server.volume.model("torn") / "aliases.json").write_text('{"latest": 2, "best": 2}')
        wait_for(lambda: "torn:2 can't be loaded" in server.log.read_text())
        assert client.classify("torn", [png(0)]).results == before.results
        assert client.classify("torn@latest", [png(0)]).model.version == 1
        with pytest.raises(CheckpointCorrupt, match="torn:2 can't be served") as caught:
            client.classify("torn:2", [png(0)])
        # No path of the server's crosses the wire.
        assert str(server.volume.home) not in str(caught.value)
        client.wait_until_serving("torn", timeout_s=1)


def test_a_server_that_is_not_there() -> None:
    with Client("127.0.0.1:1", timeout_s=5) as client, pytest.raises(ServerUnavailable, match="127.0.0.1:1.*tandem up"):
        client.classify("a", [png(0)])
