"""What the calls work with, handed in by the one wiring place."""

from dataclasses import dataclass

from services.inference.decoding import Decoder
from services.inference.registry import ServingRegistry
from services.inference.scheduler import DeviceScheduler
from tandem.volume import Volume


@dataclass(frozen=True)
class Engine:
    """The models, the device, the threads that decode, and the volume."""

    models: ServingRegistry
    scheduler: DeviceScheduler
    decoder: Decoder
    volume: Volume
