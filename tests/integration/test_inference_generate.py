"""Generate against a real server."""

import asyncio
from collections import Counter

import grpc
import pytest
from factories import MODELS, png
from inference_server import ServerProcess

from tandem.client import AsyncClient, Client, GenerationSummary, SamplingOptions, TextPiece
from tandem.errors import InvalidPrompt, InvalidRequest
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

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


def test_a_bias_bans_and_forces_words(client: Client) -> None:
    greedy, _ = words_of(client, SamplingOptions(temperature=0.0), 12)
    banned, _ = words_of(
        client, SamplingOptions(temperature=0.0, logit_bias={greedy[0]: -1000.0, "<eos>": -1000.0}), 12
    )
    assert greedy[0] not in banned
    assert "<eos>" not in banned
    forced, summary = words_of(client, SamplingOptions(seed=1, logit_bias={"dog": 1000.0}), 5)
    assert forced == ["dog"] * 5
    assert summary.mean_negative_log_probability > 0.1, "the model's own, without the bias"


def test_each_word_has_its_log_probability_and_what_was_likelier(client: Client) -> None:
    *pieces, summary = client.generate("LSTM", "the", 40, SamplingOptions(temperature=0.0, num_alternatives=3))
    assert isinstance(summary, GenerationSummary)
    told = [piece for piece in pieces if isinstance(piece, TextPiece)]
    words = [word for piece in told for word in piece.words]
    own = [each for piece in told for each in piece.log_probabilities]
    likeliest = [ranked for piece in told for ranked in piece.alternatives]
    assert -sum(own) / len(own) == pytest.approx(summary.mean_negative_log_probability, rel=1e-9)
    assert len(words) == len(own) == len(likeliest) == 40
    for word, log_probability, ranked in zip(words, own, likeliest, strict=True):
        assert [each.log_probability for each in ranked] == sorted((e.log_probability for e in ranked), reverse=True)
        # Greedy takes the first of them, unless that is <unk>.
        best = next(each for each in ranked if each.token != "<unk>")
        assert best.token == word
        assert best.log_probability == pytest.approx(log_probability, rel=1e-4, abs=1e-4)


def test_several_texts_of_one_call_are_those_of_their_seeds(client: Client) -> None:
    texts = dict.fromkeys(range(5), "")
    seeds = {}
    for step in client.generate("LSTM", "the cat", 60, SamplingOptions(seed=2**64 - 2), num_texts=5):
        if isinstance(step, TextPiece):
            texts[step.text_index] += step.text
        else:
            seeds[step.text_index] = step.seed
    assert seeds == {0: 2**64 - 2, 1: 2**64 - 1, 2: 0, 3: 1, 4: 2}
    assert [texts[index] for index in range(5)] == [text_of(client, "LSTM", seeds[i], 60, "the cat") for i in range(5)]
    whole = client.complete_several(5, "LSTM", "the cat", 60, SamplingOptions(seed=2**64 - 2, num_alternatives=2))
    assert [each.text for each in whole] == [texts[index] for index in range(5)]
    assert [each.summary.seed for each in whole] == [seeds[index] for index in range(5)]
    assert all(len(each.log_probabilities) == len(each.alternatives) == 60 for each in whole)
    for num_texts in (-1, 17):
        with pytest.raises(InvalidRequest) as caught:
            list(client.generate("LSTM", num_texts=num_texts))
        assert caught.value.field == "num_texts"


def test_what_one_message_holds_is_bounded(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"320,000 words .* the limit is 100,000 in a message") as caught:
        client.complete_several(16, "LSTM", None, 20_000)
    assert caught.value.field == "sampling.max_words"
    with pytest.raises(InvalidRequest, match="105,000 answers"):
        client.complete("LSTM", None, 5_000, SamplingOptions(num_alternatives=20))


def test_a_status_stays_short_whatever_it_names(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"stop word 'xxx.*…$") as caught:
        list(client.generate("LSTM", sampling=SamplingOptions(stop=("x" * 100_000,))))
    assert caught.value.field == "sampling.stop"


async def test_a_slow_reader_holds_up_nobody_and_misses_nothing(
    server: ServerProcess, client: Client, tried: "Counter[str]"
) -> None:
    """One stream is not read while others are written whole; then it has the words that it has alone."""
    expected = text_of(client, "LSTM", 1, 8_000)
    async with AsyncClient(server.address) as shared:
        slow = shared.generate("LSTM", None, 8_000, SamplingOptions(seed=1))
        first = await anext(aiter(slow))
        assert isinstance(first, TextPiece)
        others = await asyncio.gather(*(_whole(shared, seed) for seed in range(2, 6)))
        assert [len(words) for words in others] == [300] * 4
        rest = [piece.text async for piece in slow if isinstance(piece, TextPiece)]
    assert first.text + "".join(rest) == expected
    tried["reader that stops reading for a while"] += 1


async def _whole(shared: AsyncClient, seed: int) -> list[str]:
    pieces = shared.generate("LSTM", None, 300, SamplingOptions(seed=seed))
    return [word async for piece in pieces if isinstance(piece, TextPiece) for word in piece.words]


async def test_a_text_ends_at_its_deadline_wherever_it_is(server: ServerProcess) -> None:
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = rpc.InferenceStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Generate(
            pb.GenerateRequest(model="LSTM", sampling=pb.SamplingParameters(max_words=100_000)), timeout=1.0
        )
        words: list[str] = []

        async def read() -> None:
            async for message in call:
                words.extend(message.words)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await read()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert 0 < len(words) < 100_000


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
        (1, SamplingOptions(logit_bias={"zebra": 1.0}), "sampling.logit_bias"),
        (1, SamplingOptions(logit_bias={"the": 1001.0}), "sampling.logit_bias"),
        (1, SamplingOptions(logit_bias={"the": float("nan")}), "sampling.logit_bias"),
        (1, SamplingOptions(logit_bias=dict.fromkeys(map(str, range(1025)), 1.0)), "sampling.logit_bias"),
        (1, SamplingOptions(num_alternatives=21), "sampling.num_alternatives"),
        (1, SamplingOptions(num_alternatives=-1), "sampling.num_alternatives"),
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
