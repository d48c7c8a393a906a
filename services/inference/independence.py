"""Whether a classifier's images may share batches: only if an image's logits are the same bits in each of them.

Guarantee 5 of the design: a prediction does not depend on what it was batched with. It is tried on load, since it hangs
on the network, the runtime, the device and its libraries: ResNets, MobileNets and others pass on a CPU (see
runtimes.eager), ConvNeXt, ViT and EfficientNet do not. Calls to those get batches of their own.
"""

import time

import torch

from services.inference.scheduler import MAX_BATCH, DeviceScheduler, Predicts, Priority

# A network so slow that trying it takes longer gains little from sharing.
MAX_TRIAL_S = 10.0


async def rows_are_independent(scheduler: DeviceScheduler, runtime: Predicts, image_size: int) -> bool:
    """Return whether noise images get the same bits alone, among few, and among many in another order."""
    generator = torch.Generator().manual_seed(0)
    shape = (MAX_BATCH, 3, image_size, image_size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    ends_at = time.monotonic() + MAX_TRIAL_S
    rows: list[dict[int, torch.Tensor]] = []
    for places in ([0], [0, 3, 5, 6, 9, 11], list(range(MAX_BATCH)), list(range(MAX_BATCH - 1))[::-1]):
        if time.monotonic() > ends_at:
            return False
        # Each pass is a turn of its own, so that the models that serve are not held up.
        done = await scheduler.predict(runtime, pixels[places], priority=Priority.LOW)
        rows.append(dict(zip(places, done.value, strict=True)))
    alone, few, many, turned = rows
    return (
        torch.equal(alone[0], few[0])
        and all(torch.equal(row, many[place]) for place, row in few.items())
        and all(torch.equal(row, many[place]) for place, row in turned.items())
    )
