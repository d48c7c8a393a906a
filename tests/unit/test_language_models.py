"""The forward contract: fed whole or in pieces of any length, a text gives the same logits."""

from typing import Any

import pytest
import torch
from factories import MODELS, language_card
from torch import Tensor, nn

from tandem.checkpoints.tensors import build_network, from_bytes, to_bytes
from tandem.models.language_models import detach
from tandem.models.weights import bare_state, load_weights

LENGTH = 30


def network_of(model: str, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    network = build_network(language_card(model, 20, **changes)).eval()
    for parameter in network.parameters():
        parameter.data.mul_(2)
    return network


def in_pieces(network: nn.Module, token_ids: Tensor, lengths: list[int]) -> Tensor:
    state, pieces = None, []
    for piece in token_ids.split(lengths, dim=1):  # type: ignore[no-untyped-call]
        logits, state = network(piece, state)
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("lengths", [[1] * LENGTH, [7, 1, 12, 10], [29, 1], [3] * 10])
@pytest.mark.parametrize("model", MODELS)
@torch.inference_mode()
def test_incremental_logits_are_those_of_the_whole_at_every_position(model: str, lengths: list[int]) -> None:
    # The Transformer's window (8) is far shorter than the text, so that its oldest keys drop out on the way.
    network = network_of(model)
    token_ids = torch.randint(0, 20, (2, LENGTH))
    whole, _ = network(token_ids, None)
    torch.testing.assert_close(in_pieces(network, token_ids, lengths), whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@torch.inference_mode()
def test_the_future_does_not_reach_back(model: str) -> None:
    network = network_of(model)
    token_ids = torch.randint(0, 20, (1, LENGTH))
    changed = token_ids.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 20
    before, after = network(token_ids, None)[0], network(changed, None)[0]
    torch.testing.assert_close(after[:, :15], before[:, :15], atol=1e-6, rtol=0)
    assert not torch.allclose(after[:, 15], before[:, 15])


@torch.inference_mode()
def test_a_transformer_layer_sees_its_window_and_no_further() -> None:
    network = network_of("Transformer", num_layers=1)
    token_ids = torch.randint(0, 20, (1, LENGTH))
    changed = token_ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 20
    before, after = network(token_ids, None)[0], network(changed, None)[0]
    assert not torch.allclose(after[:, 8], before[:, 8])
    torch.testing.assert_close(after[:, 9:], before[:, 9:], atol=1e-6, rtol=0)
    assert network(token_ids, None)[1][0].shape[2] == 8


@pytest.mark.parametrize("model", MODELS)
def test_neighbours_in_a_batch_do_not_matter(model: str) -> None:
    network = network_of(model)
    token_ids = torch.randint(0, 20, (3, LENGTH))
    together, _ = network(token_ids, None)
    alone, _ = network(token_ids[1:2], None)
    torch.testing.assert_close(together[1:2], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_detached_state_stops_the_gradient(model: str) -> None:
    network = network_of(model)
    _, state = network(torch.randint(0, 20, (1, 5)), None)
    assert any(part.requires_grad for part in state)
    assert not any(part.requires_grad for part in detach(state) or ())


@pytest.mark.parametrize("model", ["LSTM", "Transformer"])
def test_tied_weights_are_stored_once_and_tied_again(model: str) -> None:
    network = network_of(model, tied=True)
    state = bare_state(network)
    assert ("head.weight" in state) != ("embedding.weight" in state)
    loaded: Any = build_network(language_card(model, 20, tied=True)).eval()
    load_weights(loaded, from_bytes(to_bytes(state)))
    assert loaded.head.weight is loaded.embedding.weight
    token_ids = torch.randint(0, 20, (1, 9))
    assert torch.equal(loaded(token_ids, None)[0], network(token_ids, None)[0])
