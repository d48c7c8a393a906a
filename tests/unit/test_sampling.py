import math
from collections import Counter

import numpy as np
import pytest
import torch

from tandem.errors import InvalidRequest
from tandem.models.sampling import Sampling, TokenSet, cut, draw, uniform, weights

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
MANY = 33_278


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    drawn_with = torch.from_numpy(weights(logits.numpy(), sampling)).double()
    return drawn_with / drawn_with.sum()


def words(sampling: Sampling, count: int, logits: torch.Tensor = LOGITS, masked_id: int | None = None) -> list[int]:
    return [draw(logits, sampling, position, masked_id)[0] for position in range(count)]


def test_the_random_number_is_a_function_of_seed_and_position() -> None:
    assert uniform(7, 3) == uniform(7, 3)
    drawn = {uniform(seed, position) for seed in range(30) for position in range(30)}
    assert len(drawn) == 900
    assert all(0 <= each < 1 for each in drawn)
    assert sum(drawn) / 900 == pytest.approx(0.5, abs=0.03)
    assert uniform(2**64 - 1, 10**9) != uniform(2**64 - 1, 10**9 + 1)


def test_same_seed_same_words_in_any_order() -> None:
    sampling = Sampling(seed=5)
    forward = words(sampling, 50)
    backward = [draw(LOGITS, sampling, position)[0] for position in reversed(range(50))]
    assert forward == backward[::-1]
    assert forward != words(Sampling(seed=6), 50)


def test_words_are_drawn_as_often_as_the_model_says() -> None:
    counts = Counter(words(Sampling(seed=1), 4000))
    for token_id, expected in enumerate(torch.softmax(LOGITS, 0).tolist()):
        assert counts[token_id] / 4000 == pytest.approx(expected, abs=0.025)


def test_temperature_zero_takes_the_likeliest_and_a_tie_the_first() -> None:
    assert set(words(Sampling(temperature=0.0), 5)) == {0}
    assert draw(torch.tensor([1.0, 3.0, 3.0]), Sampling(temperature=0.0), 0)[0] == 1


def test_temperature_sharpens_and_tiny_ones_do_not_overflow() -> None:
    assert probabilities(LOGITS, Sampling(temperature=0.5))[0] > probabilities(LOGITS, Sampling())[0]
    assert probabilities(LOGITS * 1e4, Sampling(temperature=1e-6)).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert probabilities(LOGITS, Sampling(top_k=2))[2:].tolist() == [0.0, 0.0]
    assert set(words(Sampling(top_k=2, seed=3), 200)) == {0, 1}
    # The probabilities are 0.644, 0.237, 0.087, 0.032: the word that passes the mark stays.
    assert set(words(Sampling(top_p=0.6, seed=3), 200)) == {0}
    assert set(words(Sampling(top_p=0.7, seed=3), 300)) == {0, 1}
    assert probabilities(LOGITS, Sampling(top_p=1.0)).tolist() == pytest.approx(torch.softmax(LOGITS, 0).tolist())
    assert probabilities(torch.zeros(4), Sampling(top_k=1)).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert float(probabilities(LOGITS, Sampling(top_k=3, top_p=0.9)).sum()) == pytest.approx(1)


