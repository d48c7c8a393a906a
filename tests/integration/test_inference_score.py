"""Score and Complete, over gRPC: what they say agrees with generation and with evaluation."""

import asyncio
import json
import math
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from factories import MODELS, TEXT, publish_language_model, vocabulary
from inference_server import ServerProcess
from waiting import until

from services.inference.server import running_server
from services.trainer.engine.text_evaluation import Reading, token_losses
from tandem.checkpoints.registry import Registry
from tandem.checkpoints.tensors import load_checkpoint
from tandem.client import AsyncClient, Client, Completion, SamplingOptions
from tandem.errors import DeadlineExceeded, InvalidPrompt, InvalidRequest
from tandem.settings import Settings
from tandem.volume import Volume
from tandem.wire.results import GenerationSummary, TextPiece
from tandem.wire.v1 import inference_pb2 as pb

pytest_plugins = ["inference_fixtures"]

# Longer than a piece, with ends of lines and a word that is not known.
LINES = f"{TEXT}\n" * 5 + "the zebra\n"


def evaluated(volume: Volume, reference: str, token_ids: list[int]) -> list[float]:
    """Return the losses of the tokens after the first, as `tandem evaluate` has them."""
    located = Registry(volume).resolve(reference)
    network = load_checkpoint(located.checkpoint, located.digest).network
    parts = token_losses(network, torch.tensor(token_ids), Reading(torch.device("cpu")))
    return [loss for part in parts for loss in part.tolist()]


@pytest.mark.parametrize("model", MODELS)
def test_it_agrees_with_evaluation(server: ServerProcess, client: Client, model: str) -> None:
    token_ids, unknown = vocabulary().encode(LINES)
    losses = evaluated(server.volume, model, token_ids)
    (result,) = client.score(model, LINES, first_is_given=True).results
    assert [token.token_id for token in result.tokens] == token_ids[1:]
    assert [-token.log_probability for token in result.tokens] == pytest.approx(losses, rel=1e-5, abs=2e-5)
    assert result.summary.mean_log_probability == pytest.approx(-sum(losses) / len(losses), rel=1e-6)
    assert result.summary.perplexity == pytest.approx(math.exp(min(sum(losses) / len(losses), 700)), rel=1e-4)
    assert (result.unknown_words, result.summary.num_unknown, unknown) == (("zebra",), 1, ["zebra"])
    # A split whose first line is empty begins as a text does that is scored whole.
    whole = client.score(model, LINES).summary
    losses = evaluated(server.volume, model, vocabulary().encode("\n" + LINES)[0])
    assert whole.num_tokens == len(losses) == len(token_ids)
    assert whole.sum_log_probability == pytest.approx(-sum(losses), rel=1e-6)


@pytest.mark.parametrize("model", ["LSTM", "Transformer"])
def test_it_agrees_with_what_generation_says_of_its_words(client: Client, model: str) -> None:
    completion = client.complete(model, None, 80, SamplingOptions(seed=5))
    text = " ".join(completion.words).replace("<eos>", "\n")
    (result,) = client.score(model, text).results
    assert [token.token for token in result.tokens] == list(completion.words)
    assert -result.summary.mean_log_probability == pytest.approx(
        completion.summary.mean_negative_log_probability, abs=1e-5
    )


def test_alternatives_are_the_likeliest_and_texts_have_no_neighbours(client: Client) -> None:
    answer = client.score("LSTM", ["the cat sat", LINES, "the cat sat"], num_alternatives=20)
    assert answer.results[0] == answer.results[2] == client.score("LSTM", "the cat sat", 20).results[0]
    for token in answer.results[0].tokens:
        found = [each.log_probability for each in token.alternatives]
        assert found == sorted(found, reverse=True)
        assert len(found) == 20
        own = {each.token_id: each.log_probability for each in token.alternatives}.get(token.token_id)
        assert own is None or own == pytest.approx(token.log_probability, abs=1e-6)
        assert token.log_probability <= found[0] + 1e-6
    assert answer.summary.num_tokens == sum(result.summary.num_tokens for result in answer.results)
    assert (answer.model.label, answer.model.dtype) == ("LSTM:1", "float32")
    assert answer.timings.compute_ms > 0


