"""Classifiers with random weights whose answers are of a sensible size, and images for them."""

import torch
from torch import Tensor

from services.inference.runtimes.eager import EagerClassifier
from tandem.checkpoints.card import Preprocessing
from tandem.models.classifiers import build_classifier


def runtime_of(arch: str, size: int = 32, num_classes: int = 10) -> EagerClassifier:
    torch.manual_seed(1)
    network = build_classifier(arch, num_classes, size)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    # One pass for sensible statistics of BatchNorm.
    network.train()(torch.randn(8, 3, size, size))
    preprocessing = Preprocessing(resize=size, image_size=size, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    return EagerClassifier(network.eval().requires_grad_(False), preprocessing, torch.device("cpu"))


def images(count: int, size: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
