"""Evaluation of language models on a GPU says what it says on a CPU; the weights learn there too, through cuDNN."""

import pytest
import torch
from factories import MODELS
from torch import Tensor

from services.trainer.engine.dynamic_evaluation import (
    DynamicSettings,
    GradientStatistics,
    dynamic_losses,
    gradient_statistics,
)
from services.trainer.engine.neural_cache import CacheSettings, cache_losses
from services.trainer.engine.text_evaluation import Reading
from tandem.models.language_models import LanguageModelShape, build_language_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds no CUDA device"),
]


def losses(model: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses plain, with a cache, and dynamic."""
    torch.manual_seed(0)
    shape = LanguageModelShape(model, 30, 32, 32, 2, 2, 0.2, False, 20)  # type: ignore[arg-type]
    network = build_language_model(shape).eval().requires_grad_(False).to(device)
    for parameter in network.parameters():
        parameter.mul_(1.0 if model == "RNN_RELU" else 2.0)
    tokens, reading = (torch.arange(500) * 7 + torch.arange(500) // 11) % 30, Reading(device, window=64)
    plain, mixed = zip(*cache_losses(network, tokens, reading, CacheSettings(100)), strict=True)
    statistics = GradientStatistics(network)
    assert sum(gradient_statistics(network, tokens, reading, 10, statistics))
    learned = dynamic_losses(network, tokens, reading, DynamicSettings(10, 5e-5, 0.01), statistics)
    return torch.cat(plain), torch.cat(mixed), torch.cat(list(learned))


@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_says_what_a_cpu_says(model: str) -> None:
    here, there = losses(model, torch.device("cpu")), losses(model, torch.device("cuda"))
    for mine, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-2, atol=1e-2)
    assert (there[0] - there[2]).abs().max() > 0.03, "the weights learned nothing"
