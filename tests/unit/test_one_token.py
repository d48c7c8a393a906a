"""The step of one token does what the network does, at every position, from nothing and from any state."""

from typing import Any, cast

import pytest
import torch
from factories import MODELS, language_card
from torch import Tensor, nn

from tandem.checkpoints.tensors import build_network
from tandem.models.language_models import LanguageModel
from tandem.models.one_token import Memory
from tandem.models.stepping import NetworkSteps

LENGTH = 40


def network_of(model: str, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    network = build_network(language_card(model, 20, **changes)).eval().requires_grad_(False)
    for parameter in network.parameters():
        # Biases and norms' weights too, that start at 0 and 1.
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return network


def one_by_one(network: nn.Module, token_ids: Tensor, first: int) -> Tensor:
    """Return the logits (T, V) of `token_ids` (T,): `first` of them in one piece, the others alone."""
    steps = NetworkSteps(cast(LanguageModel, network), torch.device("cpu"))
    rows, state = [], None
    for piece in ([token_ids[:first].tolist()] if first else []) + [[each] for each in token_ids[first:].tolist()]:
        logits, state = steps.step(piece, state)
        rows.append(logits)
    assert isinstance(state, Memory)
    return torch.stack(rows)


# The Transformer's window is 8, shorter than the longest beginning; 30 steps go round its ring three times.
@pytest.mark.parametrize("first", [0, 1, 2, 8, 9, 30])
@pytest.mark.parametrize("model", MODELS)
def test_each_step_gives_the_logits_of_the_whole(model: str, first: int) -> None:
    network = network_of(model)
    token_ids = torch.randint(0, 20, (LENGTH,), generator=torch.Generator().manual_seed(first))
    whole = network(token_ids[None], None)[0][0]
    expected = whole[max(first - 1, 0) :]
    assert whole.std() > 0.1
    torch.testing.assert_close(one_by_one(network, token_ids, first), expected, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("changes", [{"num_layers": 1}, {"num_layers": 3}, {"tied": True}, {"embedding_size": 24}])
@pytest.mark.parametrize("model", ["LSTM", "GRU", "Transformer", "AWD_LSTM"])
def test_other_shapes(model: str, changes: dict[str, Any]) -> None:
    if "tied" in changes and model not in ("Transformer", "AWD_LSTM"):
        changes = changes | {"embedding_size": 16, "hidden_size": 16}
    network = network_of(model, **changes)
    token_ids = torch.randint(0, 20, (LENGTH,))
    torch.testing.assert_close(
        one_by_one(network, token_ids, 5), network(token_ids[None], None)[0][0, 4:], atol=3e-5, rtol=3e-5
    )


def test_far_into_a_text_a_transformer_still_counts_distances() -> None:
    network = network_of("Transformer")
    steps = NetworkSteps(cast(LanguageModel, network), torch.device("cpu"))
    token_ids = torch.randint(0, 20, (30,)).tolist()
    near, state = steps.step(token_ids[:1], None)
    near, _ = steps.step(token_ids[1:], state)
    _, state = steps.step([1], None)
    state._num_read = 90_000
    _, state = steps.step([2] * 9, state)
    far, _ = steps.step(token_ids, state)
    # Two layers with windows of 8 see 16 tokens back, so that both end alike.
    torch.testing.assert_close(far, near, atol=3e-5, rtol=3e-5)


def test_several_tokens_after_one() -> None:
    network = network_of("GRU")
    steps = NetworkSteps(cast(LanguageModel, network), torch.device("cpu"))
    _, state = steps.step([3], None)
    logits, _ = steps.step([4, 5, 6], state)
    torch.testing.assert_close(logits, network(torch.tensor([[3, 4, 5, 6]]), None)[0][0, -1], atol=1e-5, rtol=1e-5)


def test_the_network_stays_as_it_was() -> None:
    network = network_of("LSTM")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    _, state = network(torch.tensor([[1, 2, 3]]), None)
    kept = [part.clone() for part in state]
    steps = NetworkSteps(cast(LanguageModel, network), torch.device("cpu"))
    for token_id in range(5):
        _, state = steps.step([token_id], state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    _, again = network(torch.tensor([[1, 2, 3]]), None)
    assert all(torch.equal(*pair) for pair in zip(again, kept, strict=True))
