"""What a shadow has of the devices: batches of both models, when nobody else wants one, and never for long."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from services.inference.decoding import Batch, Decoder
from services.inference.devices import Devices
from services.inference.scheduler import DeviceScheduler, Done, Predicts, Priority
from services.inference.shadow import Shadow
from tandem.data.raw_image import RawImage
from tandem.errors import InvalidImage, Unavailable

if TYPE_CHECKING:
    from services.inference.classify import GivenImage

# After so long without an idle device what waits is dropped. A job waits for its turn no longer either: after twice
# that it would count as urgent as a call.
PATIENCE_S = 1.0
# Idle is a device on which nobody has a place at two looks so far apart; each pause between a caller's calls is not.
LOOK_S = 0.005
# How long a device waits for one batch of one network, whatever that does.
MAX_HOLD_S = 0.25
# So many times as long as it had a device it then leaves it alone: at most one call in five finds a batch of a shadow
# on it, however large the share is.
REST = 4


class Busy(Exception):
    """No device had a turn to spare."""


@dataclass(frozen=True)
class Handed:
    """The images of a call, waiting: pixels (N, 3, S, S) if both models take the same, else the images as they came."""

    shadow: Shadow
    labels: Sequence[str]
    pixels: Tensor | None
    sources: Sequence[bytes | RawImage]

    @classmethod
    def of(cls, shadow: Shadow, images: "Sequence[GivenImage]", batch: Batch) -> "Handed":
        """Take from a call what its shadow needs."""
        labels = [images[index].label for index in batch.indices]
        if shadow.preprocessings[0] == shadow.preprocessings[1]:
            return cls(shadow, labels, batch.pixels[0], ())
        return cls(shadow, labels, None, [images[index].data for index in batch.indices])

    @property
    def num_images(self) -> int:
        """Images in all."""
        return len(self.labels)

    @property
    def num_bytes(self) -> int:
        """What they take in memory."""
        return sum(map(len, self.sources)) if self.pixels is None else self.pixels.nbytes


class Runner:
    """Runs both models on images that were handed over."""

    def __init__(self, devices: Devices, decoder: Decoder) -> None:
        self._devices, self._decoder = devices, decoder
        # Since the last rest.
        self._used_s = 0.0

    async def run(self, handed: Handed, first: int, end: int) -> None:
        """Record what both models say of images `first` to `end` (excluded).

        Raises Busy; TookTooLong where a network holds the device for more than MAX_HOLD_S; and whatever a network or a
        decoder fails with.
        """
        await self._rest()
        number = await self._idle_device()
        shadow = handed.shadow
        pixels = await self._pixels(handed, first, end)
        production, candidate = shadow.production(), shadow.candidate()
        if production is None or candidate is None:
            raise Unavailable(f"a model of the shadow of {shadow.terms.label} has left the memory")
        of_production, of_candidate = [
            await self._logits(shadow, self._devices[number], model.on(number).in_float32().runtime, its_pixels)
            for model, its_pixels in zip((production, candidate), pixels, strict=True)
        ]
        labels = handed.labels[first:end]
        await asyncio.to_thread(shadow.record, of_production.value, of_candidate.value, labels)
        shadow.recorded(end - first, max(of_production.compute_ms, of_candidate.compute_ms) / 1000)

    async def _rest(self) -> None:
        used_s, self._used_s = self._used_s, 0.0
        await asyncio.sleep(REST * used_s)

    async def _idle_device(self) -> int:
        """Return the number of a device that has nothing to do; raise Busy after PATIENCE_S without one."""
        ends_at, idle_before = time.monotonic() + PATIENCE_S, set[int]()
        while True:
            idle = {number for number, scheduler in enumerate(self._devices) if _is_idle(scheduler)}
            if still := idle & idle_before:
                return min(still)
            if time.monotonic() > ends_at:
                raise Busy
            idle_before = idle
            await asyncio.sleep(LOOK_S)

    async def _pixels(self, handed: Handed, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Return the images as each of the models takes them."""
        if handed.pixels is not None:
            return handed.pixels[first:end], handed.pixels[first:end]
        decoded = []
        for source in handed.sources[first:end]:
            # One at a time, so that it takes no more than one thread of the pool from callers, and behind those.
            batch = await self._decoder.decode(
                [partial(_as_it_is, source)], handed.shadow.preprocessings, priority=Priority.LOW
            )
            if not batch.indices:
                raise InvalidImage(f"an image that was decoded before is none now: {batch.errors[0]}")
            decoded.append(batch.pixels)
        of_production, of_candidate = zip(*decoded, strict=True)
        return torch.cat(of_production), torch.cat(of_candidate)

    async def _logits(
        self, shadow: Shadow, scheduler: DeviceScheduler, runtime: Predicts, pixels: Tensor
    ) -> Done[Tensor]:
        """Return the logits (N, C) of a batch."""

        def predict() -> Tensor:
            begun_at = time.monotonic()
            try:
                return shadow.aside.run(lambda: runtime.predict(pixels), MAX_HOLD_S)
            finally:
                self._used_s += time.monotonic() - begun_at

        try:
            # Not by a deadline of the queue: what is late there counts as a call that was, and sheds others.
            async with asyncio.timeout(PATIENCE_S) as waiting:
                # On a lane of the shadow's own: no batch of it is in the figures of the models.
                return await scheduler.run(predict, priority=Priority.LOW, runtime=shadow)
        except TimeoutError:
            if waiting.expired():
                raise Busy from None
            raise


def _as_it_is(source: bytes | RawImage) -> bytes | RawImage:
    return source


def _is_idle(scheduler: DeviceScheduler) -> bool:
    return scheduler.is_alive and not scheduler.num_items and not scheduler.is_wanted
