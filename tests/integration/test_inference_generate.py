"""Generate against a real server."""

import asyncio

import pytest
from factories import MODELS, png
from inference_server import ServerProcess

from tandem.client import AsyncClient, Client, GenerationSummary, SamplingOptions, TextPiece
from tandem.errors import InvalidPrompt, InvalidRequest

pytest_plugins = ["inference_fixtures"]


def text_of(client: Client, model: str, seed: int, max_words: int = 60, prompt: str | None = None) -> str:
    pieces = client.generate(model, prompt, max_words, SamplingOptions(seed=seed))
    return "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))


@pytest.mark.parametrize("model", MODELS)
def test_text_comes_in_pieces_and_ends_with_a_summary(client: Client, model: str) -> None:
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
def test_the_same_seed_gives_the_same_words(client: Client, model: str) -> None:
    assert text_of(client, model, 7) == text_of(client, model, 7)
    assert text_of(client, model, 7) != text_of(client, model, 8)
    assert text_of(client, model, 7, 20) == text_of(client, model, 7, 60)[: len(text_of(client, model, 7, 20))]


async def test_neighbours_do_not_change_the_words(server: ServerProcess, client: Client) -> None:
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


def test_a_seed_is_picked_and_told(client: Client) -> None:
    *pieces, summary = client.generate("GRU", None, 30)
    assert isinstance(summary, GenerationSummary)
    text = "".join(piece.text for piece in pieces if isinstance(piece, TextPiece))
    assert text_of(client, "GRU", summary.seed, 30) == text


def test_greedy_text_has_no_chance_in_it(client: Client) -> None:
    texts = set()
    for seed in (1, 2):
        pieces = client.generate("LSTM", "the dog", 20, SamplingOptions(temperature=0.0, seed=seed))
        texts.add("".join(piece.text for piece in pieces if isinstance(piece, TextPiece)))
    assert len(texts) == 1


def words_of(client: Client, sampling: SamplingOptions, max_words: int = 200) -> tuple[list[str], GenerationSummary]:
    *pieces, summary = client.generate("LSTM", None, max_words, sampling)
    assert isinstance(summary, GenerationSummary)
    return [word for piece in pieces if isinstance(piece, TextPiece) for word in piece.words], summary


def test_a_text_ends_before_a_stop_word(client: Client) -> None:
    plain, _ = words_of(client, SamplingOptions(seed=3))
    stop = plain[70]
    words, summary = words_of(client, SamplingOptions(seed=3, stop=(stop, "?")))
    ends_at = min(plain.index(each) for each in (stop, "?") if each in plain)
    assert words == plain[:ends_at]
    assert (summary.num_words, summary.finish_reason) == (ends_at, "stop")


def test_a_text_that_ends_before_it_begins(client: Client) -> None:
    (first, *_), _ = words_of(client, SamplingOptions(seed=3), 1)
    words, summary = words_of(client, SamplingOptions(seed=3, stop=first))
    assert (words, summary.num_words, summary.mean_negative_log_probability) == ([], 0, 0.0)
    assert summary.finish_reason == "stop"


def test_penalty_min_p_and_random_start_reach_the_draw(client: Client) -> None:
    once, _ = words_of(client, SamplingOptions(temperature=0.0, repetition_penalty=1000.0), 12)
    greedy, _ = words_of(client, SamplingOptions(temperature=0.0), 12)
    assert len(set(once)) > len(set(greedy))
    assert words_of(client, SamplingOptions(min_p=1.0, seed=8), 12)[0] == greedy
    firsts = {words_of(client, SamplingOptions(seed=seed, random_start=True, top_k=1), 1)[0][0] for seed in range(12)}
    assert len(firsts) > 5


def test_a_prompt_of_unknown_words_only_is_read_as_unknown_words(client: Client) -> None:
    *_, summary = client.generate("Transformer", "zebra yak", 3)
    assert isinstance(summary, GenerationSummary)
    assert (summary.num_prompt_tokens, summary.unknown_words) == (2, ("zebra", "yak"))


def test_a_long_prompt_and_unknown_words(client: Client) -> None:
    *_, summary = client.generate("GRU", "the cat zebra\n" * 300 + "zebra yak", 3)
    assert isinstance(summary, GenerationSummary)
    assert summary.unknown_words == ("zebra", "yak")
    assert summary.num_prompt_tokens == 300 * 4 + 2


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(client: Client, prompt: str) -> None:
    with pytest.raises(InvalidPrompt, match="the prompt is empty") as caught:
        list(client.generate("LSTM", prompt))
    assert caught.value.field == "prompt"


def test_an_overlong_prompt(client: Client) -> None:
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
        (1, SamplingOptions(min_p=1.5), "sampling.min_p"),
        (1, SamplingOptions(repetition_penalty=0.0), "sampling.repetition_penalty"),
        (1, SamplingOptions(stop=("zebra",)), "sampling.stop"),
        (1, SamplingOptions(stop=("the cat",)), "sampling.stop"),
        (1, SamplingOptions(stop=("the",) * 65), "sampling.stop"),
    ],
)
def test_nonsense_is_refused_with_its_field(
    client: Client, max_words: int, sampling: SamplingOptions, field: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        list(client.generate("LSTM", None, max_words, sampling))
    assert caught.value.field == field


def test_a_prompt_beside_a_random_start(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="leave one of the two out") as caught:
        list(client.generate("LSTM", "the", 1, SamplingOptions(random_start=True)))
    assert caught.value.field == "sampling.random_start"


def test_numbers_that_no_field_holds(client: Client) -> None:
    with pytest.raises(InvalidRequest):
        list(client.generate("LSTM", None, 10**12))


def test_a_classifier_does_not_write(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="a:1 is a classifier"):
        list(client.generate("a"))
