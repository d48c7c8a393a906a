"""The reference's way, written plainly: ImageFolder, PIL, DataLoader workers, float32, as imagenet/main.py does it."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

# The reference asks for four workers on any machine.
warnings.filterwarnings("ignore", message="This DataLoader will create")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train_loader(folder: Path, first: Sequence[Any], batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Return the shuffled loader of class folders; `first` are the transforms before the random flip."""
    return _loader(folder, [*first, transforms.RandomHorizontalFlip()], batch_size, num_workers, shuffle=True)


def val_loader(folder: Path, first: Sequence[Any], batch_size: int, num_workers: int) -> DataLoader[Any]:
    """Return the loader of class folders in order."""
    return _loader(folder, first, batch_size, num_workers, shuffle=False)


def _loader(folder: Path, first: Sequence[Any], batch_size: int, num_workers: int, shuffle: bool) -> DataLoader[Any]:
    steps = [*first, transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    images = ImageFolder(str(folder), transforms.Compose(steps))
    return DataLoader(
        images, batch_size, shuffle=shuffle, num_workers=num_workers, pin_memory=torch.cuda.is_available()
    )


class PlainTraining:
    """ResNet-18, SGD and the meters of the reference."""

    def __init__(self, num_classes: int) -> None:
        self.network: nn.Module = resnet18(num_classes=num_classes)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=30, gamma=0.1)

    def steps(self, loader: DataLoader[Any]) -> Iterator[tuple[float, int]]:
        """Train on each batch; yield the mean loss and the number of its images, read at each step as the meters do."""
        self.network.train()
        for images, labels in loader:
            logits = self.network(images)
            loss = F.cross_entropy(logits, labels)
            _accuracy(logits, labels)
            value = loss.item()
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            yield value, len(labels)

    def epoch(self, loader: DataLoader[Any]) -> float:
        """Train one epoch and move the schedule; return the mean loss over its images."""
        told = list(self.steps(loader))
        self.scheduler.step()
        return sum(loss * count for loss, count in told) / sum(count for _, count in told)

    @torch.no_grad()
    def accuracy(self, loader: DataLoader[Any]) -> float:
        """Return the accuracy at rank 1 in percent."""
        self.network.eval()
        right, count = 0, 0
        for images, labels in loader:
            right += int((self.network(images).argmax(1) == labels).sum())
            count += len(labels)
        return 100 * right / count


def _accuracy(logits: Tensor, labels: Tensor) -> list[float]:
    """Return the accuracies at ranks 1 and 5 in percent, as the reference's meters want them."""
    ranked = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    return [100 * float(ranked[:, :k].sum()) / len(labels) for k in (1, 5)]