def by_sorting(drawn_with: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What `cut` is to do, the plain way: everything sorted, then cut."""
    ordered, order = drawn_with.double().sort(descending=True, stable=True)
    if sampling.top_k:
        ordered[sampling.top_k :] = 0
    if sampling.top_p:
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p * ordered.sum()] = 0
    ordered[ordered < sampling.min_p * ordered[0]] = 0
    return torch.zeros_like(ordered).scatter_(0, order, ordered)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=40),
        Sampling(top_k=MANY * 2),
        Sampling(top_p=0.1),
        Sampling(top_p=0.9),
        Sampling(top_p=0.999),
        Sampling(min_p=0.02),
        Sampling(top_k=1000, top_p=0.5, min_p=0.01),
        Sampling(top_k=3, top_p=0.99, min_p=1.0),
    ],
)
@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 20.0])
def test_cutting_without_a_sort_keeps_what_sorting_keeps(sampling: Sampling, spread: float) -> None:
    # Rounded, so that many are equally likely; at spread 0 all are.
    logits = (torch.randn(MANY, generator=torch.Generator().manual_seed(3)) * spread).round(decimals=1)
    likely = torch.exp(logits - logits.max())
    kept = torch.from_numpy(cut(likely.numpy(), sampling))
    torch.testing.assert_close(kept.double(), by_sorting(likely, sampling), atol=0, rtol=0)


def test_words_of_a_large_vocabulary_are_drawn_where_the_number_falls() -> None:
    logits = torch.randn(MANY, generator=torch.Generator().manual_seed(4))
    cumulative = torch.softmax(logits.double(), 0).cumsum(0)
    for position in range(300):
        token_id, _ = draw(logits, Sampling(seed=9), position)
        before = float(cumulative[token_id - 1]) if token_id else 0.0
        # The exponentials are rounded to float32.
        assert before - 1e-6 <= uniform(9, position) <= float(cumulative[token_id]) + 1e-6


def test_min_p_is_measured_on_the_likeliest() -> None:
    # The others are 0.368, 0.135 and 0.050 times as likely as the first.
    assert set(words(Sampling(min_p=0.3, seed=3), 300)) == {0, 1}
    assert set(words(Sampling(min_p=0.1, seed=3), 300)) == {0, 1, 2}
    assert set(words(Sampling(min_p=1.0, seed=3), 50)) == {0}
    # Cold, the rest is less likely still.
    assert set(words(Sampling(min_p=0.3, temperature=0.5, seed=3), 100)) == {0}


def among(*token_ids: int, size: int = 4) -> TokenSet:
    chosen = np.zeros(size, bool)
    chosen[list(token_ids)] = True
    return chosen


def test_the_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_negative() -> None:
    greedy = Sampling(temperature=0.0, repetition_penalty=4.0)
    assert draw(LOGITS, greedy, 0, seen=among(0))[0] == 1
    assert draw(LOGITS, greedy, 0, seen=among(0, 1))[0] == 0
    assert draw(torch.tensor([-1.0, -3.0]), greedy, 0, seen=among(0, size=2))[0] == 1
    assert draw(LOGITS, greedy, 0, seen=among())[0] == 0
    # 2/4, 1, 0, -1·4: the share of the second of exp(0.5), exp(1), 1 and exp(-4).
    counts = Counter(
        draw(LOGITS, Sampling(repetition_penalty=4.0, seed=2), each, seen=among(0, 3))[0] for each in range(3000)
    )
    assert counts[1] / 3000 == pytest.approx(math.e / (math.exp(0.5) + math.e + 1 + math.exp(-4)), abs=0.03)


def test_the_penalty_leaves_log_probabilities_alone_and_one_is_none() -> None:
    token_id, log_probability = draw(LOGITS, Sampling(temperature=0.0, repetition_penalty=9.0), 0, seen=among(0))
    assert log_probability == pytest.approx(float(torch.log_softmax(LOGITS, 0)[token_id]))
    assert [draw(LOGITS, Sampling(seed=5), each, seen=among(0, 1))[0] for each in range(50)] == words(
        Sampling(seed=5), 50
    )


def test_a_masked_word_far_above_the_rest_takes_no_precision_from_it() -> None:
    logits = torch.tensor([200.0, 2.0, 1.0, 0.0])
    counts = Counter(words(Sampling(seed=1), 3000, logits, masked_id=0))
    assert set(counts) == {1, 2, 3}
    assert counts[1] / 3000 == pytest.approx(0.665, abs=0.03)


def test_a_masked_word_is_never_drawn_and_leaves_log_probabilities_alone() -> None:
    assert 0 not in words(Sampling(seed=2), 300, masked_id=0)
    assert set(words(Sampling(temperature=0.0), 3, masked_id=0)) == {1}
    _, log_probability = draw(LOGITS, Sampling(temperature=0.0), 0, masked_id=0)
    assert log_probability == pytest.approx(float(torch.log_softmax(LOGITS, 0)[1]))
    assert draw(torch.tensor([4.0]), Sampling(), 0, masked_id=0) == (0, 0.0)


def test_log_probability_is_at_temperature_one() -> None:
    token_id, log_probability = draw(LOGITS, Sampling(temperature=3.0, top_k=1), 0)
    assert token_id == 0
    assert log_probability == pytest.approx(math.log(0.6439), abs=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 1001.0),
        ("repetition_penalty", math.nan),
        ("stop", ("word",) * 65),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_nonsense_is_refused_with_its_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == f"sampling.{field}"
