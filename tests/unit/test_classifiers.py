"""Classification architectures: one of each family is built, checked and counted."""

import pytest
import torch

from tandem.errors import TrainingFailed
from tandem.models.classifiers import build_classifier, check_image_size, num_parameters

FAMILIES = (
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18"),
    *("resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16"),
    "wide_resnet50_2",
)


@pytest.mark.parametrize("arch", FAMILIES)
def test_every_family_gives_one_logit_for_each_class(arch: str) -> None:
    network = build_classifier(arch, 7, 224)
    check_image_size(network, arch, 7, 224)
    assert network.training, "the check leaves the mode as it was"
    assert num_parameters(network) > 100_000


def test_a_vision_transformer_is_built_for_its_size() -> None:
    network = build_classifier("vit_b_32", 3, 64).eval()
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(("arch", "size"), [("vit_b_16", 40), ("maxvit_t", 64), ("alexnet", 16), ("inception_v3", 32)])
def test_a_size_that_does_not_fit_is_named_with_the_remedy(arch: str, size: int) -> None:
    with pytest.raises(TrainingFailed, match=rf"{arch} can't take {size}×{size} images .*--image-size") as caught:
        check_image_size(build_classifier(arch, 3, size), arch, 3, size)
    assert "\n" not in str(caught.value)
