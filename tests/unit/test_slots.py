"""Many texts stepped together: each in the bits that it has alone, whoever comes, goes or pauses beside it."""

import random
from typing import cast

import pytest
import torch
from factories import MODELS, language_card
from torch import Tensor, nn

from services.inference.runtimes.language import EagerLanguageModel
from tandem.checkpoints.tensors import build_network
from tandem.errors import CheckpointCorrupt
from tandem.models.language_models import LanguageModel, ModelState
from tandem.models.slots import ALONE, Blocks, Kept, Slots, make_slots
from tandem.models.stepping import NetworkSteps

CPU = torch.device("cpu")
NUM_WORDS = 50
# The Transformer of `language_card` sees 8 words back: texts go far beyond it.
NUM_STEPS = 25


def network_of(model: str, scale: float = 3.0) -> nn.Module:
    torch.manual_seed(3)
    network = build_network(language_card(model, NUM_WORDS)).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(scale)
    return network


def runtime_of(model: str, scale: float = 3.0) -> EagerLanguageModel:
    runtime = EagerLanguageModel(cast(LanguageModel, network_of(model, scale)), CPU)
    runtime.warm()
    return runtime


def prompts(count: int) -> list[list[int]]:
    chance = random.Random(count)
    return [[chance.randrange(NUM_WORDS) for _ in range(chance.randrange(0, 20))] for _ in range(count)]


def begun(runtime: EagerLanguageModel, prompt: list[int]) -> ModelState | None:
    return runtime.read(prompt, None) if prompt else None


def alone(runtime: EagerLanguageModel, prompt: list[int], text: list[int]) -> list[Tensor]:
    slots = runtime.make_slots()
    slots.put(begun(runtime, prompt))
    return [slots.step([token_id])[0] for token_id in text]


@pytest.mark.parametrize("model", MODELS)
def test_a_step_says_what_the_network_says_of_the_whole_text(model: str) -> None:
    # With weights that don't blow up the last bits of a ReLU network.
    runtime = runtime_of(model, scale=1.0)
    steps = NetworkSteps(cast(LanguageModel, network_of(model, scale=1.0)), CPU)
    prompt, text = [3, 4, 5], [each % NUM_WORDS for each in range(7, 7 + NUM_STEPS)]
    _, state = steps.step(prompt, None)
    for token_id, logits in zip(text, alone(runtime, prompt, text), strict=True):
        expected, state = steps.step([token_id], state)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_whoever_comes_goes_or_pauses_changes_no_bit(model: str) -> None:
    runtime, chance = runtime_of(model), random.Random(model)
    texts = [[chance.randrange(NUM_WORDS) for _ in range(NUM_STEPS)] for _ in range(9)]
    starts = prompts(9)
    expected = [alone(runtime, prompt, text) for prompt, text in zip(starts, texts, strict=True)]
    slots, done = runtime.make_slots(), [0] * 9
    rows: list[int] = []
    paused: dict[int, Kept] = {}
    to_come = list(range(9))
    while to_come or rows or paused:
        if to_come and chance.random() < 0.5:
            rows.append(to_come.pop())
            slots.put(begun(runtime, starts[rows[-1]]))
        if paused and chance.random() < 0.5:
            number, kept = paused.popitem()
            rows.append(number)
            slots.put_back(kept)
        if not rows:
            continue
        for number, logits in zip(rows, slots.step([texts[each][done[each]] for each in rows]), strict=True):
            assert torch.equal(logits, expected[number][done[number]]), f"step {done[number]} of text {number}"
            done[number] += 1
        for row in reversed(range(len(rows))):
            if done[rows[row]] == NUM_STEPS:
                slots.remove(row)
            elif chance.random() < 0.1:
                paused[rows[row]] = slots.take(row)
            else:
                continue
            rows[row] = rows[-1]
            rows.pop()


def test_blocks_cover_the_rows() -> None:
    assert Blocks(4, 64).bounds(5) == [(0, 8)]
    assert Blocks(4, 64).bounds(65) == [(0, 64), (64, 68)]
    assert Blocks(32, 32).bounds(33) == [(0, 32), (32, 64)]
    assert ALONE.bounds(3) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("blocks", [ALONE, Blocks(4, 4), Blocks(4, 8)])
def test_rows_in_several_blocks_are_those_of_one(blocks: Blocks) -> None:
    network = network_of("Transformer")
    runtime = runtime_of("Transformer")
    cut, whole = (make_slots(network, CPU, 10, each) for each in (blocks, Blocks(4, 64)))
    for slots in (cut, whole):
        for prompt in prompts(10):
            slots.put(begun(runtime, prompt))
    for step in range(3):
        tokens = [(row + step) % NUM_WORDS for row in range(10)]
        torch.testing.assert_close(cut.step(tokens), whole.step(tokens), atol=2e-5, rtol=2e-5)


class Neighbourly(nn.Module):
    """A network whose answers hang on how many rows there are."""

    batch_dimension = 1

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, 4)
        self.head = nn.Linear(4, NUM_WORDS)

    def encode(self, token_ids: Tensor, state: ModelState | None = None) -> tuple[Tensor, ModelState]:
        hidden = self.embedding(token_ids) * (1 + 1e-6 * token_ids.shape[0])
        return hidden, (hidden[:, -1][None],)

    def output_dropout(self, hidden: Tensor) -> Tensor:
        return hidden


def test_a_model_whose_rows_hang_on_their_number_is_stepped_row_by_row() -> None:
    assert runtime_of("LSTM").blocks != ALONE
    runtime = EagerLanguageModel(cast(LanguageModel, Neighbourly()), CPU)
    slots: Slots = runtime.make_slots()
    runtime.find_blocks()
    assert runtime.blocks == ALONE
    slots = runtime.make_slots()
    slots.put(None)
    first = slots.step([1])[0]
    slots.remove(0)
    for _ in range(3):
        slots.put(None)
    assert torch.equal(slots.step([2, 1, 3])[1], first)


def test_a_network_whose_answers_are_no_numbers_is_refused() -> None:
    network = network_of("GRU")
    next(network.parameters()).data.fill_(torch.nan)
    with pytest.raises(CheckpointCorrupt, match="finite"):
        EagerLanguageModel(cast(LanguageModel, network), CPU).warm()


def test_a_long_window_gets_fewer_slots() -> None:
    assert runtime_of("Transformer").make_slots().capacity == 64
    network = build_network(language_card("Transformer", NUM_WORDS, context_length=500_000)).eval()
    assert EagerLanguageModel(cast(LanguageModel, network), CPU).make_slots().capacity == 4
