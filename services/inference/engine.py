"""What the calls work with, handed in by the one wiring place."""

from dataclasses import dataclass, field

from services.inference.counts import LoadCounts
from services.inference.decoding import Decoder
from services.inference.devices import Devices
from services.inference.registry import ServingRegistry
from services.inference.scheduler import DeviceScheduler
from services.inference.shadows import Shadows
from tandem.checkpoints.store.cache import StoreCache
from tandem.volume import Volume


@dataclass(frozen=True)
class Engine:
    """The models, the devices, the threads that decode, the volume, the shadows, and what was loaded so far."""

    models: ServingRegistry
    devices: Devices
    decoder: Decoder
    volume: Volume
    shadows: Shadows
    loads: LoadCounts = field(default_factory=LoadCounts)
    # What keeps the volume in step with an object store, where there is one.
    cache: StoreCache | None = None

    @property
    def scheduler(self) -> DeviceScheduler:
        """Of the first device, or the only one."""
        return self.devices[0]
