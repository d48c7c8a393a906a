import math
from collections import Counter

import pytest
import torch

from tandem.errors import InvalidRequest
from tandem.models.sampling import Sampling, draw, probabilities, uniform

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


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
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_nonsense_is_refused_with_its_field(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Sampling(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == f"sampling.{field}"
