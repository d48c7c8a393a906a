"""Models of subwords: trained by the training process, and generating through a server in the test's own process."""

import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from factories import publish_language_model, vocabulary
from samples import write_sentences

from services.inference.server import Running, running_server
from tandem.checkpoints.files import list_checkpoints
from tandem.checkpoints.tensors import load_checkpoint
from tandem.cli.generate import _whole_words
from tandem.client import AsyncClient, GenerationSummary, SamplingOptions, TextPiece
from tandem.data.prepare import prepare_text
from tandem.jobs.runs import SPEC_FILE
from tandem.jobs.spec import make_spec
from tandem.settings import Settings
from tandem.volume import Volume

MODELS = ("LSTM", "Transformer")


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[Running]:
    """A server with language models of subwords."""
    for model in MODELS:
        publish_language_model(Volume(tmp_path), model, f"run-{model}", model, tokenizer="subword")
    settings = {"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": str(tmp_path), "TANDEM_DEVICE": "cpu"}
    async with running_server(Settings.from_environment(settings)) as running:
        yield running


async def write(client: AsyncClient, model: str, prompt: str | None) -> tuple[str, list[str], GenerationSummary]:
    *pieces, summary = [piece async for piece in client.generate(model, prompt, 300, SamplingOptions(seed=3))]
    assert isinstance(summary, GenerationSummary)
    told = [piece for piece in pieces if isinstance(piece, TextPiece)]
    assert len(told) > 1
    return "".join(piece.text for piece in told), [word for piece in told for word in piece.words], summary


@pytest.mark.parametrize("model", MODELS)
async def test_text_of_subwords(running: Running, model: str) -> None:
    prompt = "the cat ζητώ 👩‍👧\n never seen"
    async with AsyncClient(running.address) as client:
        text, words, summary = await write(client, model, prompt)
        again = await write(client, model, prompt)
        other = await write(client, model, None)
    assert again[:2] == (text, words)
    assert other[0] != text
    assert len(words) == summary.num_words == 300
    assert "".join("\n" if word == "<eos>" else word for word in words) == text
    assert summary.unknown_words == ()
    assert summary.num_prompt_tokens == len(vocabulary("subword").encode(prompt)[0])
    # No table of bytes is shown: a character of it is told as the blank that it stands for.
    assert "Ġ" not in text
    assert " " in text


def test_the_file_of_words_holds_whole_ones() -> None:
    assert _whole_words(["The", " c", "at", ",", "<eos>", " ", "", "ζ"], "The cat,\n ζ") == [
        "The",
        "cat,",
        "<eos>",
        "ζ",
    ]
    assert _whole_words(["The", "cat", ",", "<eos>", "a"], "The cat,\na") == ["The", "cat", ",", "<eos>", "a"]


def test_training_keeps_the_tokenizer_in_the_checkpoint(tmp_path: Path) -> None:
    volume = Volume(tmp_path)
    dataset = prepare_text(volume, write_sentences(tmp_path / "a.txt"), "text", tokenizer="subword", max_vocabulary=300)
    shape = {"embedding_size": 8, "hidden_size": 8, "num_layers": 1, "epochs": 1, "num_threads": 1, "device": "cpu"}
    spec = make_spec({"kind": "train_language_model", "dataset": "text", "model_name": "m", "model": "LSTM", **shape})
    run = volume.run("run-1")
    run.mkdir(parents=True)
    (run / SPEC_FILE).write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "services.trainer.run", str(run), "--attempt", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    checkpoint = load_checkpoint(list_checkpoints(run)[-1])
    assert checkpoint.vocabulary is not None
    assert checkpoint.vocabulary.to_json() == (volume.dataset("text") / "vocabulary.json").read_bytes()
    assert len(checkpoint.vocabulary) == dataset.vocabulary_size
    assert checkpoint.vocabulary.encode("the cat ζ")[1] == []
