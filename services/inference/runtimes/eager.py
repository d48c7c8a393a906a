"""Networks run by torch as they are.

An image's logits must not depend on the batch that it came in (guarantee 5 of the design). On a CPU, torch takes other
kernels for a batch of one, and BLAS others for few rows than for many, with other roundings. So a single image is run
twice over in a batch of two, and linear heads see blocks of LINEAR_ROWS rows, padded. Measured over batches of 1 to 32
(2 cores with AVX-512, torch 2.15, random weights), the logits of ResNet-18 (32, 64 and 224 px), SqueezeNet, MobileNet
v2 and v3, ShuffleNet, DenseNet-121 and VGG-11 are then equal to the bit. Networks that put more than two dimensions
through linear layers or vectorise their activations over the whole batch keep a rest: ConvNeXt-T, Swin-T, ViT and
EfficientNet differ by no more than 7e-6 in logits of about 3. Left plain, ResNet-18 differs by 3e-5 in logits of about
50. The cost falls on the call of a single image: ResNet-18 at 64 px takes 10.9 ms, the time of two, instead of 5.4;
batches of 8 and 32 take 1.01 and 1.00 times what they take plain (medians, n=20, in turns).

On a GPU, cuDNN chooses deterministic kernels and TF32 is off; roundings may still change with the batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from services.inference.runtimes.interface import Precision
from services.inference.runtimes.pixels import FromPixels
from tandem.checkpoints.card import Preprocessing
from tandem.errors import CheckpointCorrupt

LINEAR_ROWS = 16


class EagerClassifier:
    """A classifier on `device`; `network` is taken over, and cast to `precision`."""

    name = "eager"

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        device: torch.device,
        precision: Precision = "float32",
    ) -> None:
        dtype = getattr(torch, precision)
        self.dtype: str = precision
        self._network = FromPixels(_with_blocked_heads(network.to(dtype)), preprocessing, dtype).to(device)
        self._image_size = preprocessing.image_size
        self._device = device

    @property
    def network(self) -> FromPixels:
        """The network as it is run, on the device."""
        return self._network

    @torch.inference_mode()
    def predict(self, pixels: Tensor) -> Tensor:
        """Return logits float32 (B, C) on the CPU for pixels uint8 (B, 3, S, S), B ≥ 1."""
        num_images = pixels.shape[0]
        if num_images == 1:
            pixels = pixels.expand(2, -1, -1, -1)
        logits: Tensor = self._network(pixels.to(self._device))
        return logits[:num_images].cpu()

    def warm(self) -> None:
        """Run once; raise CheckpointCorrupt if the answer is not finite."""
        check_finite(self.predict(torch.zeros(1, 3, self._image_size, self._image_size, dtype=torch.uint8)))


class _BlockedLinear(nn.Linear):
    """A linear layer whose answer for a row (of a batch of rows) does not depend on how many rows there are."""

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, out) for features (B, in); other shapes are left to torch."""
        if features.dim() != 2 or features.device.type != "cpu":
            return super().forward(features)
        num_rows = features.shape[0]
        padded = F.pad(features, (0, 0, 0, -num_rows % LINEAR_ROWS))
        blocks = [F.linear(block, self.weight, self.bias) for block in torch.split(padded, LINEAR_ROWS)]
        return torch.cat(blocks)[:num_rows]


def _with_blocked_heads(network: nn.Module) -> nn.Module:
    """Return `network` with its linear layers replaced, itself included; the parameters are the same."""
    if type(network) is nn.Linear:
        return _blocked(network)
    for name, child in network.named_children():
        setattr(network, name, _with_blocked_heads(child))
    return network


def _blocked(linear: nn.Linear) -> _BlockedLinear:
    blocked = _BlockedLinear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    blocked.weight, blocked.bias = linear.weight, linear.bias
    return blocked.train(linear.training)


def check_finite(logits: Tensor) -> None:
    """Raise CheckpointCorrupt if a logit is infinite or no number."""
    if not bool(logits.isfinite().all()):
        raise CheckpointCorrupt("the network's answers are not finite numbers")