@pytest.mark.parametrize(
    ("request_", "field", "says"),
    [
        (pb.ScoreRequest(model="LSTM"), "texts", "no texts"),
        (pb.ScoreRequest(model="LSTM", texts=["a"] * 65), "texts", "65 texts in a message; the limit is 64"),
        (pb.ScoreRequest(model="LSTM", texts=["the", " "]), "texts[1]", "has no word"),
        (pb.ScoreRequest(model="LSTM", texts=["the"], first_is_given=True), "texts[0]", "after the first"),
        (pb.ScoreRequest(model="LSTM", texts=["a" * 1024 * 1024, "a"]), "texts", "1,048,576 bytes in all"),
        (pb.ScoreRequest(model="LSTM", texts=["the " * 65_537]), "texts", "65,537 tokens; the limit is 65,536"),
        (pb.ScoreRequest(model="LSTM", texts=["a"], num_alternatives=21), "num_alternatives", "between 0 and 20"),
        (pb.ScoreRequest(model="LSTM", texts=["a"], num_alternatives=-1), "num_alternatives", "between 0 and 20"),
        (
            pb.ScoreRequest(model="LSTM", texts=["the " * 10_000], num_alternatives=11),
            "num_alternatives",
            "110,000; the limit is 100,000",
        ),
        (pb.ScoreRequest(model="a", texts=["the"]), "model", "needs a language model"),
        (pb.ScoreRequest(model="../x", texts=["the"]), "model", "no model reference"),
    ],
)
def test_nonsense_is_refused_with_its_field(client: Client, request_: pb.ScoreRequest, field: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        client.score(request_.model, request_.texts, request_.num_alternatives, request_.first_is_given)
    assert caught.value.field == field


def test_too_many_texts_to_be_read_at_all(server: ServerProcess) -> None:
    data = pb.ScoreRequest(model="LSTM", texts=[""] * 3000).SerializeToString()
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        send(channel, data)
    assert "more than 2,048 parts, which is the limit" in str(caught.value)


def send(channel: Any, data: bytes) -> None:
    channel.unary_unary("/tandem.v1.Inference/Score")(data)


def test_a_text_whole_is_that_of_the_stream(client: Client) -> None:
    sampling = SamplingOptions(seed=9, temperature=0.8)
    *pieces, summary = client.generate("GRU", "the cat", 150, sampling)
    completion = client.complete("GRU", "the cat", 150, sampling)
    assert isinstance(summary, GenerationSummary)
    assert isinstance(completion, Completion)
    told = [piece for piece in pieces if isinstance(piece, TextPiece)]
    assert completion.text == "".join(piece.text for piece in told)
    assert list(completion.words) == [word for piece in told for word in piece.words]
    assert (completion.summary.seed, completion.summary.num_words) == (9, 150)
    assert completion.summary.model == summary.model
    with pytest.raises(InvalidPrompt) as caught:
        client.complete("GRU", " ")
    assert caught.value.field == "prompt"


async def test_both_of_the_asyncio_client(server: ServerProcess, client: Client) -> None:
    async with AsyncClient(server.address) as other:
        assert (await other.score("LSTM", "the cat")).results == client.score("LSTM", "the cat").results
        sampling = SamplingOptions(seed=1)
        assert (await other.complete("LSTM", None, 9, sampling)).words == client.complete(
            "LSTM", None, 9, sampling
        ).words


def test_subwords_are_named_by_their_text(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    publish_language_model(volume, "parts", "run-p", tokenizer="subword")
    asyncio.run(_check_subwords(volume))


async def _check_subwords(volume: Volume) -> None:
    async with running_server(settings_of(volume)) as running, AsyncClient(running.address) as client:
        text = "the cat é\n sat"
        answer = await client.score("parts", text, num_alternatives=3)
    (result,) = answer.results
    assert "".join("\n" if token.token == "<eos>" else token.token for token in result.tokens) == text
    assert (result.unknown_words, result.summary.num_unknown) == ((), 0)


def settings_of(volume: Volume) -> Settings:
    environment = {"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": str(volume.home), "TANDEM_DEVICE": "cpu"}
    return Settings.from_environment({**environment, "TANDEM_ENGINE": "eager"})


async def test_the_deadline_and_a_caller_who_leaves_end_the_work(server: ServerProcess) -> None:
    begun, held = threading.Event(), threading.Event()

    def block() -> None:
        begun.set()
        held.wait()

    async with running_server(settings_of(server.volume)) as running, AsyncClient(running.address) as client:
        scheduler = running.engine.scheduler
        await running.engine.models.get("LSTM")
        blocked = asyncio.create_task(scheduler.run(block))
        await until(begun.is_set)
        for start in (
            lambda: client.score("LSTM", LINES),
            lambda: client.complete("LSTM", None, 100_000),
        ):
            call = asyncio.create_task(start())
            # Of this call alone: others of the queue warm models.
            await until(lambda: scheduler.num_items == 1)
            call.cancel()
            await until(lambda: scheduler.num_items == 0)
        async with AsyncClient(running.address, timeout_s=0.3) as hasty:
            for late in (hasty.score("LSTM", LINES), hasty.complete("LSTM")):
                with pytest.raises(DeadlineExceeded):
                    await late
                await until(lambda: scheduler.num_items == 0)
        held.set()
        await blocked


def test_the_command(
    server: ServerProcess,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tandem.cli.main import main

    def tandem(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["tandem", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        printed = capsys.readouterr()
        assert caught.value.code == code, printed.err
        return printed.err if code else printed.out

    monkeypatch.setenv("TANDEM_INFERENCE_ADDRESS", server.address)
    expected = client.score("LSTM", LINES).summary
    file = tmp_path / "text.txt"
    file.write_text(LINES)
    document = json.loads(tandem("score", "LSTM", "--file", file, "--alternatives", "2", "--json"))
    assert document["summary"]["perplexity"] == expected.perplexity
    assert len(document["results"][0]["tokens"][0]["alternatives"]) == 2
    assert document["results"][0]["unknown_words"] == ["zebra"]
    printed = tandem("score", "LSTM", "the cat", "the dog", "--tokens")
    assert "text 2: perplexity" in printed
    assert "together: perplexity" in printed
    assert "cat" in printed
    assert "give a TEXT or more" in tandem("score", "LSTM", code=2)
    file.write_bytes(b"caf\xe9")
    assert "no UTF-8 text, at byte 3" in tandem("score", "LSTM", "--file", file, code=1)
    assert "needs a language model" in tandem("score", "a", "text", code=1)
