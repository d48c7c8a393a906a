"""Losses of tokens, plain, with a cache and dynamic: against the same written plainly, on tiny networks."""

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from factories import MODELS
from torch import Tensor, nn

from services.trainer.engine.dynamic_evaluation import (
    DynamicSettings,
    GradientStatistics,
    dynamic_losses,
    gradient_statistics,
)
from services.trainer.engine.neural_cache import CacheSettings, NeuralCache, cache_losses
from services.trainer.engine.text_evaluation import Reading, token_losses
from tandem.comparison.token_losses import perplexity
from tandem.data.corpus import columns, windows
from tandem.models.awd_lstm import AwdDropouts
from tandem.models.language_models import LanguageModelShape, build_language_model, detach

CPU = torch.device("cpu")
NUM_WORDS = 23
READING = Reading(CPU, window=16)
DYNAMIC = {"sgd": DynamicSettings(5, rate=0.05, decay=0.01), "rms": DynamicSettings(5, rate=1e-3, decay=0.01)}


def network(model: str = "LSTM", dropout: float = 0.0, tied: bool = False) -> nn.Module:
    torch.manual_seed(1)
    shape = LanguageModelShape(model, NUM_WORDS, 16, 16, 2, 2, dropout, tied, context_length=12)  # type: ignore[arg-type]
    built = build_language_model(shape, AwdDropouts(dropout, dropout, dropout, dropout))
    for parameter in built.parameters():
        # So that a word depends on those before it; the states of a ReLU would grow without end.
        parameter.data.mul_(1.8 if model == "RNN_RELU" else 2.5)
    return built.eval()


