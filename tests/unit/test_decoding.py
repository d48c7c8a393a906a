"""The decoder: what a text goes on from, when it ends, and how little it matters in what pieces it is written."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from factories import MODELS, language_card, vocabulary
from torch import Tensor, nn

from tandem.checkpoints.tensors import build_network
from tandem.data.vocabulary import Vocabulary, build_subwords
from tandem.errors import CheckpointCorrupt, InvalidPrompt, InvalidRequest
from tandem.generation.prompts import read_prompt
from tandem.models.decoding import PREFILL_TOKENS, Sequence, find_token_id
from tandem.models.language_models import LanguageModel
from tandem.models.sampling import Sampling, draw
from tandem.models.stepping import NetworkSteps

CPU = torch.device("cpu")
WORDS = vocabulary()
# Of the Transformer of `language_card`.
CONTEXT, LAYERS = 8, 2


def network_of(model: str, scale: float = 3.0) -> nn.Module:
    torch.manual_seed(3)
    network = build_network(language_card(model, len(WORDS))).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(scale)
    return network


def steps(network: nn.Module) -> NetworkSteps:
    return NetworkSteps(cast(LanguageModel, network), CPU)


def begun(stepper: Any, sampling: Sampling, prompt: tuple[int, ...] = ()) -> Sequence:
    sequence = Sequence(stepper, WORDS, sampling)
    for piece in sequence.pieces(prompt):
        piece()
    return sequence


def words(sequence: Sequence, count: int, go_on: Callable[[], bool] = lambda: True) -> list[str]:
    return [drawn.word for drawn in sequence.write(count, go_on)]


def text(model: str, sampling: Sampling, count: int, prompt: tuple[int, ...] = ()) -> list[str]:
    return words(begun(steps(network_of(model)), sampling, prompt), count)


class Scripted:
    """A model that says the same logits at each step."""

    def __init__(self, **logits: float) -> None:
        self.read: list[list[int]] = []
        self._logits = torch.full((len(WORDS),), -9.0)
        for word, value in logits.items():
            self._logits[WORDS.ids[word]] = value

    def step(self, token_ids: list[int], state: Any) -> tuple[Tensor, Any]:
        self.read.append(token_ids)
        return self._logits, None


@pytest.mark.parametrize("model", MODELS)
def test_the_words_are_those_of_the_whole_text_encoded_anew_each_time(model: str) -> None:
    # Six times the Transformer's context, so that the window slides past the trained length.
    network, sampling = network_of(model), Sampling(seed=5, temperature=0.9)
    token_ids = [WORDS.end_id, 3, 4]
    expected = []
    for position in range(50):
        logits, _ = network(torch.tensor([token_ids]), None)
        token_id, _ = draw(logits[0, -1], sampling, position, WORDS.unknown_id)
        token_ids.append(token_id)
        expected.append(WORDS.tokens[token_id])
    assert words(begun(steps(network), sampling, (3, 4)), 50) == expected


@pytest.mark.parametrize("model", ["LSTM", "Transformer"])
def test_how_it_is_cut_into_turns_does_not_matter(model: str) -> None:
    sequence = begun(steps(network_of(model)), Sampling(seed=2))
    pieces = [words(sequence, count) for count in (1, 7, 2, 20)]
    assert [word for piece in pieces for word in piece] == text(model, Sampling(seed=2), 30)
    assert words(sequence, 100, lambda: False) == text(model, Sampling(seed=2), 31)[-1:]


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_longer_than_the_context(model: str) -> None:
    prompt = tuple(2 + each % 15 for each in range(3 * PREFILL_TOKENS + 1))
    other = ((7,) * 600) + prompt[600:]
    assert len(prompt) > PREFILL_TOKENS > LAYERS * CONTEXT
    # Larger, the ReLUs' activations would grow beyond all numbers.
    network = network_of(model, 1.5)
    stepper, far = steps(network), steps(network)
    whole, _ = network(torch.tensor([[WORDS.end_id, *prompt]]), None)
    sequence = begun(stepper, Sampling(seed=1), prompt)
    assert sequence._logits is not None
    torch.testing.assert_close(sequence._logits, whole[0, -1], atol=1e-4, rtol=1e-4)
    if model == "Transformer":
        # What lies further back than its layers' windows reach has no say.
        assert words(begun(far, Sampling(seed=1), other), 40) == words(sequence, 40)


def test_a_text_begins_after_an_end_of_line_and_in_pieces() -> None:
    model = Scripted(cat=1.0)
    sequence = begun(model, Sampling(temperature=0.0), (2,) * PREFILL_TOKENS)
    assert [len(each) for each in model.read] == [PREFILL_TOKENS, 1]
    assert model.read[0][0] == WORDS.end_id
    assert words(sequence, 3) == ["cat"] * 3
    # The last word is not read before there is another to draw.
    assert len(model.read) == 4


def test_a_text_ends_before_the_stop_word() -> None:
    sequence = begun(Scripted(cat=1.0), Sampling(temperature=0.0, stop=("cat", "dog")))
    written = sequence.text
    assert (words(sequence, 5), written.stopped, written.num_words, written.finish_reason) == ([], True, 0, "stop")
    assert written.mean_negative_log_probability == 0.0
    going_on = begun(Scripted(cat=1.0), Sampling(temperature=0.0, stop=("dog",)))
    assert words(going_on, 5) == ["cat"] * 5
    assert (going_on.text.stopped, going_on.text.finish_reason) == (False, "length")


def test_the_penalty_falls_on_the_prompt_and_on_what_was_drawn() -> None:
    model = Scripted(cat=4.0, dog=3.0, the=2.0)
    sampling = Sampling(temperature=0.0, repetition_penalty=4.0)
    assert words(begun(model, sampling), 4) == ["cat", "dog", "the", "cat"]
    assert words(begun(model, sampling, (WORDS.ids["dog"],)), 2) == ["cat", "the"]
    # The end of line that the text begins after is in neither.
    model = Scripted(**{"<eos>": 4.0, "cat": 3.0})
    assert words(begun(model, sampling), 2) == ["<eos>", "cat"]


def test_a_random_start_is_any_word_alike_and_follows_the_seed() -> None:
    model = Scripted(cat=9.0)
    starts = [
        words(begun(model, Sampling(seed=seed, random_start=True, stop=("cat",), temperature=0.0)), 1)
        for seed in range(400)
    ]
    drawn = {word for (word,) in starts}
    assert drawn == set(WORDS.tokens) - {"<unk>", "<eos>", "cat"}
    again = words(begun(model, Sampling(seed=7, random_start=True)), 2)
    assert again == words(begun(model, Sampling(seed=7, random_start=True)), 2)
    # From the second word on the model is asked.
    assert words(begun(model, Sampling(seed=7, random_start=True, temperature=0.0)), 3)[1:] == ["cat", "cat"]


def test_no_word_to_start_with() -> None:
    bare = Vocabulary(("<unk>", "<eos>"))
    sequence = Sequence(steps(build_network(language_card("GRU", 2)).eval()), bare, Sampling(random_start=True))
    for piece in sequence.pieces(()):
        piece()
    with pytest.raises(InvalidRequest, match="no word to start with"):
        sequence.write(1)


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"temperature": 0.0}])
def test_answers_that_are_no_numbers_end_the_text_with_an_error(cut: dict[str, Any]) -> None:
    sequence = begun(steps(network_of("RNN_RELU", 30.0)), Sampling(**cut), (2,) * 300)
    with pytest.raises(CheckpointCorrupt, match="not finite numbers after 300 words"):
        sequence.write(1)


def test_stop_words_are_words_of_the_vocabulary() -> None:
    assert find_token_id(WORDS, "cat", "stop") == WORDS.ids["cat"]
    assert find_token_id(WORDS, "<eos>", "stop") == find_token_id(WORDS, "\n", "stop") == WORDS.end_id
    for stop, says in (("zebra", "not in"), ("the cat", "is 2 words"), ("", "is empty")):
        with pytest.raises(InvalidRequest, match=says) as caught:
            find_token_id(WORDS, stop, "stop")
        assert caught.value.field == "sampling.stop"


def test_subwords_stop_at_line_ends_alone() -> None:
    subwords = build_subwords(lambda: ["the cat sat on the mat"] * 20, 300)
    assert find_token_id(subwords, "<eos>", "stop") == find_token_id(subwords, "\n", "stop") == subwords.end_id
    with pytest.raises(InvalidRequest, match=r"stop 'the': a model of subwords takes <eos> alone"):
        find_token_id(subwords, "the", "stop")


def test_a_word_that_is_never_drawn_can_not_stop_a_text() -> None:
    network = steps(network_of("GRU"))
    with pytest.raises(InvalidRequest, match="<unk> is never drawn"):
        Sequence(network, WORDS, Sampling(stop=("<unk>",)))
    Sequence(network, WORDS, Sampling(stop=("<unk>",), allow_unknown=True))


def test_unknown_words_of_a_prompt() -> None:
    read, _ = read_prompt(WORDS, "zebra yak zebra")
    assert (read.token_ids, read.unknown_words) == ((WORDS.unknown_id,) * 3, ("zebra", "yak"))
    bare = Vocabulary(("<eos>", "the"), "words")
    assert read_prompt(bare, "zebra the")[0].token_ids == (1,)
    with pytest.raises(InvalidPrompt, match=r"no word of the prompt \(zebra, yak\); use others"):
        read_prompt(bare, "zebra yak")
