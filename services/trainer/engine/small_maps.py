"""Convolutions over maps of a few pixels as matrix products: faster on a CPU in bfloat16.

For each call oneDNN rearranges the weights, which are far more numbers than such a map has. Forward and backward of
ResNet-18's last layers at 64 px, batch 64 (2 cores with AMX, torch 2.15, medians of 9): 512 to 512 channels over 2×2
pixels 27.7 ms by oneDNN and 9.4 ms as a product, 256 to 512 with a stride 13.5 and 5.7 ms. Over 4×4 pixels of 256
channels oneDNN is the faster (6.3 against 10.6 ms), as it is in float32.
"""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)

_MAX_PIXELS = 4
_MIN_WEIGHTS = 256 * 512


class SmallMapConv2d(nn.Conv2d):
    """A convolution that trains as a matrix product where its output has at most 4 pixels; else as any other."""

    def forward(self, images: Tensor) -> Tensor:
        """Return what nn.Conv2d returns for images (B, C, H, W), up to rounding."""
        if self.training and images.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            height, width = (self._output_size(images, dimension) for dimension in (0, 1))
            if height * width <= _MAX_PIXELS:
                return self._as_product(images, height, width)
        return super().forward(images)

    def _output_size(self, images: Tensor, dimension: int) -> int:
        reach = images.shape[2 + dimension] + 2 * int(self.padding[dimension]) - self.kernel_size[dimension]
        return reach // self.stride[dimension] + 1

    def _as_product(self, images: Tensor, height: int, width: int) -> Tensor:
        across, down = int(self.padding[1]), int(self.padding[0])
        # Channels last, as the network's images lie in memory.
        padded = F.pad(images.permute(0, 2, 3, 1), (0, 0, across, across, down, down))
        windows = padded.unfold(1, self.kernel_size[0], self.stride[0]).unfold(2, self.kernel_size[1], self.stride[1])
        columns = windows.reshape(images.shape[0] * height * width, -1)
        result = F.linear(columns, self.weight.reshape(self.out_channels, -1), self.bias)
        return result.view(-1, height, width, self.out_channels).permute(0, 3, 1, 2)


def with_small_maps(network: Network) -> Network:
    """Let the convolutions of `network` with many weights be SmallMapConv2d; their parameters and names stay."""
    for name, child in network.named_children():
        if type(child) is nn.Conv2d and _is_eligible(child):
            setattr(network, name, _converted(child))
        else:
            with_small_maps(child)
    return network


def _is_eligible(convolution: nn.Conv2d) -> bool:
    plain = convolution.groups == 1 and convolution.dilation == (1, 1) and convolution.padding_mode == "zeros"
    is_spatial = convolution.kernel_size > (1, 1) and not isinstance(convolution.padding, str)
    return plain and is_spatial and convolution.in_channels * convolution.out_channels >= _MIN_WEIGHTS


def _converted(convolution: nn.Conv2d) -> SmallMapConv2d:
    converted = SmallMapConv2d(
        convolution.in_channels,
        convolution.out_channels,
        convolution.kernel_size,  # type: ignore[arg-type]
        convolution.stride,  # type: ignore[arg-type]
        convolution.padding,  # type: ignore[arg-type]
        bias=convolution.bias is not None,
        device="meta",
    )
    converted.weight, converted.bias = convolution.weight, convolution.bias
    return converted.train(convolution.training)