def text(length: int = 300, seed: int = 0) -> Tensor:
    """Words that come in bursts, as in a real text."""
    draw = torch.Generator().manual_seed(seed)
    topics = torch.randint(0, 4, (length // 20 + 1,), generator=draw).repeat_interleave(20)[:length]
    return (topics * 5 + torch.randint(0, 6, (length,), generator=draw)) % NUM_WORDS


def joined(parts: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(parts))


@pytest.mark.parametrize("model", MODELS)
def test_no_window_changes_the_losses(model: str) -> None:
    subject, tokens = network(model), text()
    found = {
        window: joined(token_losses(subject, tokens, Reading(CPU, window=window))) for window in (1, 7, 64, 256, 8192)
    }
    with torch.no_grad():
        logits, _ = subject(tokens[None, :-1])
        whole = F.cross_entropy(logits[0], tokens[1:], reduction="none")
    assert whole.std() > 0.1, "a network that says the same everywhere would test nothing"
    for losses in found.values():
        assert (losses.shape, losses.dtype) == ((299,), torch.float32)
        torch.testing.assert_close(losses, whole, rtol=1e-4, atol=1e-4)
    perplexities = [perplexity(float(losses.double().mean())) for losses in found.values()]
    assert perplexities == pytest.approx([perplexities[0]] * len(perplexities), rel=1e-6)


def test_each_window_is_yielded_by_itself_and_dropout_is_off() -> None:
    subject = network(dropout=0.5).train()
    parts = list(token_losses(subject, text(50), READING))
    assert [len(part) for part in parts] == [16, 16, 16, 1]
    assert torch.equal(torch.cat(parts), joined(token_losses(network(), text(50), READING)))


def test_bfloat16_is_near() -> None:
    subject, tokens = network("AWD_LSTM", tied=True), text()
    precise = joined(token_losses(subject, tokens, READING)).mean()
    rounded = joined(token_losses(subject, tokens, Reading(CPU, "bfloat16"))).mean()
    assert 0 < abs(float(rounded - precise)) < 0.05


def literal_cache(subject: nn.Module, tokens: Tensor, settings: CacheSettings) -> Tensor:
    """Return the losses (N - 1,) by the formula of the paper, one token at a time."""
    with torch.no_grad():
        hidden = subject.encode(tokens[None])[0][0].double()  # type: ignore[operator]
        probabilities = subject(tokens[None])[0][0].double().softmax(1)
    losses = []
    for t in range(len(tokens) - 1):
        mixed = probabilities[t].clone()
        mass = torch.zeros(NUM_WORDS, dtype=torch.float64)
        for i in range(max(0, t - settings.window), t):
            mass[tokens[i + 1]] += math.exp(settings.theta * float(hidden[t] @ hidden[i]))
        if t:
            mixed = (1 - settings.lambda_) * mixed + settings.lambda_ * mass / mass.sum()
        losses.append(-math.log(mixed[tokens[t + 1]]))
    return torch.tensor(losses)


@pytest.mark.parametrize("model", ["LSTM", "Transformer", "AWD_LSTM"])
@pytest.mark.parametrize(
    "settings", [CacheSettings(1000, 0.3, 0.1), CacheSettings(5, 1.0, 0.5), CacheSettings(40, 0.0, 0.9)]
)
@pytest.mark.parametrize("window", [1, 7, 64, 256])
def test_the_cache_is_that_of_the_paper(model: str, settings: CacheSettings, window: int) -> None:
    subject, tokens = network(model), text(150)
    plain, mixed = zip(*cache_losses(subject, tokens, Reading(CPU, window=window), settings), strict=True)
    torch.testing.assert_close(torch.cat(mixed), literal_cache(subject, tokens, settings), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(plain), joined(token_losses(subject, tokens, Reading(CPU))))


def test_the_mixture_is_a_distribution_and_helps_where_words_come_in_bursts() -> None:
    subject, tokens = network(), text(120)
    with torch.no_grad():
        hidden = subject.encode(tokens[None])[0][0]  # type: ignore[operator]
        losses = -subject(tokens[None])[0][0].log_softmax(1)
    cache = NeuralCache(CacheSettings(50, 0.3, 0.4))
    cache.mix(losses[torch.arange(100), tokens[1:101]], hidden[:100], tokens[1:101])
    shares = [
        copy.deepcopy(cache).mix(losses[100, word, None], hidden[100, None], torch.tensor([word])).neg().exp()
        for word in range(NUM_WORDS)
    ]
    assert float(sum(shares)) == pytest.approx(1.0, abs=1e-5)
    plain, mixed = zip(*cache_losses(subject, tokens, READING, CacheSettings(50, 0.1, 0.4)), strict=True)
    assert torch.cat(mixed).mean() < torch.cat(plain).mean() - 0.05


def statistics_of(subject: nn.Module, tokens: Tensor, segment: int = 5) -> GradientStatistics:
    statistics = GradientStatistics(subject)
    assert sum(gradient_statistics(subject, tokens, READING, segment, statistics)) > len(tokens) - 200
    return statistics


def dynamic(subject: nn.Module, tokens: Tensor, rule: str) -> Tensor:
    statistics = statistics_of(subject, text(600, seed=9)) if rule == "rms" else None
    return joined(dynamic_losses(subject, tokens, READING, DYNAMIC[rule], statistics))


def literal_dynamic(subject: nn.Module, tokens: Tensor, roots: list[Tensor] | None) -> Tensor:
    """Return the losses (N - 1,) by the rules in the module's docstring; `roots` None is sgd."""
    learner, settings = copy.deepcopy(subject), DYNAMIC["rms" if roots else "sgd"]
    state, losses = None, []
    for inputs, targets in windows(tokens[None], settings.segment):
        logits, state = learner(inputs, state)
        each = F.cross_entropy(logits[0], targets[0], reduction="none")
        losses.append(each.detach())
        learner.zero_grad()
        torch.autograd.backward(each.mean())
        state = detach(state)
        mean = sum(float(root.mean()) for root in roots) / len(roots) if roots else 1.0
        for number, (weight, trained) in enumerate(zip(learner.parameters(), subject.parameters(), strict=True)):
            assert weight.grad is not None
            old, pull = weight.detach().clone(), trained.detach() - weight.detach()
            if roots is None:
                weight.data = old - settings.rate * weight.grad + settings.decay * pull
            else:
                decay = (settings.decay * roots[number] / mean).clamp(max=1)
                weight.data = old - settings.rate * weight.grad / (roots[number] + 2e-5) + decay * pull
    return torch.cat(losses)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rule", ["sgd", "rms"])
def test_dynamic_evaluation_is_what_its_rule_says(model: str, rule: str) -> None:
    subject, tokens = network(model, tied=model == "AWD_LSTM"), text(60)
    roots = statistics_of(subject, text(600, seed=9)).roots() if rule == "rms" else None
    expected = literal_dynamic(subject, tokens, roots)
    torch.testing.assert_close(dynamic(subject, tokens, rule), expected, rtol=1e-3, atol=1e-3)
    plain = joined(token_losses(subject, tokens, READING))
    assert not torch.allclose(expected, plain, atol=0.01), "it learned nothing"


def test_gradient_statistics_are_root_mean_squares_over_windows() -> None:
    subject, tokens = network("GRU"), text(100)
    rows, count, state = columns(tokens, 10), 0, None
    weight = subject.get_parameter("head.weight")
    squares = torch.zeros_like(weight)
    for inputs, targets in windows(rows, 5):
        logits, state = subject(inputs, state)
        state = detach(state)
        gradient = torch.autograd.grad(F.cross_entropy(logits.flatten(0, 1), targets.flatten()), weight)[0]
        squares, count = squares + gradient.square(), count + 1
    roots = statistics_of(subject, tokens).roots()
    place = [name for name, _ in subject.named_parameters()].index("head.weight")
    torch.testing.assert_close(roots[place], (squares / count) ** 0.5)


@pytest.mark.parametrize(("segment", "widest"), [(5, 500), (20, 2000), (40, 2000), (3000, 3000)])
def test_gradient_statistics_never_hold_more_than_two_thousand_tokens_or_a_segment(segment: int, widest: int) -> None:
    subject, tokens = network("RNN_TANH"), text(9000)
    counts = list(gradient_statistics(subject, tokens, READING, segment, GradientStatistics(subject)))
    assert max(counts) == widest
    assert sum(counts) > 8500
    assert list(gradient_statistics(subject, text(9), READING, segment, GradientStatistics(subject)))


Evaluation = Callable[[nn.Module, Tensor], Tensor]
EVALUATIONS: dict[str, Evaluation] = {
    "plain": lambda subject, tokens: joined(token_losses(subject, tokens, READING)),
    "cache": lambda subject, tokens: joined(
        pair[1] for pair in cache_losses(subject, tokens, READING, CacheSettings())
    ),
    "sgd": lambda subject, tokens: dynamic(subject, tokens, "sgd"),
    "rms": lambda subject, tokens: dynamic(subject, tokens, "rms"),
}


@pytest.mark.parametrize("mode", EVALUATIONS)
@pytest.mark.parametrize("first_changed", [30, 32, 33])
def test_no_loss_depends_on_a_later_token(mode: str, first_changed: int) -> None:
    subject, tokens = network("LSTM"), text(100)
    changed = tokens.clone()
    changed[first_changed:] = (tokens[first_changed:].flip(0) + 1) % NUM_WORDS
    before, after = EVALUATIONS[mode](subject, tokens), EVALUATIONS[mode](subject, changed)
    # Loss i is that of token i + 1.
    torch.testing.assert_close(after[: first_changed - 1], before[: first_changed - 1], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(after[first_changed:], before[first_changed:])


@pytest.mark.parametrize("mode", EVALUATIONS)
@pytest.mark.parametrize("model", ["LSTM", "Transformer", "AWD_LSTM"])
def test_the_network_is_left_as_it_was(model: str, mode: str) -> None:
    subject = network(model, dropout=0.3).requires_grad_(False)
    before = {name: each.clone() for name, each in subject.state_dict().items()}
    first = EVALUATIONS[mode](subject, text(80))
    assert all(torch.equal(each, before[name]) for name, each in subject.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in subject.parameters())
    assert not any(module.training for module in subject.modules())
    assert torch.equal(first, EVALUATIONS[mode](subject, text(80))), "nothing is left over, and no dropout is on"


def test_weights_that_follow_a_text_learn_it_and_a_rate_of_nothing_is_plain() -> None:
    subject, tokens = network(), text(20).repeat(30)
    plain = joined(token_losses(subject, tokens, READING))
    learned = joined(dynamic_losses(subject, tokens, READING, DynamicSettings(5, 0.2, 0.001)))
    assert learned[-100:].mean() < plain[-100:].mean() - 0.5
    still = joined(dynamic_losses(subject, tokens, READING, DynamicSettings(7, 1e-12, 0.0)))
    torch.testing.assert_close(still, plain, rtol=1e-4, atol=1e-4)
    # All the way back after each step: as if it had never learned.
    drawn = joined(dynamic_losses(subject, tokens, READING, DynamicSettings(5, 1e-9, 1.0)))
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-4)
