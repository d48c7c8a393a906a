"""An image as plain pixels. Free of torch, so that clients build it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RawImage:
    """Pixels not yet resized: `rgb` has red, green and blue of each, uint8, row by row from the top.

    Of an RGB image of Pillow `RawImage(*image.size, image.tobytes())`; of a uint8 array (H, W, 3)
    `RawImage(W, H, array.tobytes())`.
    """

    width: int
    height: int
    rgb: bytes

    def __len__(self) -> int:
        return len(self.rgb)
