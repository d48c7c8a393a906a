"""Mixed images: mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), as torchvision does them."""

from typing import Any

from torch import nn

from tandem.checkpoints.card import Preprocessing
from tandem.jobs.spec import ClassifierJob
from tandem.models.classifiers import count_classes
from tandem.vision import v2


def make_mix(spec: ClassifierJob, network: nn.Module, preprocessing: Preprocessing) -> Any:
    """Return torchvision's mixup, cutmix, or either by chance, from (images, labels) to (images, shares); or None."""
    kinds = [(v2.MixUp, spec.mixup), (v2.CutMix, spec.cutmix)]
    if not any(alpha for _, alpha in kinds):
        return None
    num_classes = count_classes(network, preprocessing.image_size)
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(mixes) if len(mixes) > 1 else mixes[0]
