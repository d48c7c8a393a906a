"""What a check of `tandem doctor` says."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """What one check found; `remedy` where it is not ok."""

    name: str
    state: Literal["ok", "off", "bad"]
    detail: str
    remedy: str = ""
