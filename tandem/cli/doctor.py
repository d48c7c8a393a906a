"""`tandem doctor`: what works on this machine, and the remedy for what does not."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from tandem.cli.findings import Finding
from tandem.cli.output import console, json_option, print_json, table
from tandem.errors import TandemError, Unavailable
from tandem.settings import Settings
from tandem.volume import Volume

_LEAST_FREE_BYTES = 2 * 2**30
_TORCH_TIMEOUT_S = 120.0
_MARKS = {"ok": "✓", "off": "-", "bad": "✗"}

# Asked in a process of its own: the command line imports no torch.
_TORCH_FACTS = """
import json, torch, torchvision
names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "torchvision": torchvision.__version__, "gpus": names}))
"""


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check Python, PyTorch, GPU, volume, broker and inference; exit 1 if something needed is missing."""
    settings = Settings.from_environment()
    checks: list[Callable[[Settings], list[Finding]]] = [_python, _torch, _volume, _broker_binary, _ports, _services]
    findings = [finding for check in checks for finding in check(settings)]
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        result = table("", "check", "found", "remedy")
        for finding in findings:
            result.add_row(_MARKS[finding.state], finding.name, finding.detail, finding.remedy)
        console().print(result)
    if any(finding.state == "bad" for finding in findings):
        raise Unavailable("something that Tandem needs is missing; the remedies are above")


def _python(_: Settings) -> list[Finding]:
    found = sys.version.split()[0]
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return [Finding("Python", "ok", found)]
    return [Finding("Python", "bad", found, "use Python 3.11 to 3.13")]


def _torch(_: Settings) -> list[Finding]:
    command = [sys.executable, "-c", _TORCH_FACTS]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S, check=True)
        facts = json.loads(answer.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1:]
        return [
            Finding("PyTorch", "bad", " ".join(said), "install what requirements.lock says: make clean, then make demo")
        ]
    versions = Finding("PyTorch", "ok", f"torch {facts['torch']}, torchvision {facts['torchvision']}")
    if facts["gpus"]:
        return [versions, Finding("GPU", "ok", ", ".join(facts["gpus"]))]
    return [versions, Finding("GPU", "off", "none; training and serving use the CPU", "for a GPU: NVIDIA's driver")]


def _volume(settings: Settings) -> list[Finding]:
    places = _written(Volume(settings.home))
    for place in sorted(places):
        if not place.is_dir() or not os.access(place, os.W_OK):
            named = place if place.is_relative_to(settings.home) else settings.home
            detail = f"{named} can't be written"
            return [Finding("volume", "bad", detail, "set TANDEM_HOME to a folder of yours")]
    free = min(shutil.disk_usage(place).free for place in places)
    detail = f"{settings.home}, {free / 2**30:.1f} GiB free"
    if free < _LEAST_FREE_BYTES:
        return [Finding("volume", "bad", detail, "make room, or set TANDEM_HOME to a larger volume")]
    return [Finding("volume", "ok", detail)]


def _written(volume: Volume) -> set[Path]:
    """Return the folders of the volume, each of which may be a mount of its own, or where they will come to be."""
    folders = (volume.datasets, volume.runs, volume.models)
    return {next(path for path in (folder, *folder.parents) if path.exists()) for folder in folders}


def _broker_binary(settings: Settings) -> list[Finding]:
    from tandem.local.broker import find_server

    try:
        return [Finding("embedded broker", "ok", Path(find_server()).name)]
    except TandemError as error:
        return [Finding("embedded broker", "off" if settings.broker else "bad", "no server binary", str(error))]


def _ports(settings: Settings) -> list[Finding]:
    host, _, port = settings.listen.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except (OSError, ValueError) as error:
            remedy = "stop what listens there, or set TANDEM_LISTEN ('tandem up' takes a free port)"
            return [Finding("ports", "off", f"{settings.listen} can't be listened on: {error}", remedy)]
    return [Finding("ports", "ok", f"{settings.listen} is free")]


def _services(settings: Settings) -> list[Finding]:
    from tandem.cli.doctor_inference import inference_findings
    from tandem.cli.system import system_status

    status = system_status(settings)
    findings = [_service(name, facts) for name, facts in status.items()]
    if (inference := status["inference"])["running"]:
        findings += inference_findings(settings, str(inference["address"]))
    return findings


def _service(name: str, facts: dict[str, Any]) -> Finding:
    if facts["running"]:
        return Finding(name, "ok", str(facts["address"] or "running"))
    detail = "does not run" + (f" at {facts['address']}" if facts["address"] else "")
    return Finding(name, "off", detail, facts.get("problem") or "'tandem up --detach' starts it")
