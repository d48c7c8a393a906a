"""Hosts of a network on one machine: network namespaces, each with a cable of its own. Needs root and iproute2."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

# Set aside for measurements between networks (RFC 2544): no machine that runs tests is there.
_NETWORK = "198.18"


@dataclass(frozen=True)
class Host:
    """A namespace `name` that reaches us, and nobody else, at `our_address`; on the same volume and processor."""

    name: str
    cable: str
    our_address: str

    @classmethod
    def make(cls, index: int) -> "Host":
        """Make host `index` (0 to 15) of this process; skip the test where that is not possible."""
        if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter"):
            pytest.skip("needs root, iproute2 (ip) and nsenter to make network namespaces")
        # Unique among processes: names by pid, addresses by pid modulo the number of networks there are.
        pid = os.getpid()
        base = f"{_NETWORK}.{pid % 250}.{(pid // 250 % 4) * 64 + index * 4}"
        prefix, _, last = base.rpartition(".")
        ours, theirs = f"{prefix}.{int(last) + 1}", f"{prefix}.{int(last) + 2}"
        host = cls(f"tandem-test-{pid}-{index}", f"tdm{pid}x{index}"[:15], ours)
        if subprocess.run(["ip", "netns", "add", host.name], capture_output=True).returncode:
            pytest.skip("this container may not make network namespaces")
        try:
            _ip("link", "add", host.cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("address", "add", f"{ours}/30", "dev", host.cable)
            _ip("link", "set", host.cable, "up")
            _ip("-n", host.name, "address", "add", f"{theirs}/30", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", host.name, "link", "set", device, "up")
        except BaseException:
            host.remove()
            raise
        return host

    @property
    def prefix(self) -> list[str]:
        """What a command is run with to run on the host; its pid is that of the command itself."""
        return ["nsenter", f"--net=/run/netns/{self.name}"]

    def runs(self, pid: int) -> bool:
        """True if process `pid` is on this host."""
        try:
            return Path(f"/proc/{pid}/ns/net").stat().st_ino == Path(f"/run/netns/{self.name}").stat().st_ino
        except OSError:
            return False

    def unplug(self) -> None:
        """Cut the host off: what it sends vanishes, and so does what is sent to it."""
        _ip("link", "set", self.cable, "down")

    def plug_in(self) -> None:
        _ip("link", "set", self.cable, "up")

    def remove(self) -> None:
        # The cable goes with either end.
        subprocess.run(["ip", "link", "delete", self.cable], capture_output=True)
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
