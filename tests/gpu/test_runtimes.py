"""Compiled with CUDA graphs says what eager says, at every size of batch, on another thread than it was captured on."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from services.inference.runtimes.check import TOLERANCE, check_pixels
from services.inference.runtimes.selection import RuntimeSelector
from tandem.checkpoints.card import Preprocessing
from tandem.models.classifiers import build_classifier
from tandem.models.devices import configure_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch finds no CUDA device"),
]

SIDE = 64
PREPROCESSING = Preprocessing(resize=SIDE, image_size=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def test_captured_graphs_answer_as_eager_does() -> None:
    device = torch.device("cuda")
    configure_device(device)
    torch.manual_seed(0)
    network = build_classifier("resnet18", 10, SIDE).eval().requires_grad_(False)
    selected = RuntimeSelector(device, "compiled").select(network, PREPROCESSING)
    assert selected.runtime.name == "compiled", selected.reason
    pixels = check_pixels(SIDE)
    with ThreadPoolExecutor(1) as thread:
        for size in (1, 3, 8, 21, 32):
            ours = thread.submit(selected.runtime.predict, pixels[:size]).result().softmax(1)
            eager = selected.eager.predict(pixels[:size]).softmax(1)
            torch.testing.assert_close(ours, eager, atol=TOLERANCE, rtol=0)
