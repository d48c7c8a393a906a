"""Which device a spec or a setting means."""

import torch

from tandem.errors import InvalidRequest


def resolve_device(name: str) -> torch.device:
    """Return the device of "auto", "cpu", "cuda" or "cuda:N"; raise InvalidRequest if it is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidRequest(f"{name!r} is no device; use auto, cpu, cuda or cuda:N", field="device") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise InvalidRequest(f"device {name!r} is not here ({there} CUDA devices); use cpu", field="device")
    return device
