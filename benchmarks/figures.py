"""The table of claims that the scripts for a GPU print."""

import platform
from dataclasses import dataclass

import torch
import torchvision


@dataclass(frozen=True)
class Figure:
    """A row of the table."""

    name: str
    reached: str
    claim: str = ""
    holds: bool | None = None


def print_header(device: torch.device, smoke: bool) -> None:
    """Say what the figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    python = platform.python_version()
    print(f"{name}; Python {python}, torch {torch.__version__}, torchvision {torchvision.__version__}; n = 1")
    if smoke:
        print("smoke test: the figures say nothing")
    print("\n| | reached | claim | holds |\n|---|---|---|---|", flush=True)


def print_figure(figure: Figure, smoke: bool) -> None:
    """Print a row."""
    holds = "" if figure.holds is None or smoke else ("yes" if figure.holds else "no")
    print(f"| {figure.name} | {figure.reached} | {figure.claim} | {holds} |", flush=True)
