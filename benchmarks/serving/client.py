"""A client that costs little: requests are made up beforehand, answers are counted and not read.

`python -m benchmarks.serving.client LOAD` takes a Load as JSON, drives the server, and writes what it saw as JSON: a
process of its own, so that its share of the processor can be told from the server's.
"""

import asyncio
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tandem.wire.limits import CHANNEL_OPTIONS
from tandem.wire.v1 import inference_pb2 as pb

CLASSIFY = "/tandem.v1.Inference/Classify"


@dataclass(frozen=True)
class Load:
    """How the server is driven: `in_flight` calls at a time, or `rate` calls a second whatever becomes of them."""

    address: str
    # A folder of them.
    images: str
    seconds: float
    batch: int = 1
    in_flight: int = 1
    rate: float = 0.0
    deadline_s: float = 60.0
    warm_up_s: float = 1.0
    model: str = "resnet"


@dataclass
class Seen:
    """Calls that ended within the measured time."""

    # Of those answered, milliseconds from the time that they were to begin.
    latencies_ms: list[float] = field(default_factory=list)
    codes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    # Of one core.
    cpu_share: float = 0.0

    @property
    def calls_per_s(self) -> float:
        """Calls that were answered."""
        return len(self.latencies_ms) / self.seconds

    def percentile_ms(self, share: float) -> float:
        """Return the latency that `share` of the answered calls stayed within."""
        ordered = sorted(self.latencies_ms)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def drive(load: Load) -> Seen:
    """Drive the server from a process of its own; return what it saw."""
    return start(load).result()


@dataclass(frozen=True)
class Driving:
    """A client at work."""

    process: "subprocess.Popen[bytes]"

    @property
    def goes_on(self) -> bool:
        """True until its time is over."""
        return self.process.poll() is None

    def result(self) -> Seen:
        """Wait for its end."""
        output, _ = self.process.communicate()
        if self.process.returncode:
            raise RuntimeError("the client failed")
        return Seen(**json.loads(output))


def start(load: Load) -> Driving:
    """Start a client."""
    command = [sys.executable, "-m", "benchmarks.serving.client", json.dumps(asdict(load))]
    return Driving(subprocess.Popen(command, stdout=subprocess.PIPE))


async def run(load: Load) -> Seen:
    """Drive the server for the warm-up, then for the measured time."""
    requests = _requests(load, [path.read_bytes() for path in sorted(Path(load.images).iterdir())])
    async with grpc.aio.insecure_channel(load.address, options=CHANNEL_OPTIONS) as channel:
        call: Any = channel.unary_unary(CLASSIFY)
        seen, codes = Seen(), Counter[str]()
        began = time.monotonic() + load.warm_up_s
        ends = began + load.seconds

        async def one(number: int, due: float) -> None:
            try:
                await call(requests[number % len(requests)], timeout=load.deadline_s)
                code = "OK"
            except grpc.aio.AioRpcError as error:
                code = error.code().name
            now = time.monotonic()
            if began <= now < ends:
                codes[code] += 1
                if code == "OK":
                    seen.latencies_ms.append((now - due) * 1000)

        cpu = asyncio.create_task(cpu_between(began, ends))
        await (_open(load, one, ends) if load.rate else _closed(load, one, ends))
        seen.seconds, seen.codes, seen.cpu_share = load.seconds, dict(codes), await cpu
    return seen


def _requests(load: Load, images: list[bytes]) -> list[bytes]:
    made = []
    for first in range(32):
        chosen = [images[(first * load.batch + number) % len(images)] for number in range(load.batch)]
        request = pb.ClassifyRequest(model=load.model, images=[pb.Image(data=data) for data in chosen], top_k=5)
        made.append(request.SerializeToString())
    return made


One = Callable[[int, float], Awaitable[None]]


async def _closed(load: Load, one: One, ends: float) -> None:
    async def caller(number: int) -> None:
        while (now := time.monotonic()) < ends:
            await one(number, now)
            number += load.in_flight

    await asyncio.gather(*(caller(number) for number in range(load.in_flight)))


async def _open(load: Load, one: One, ends: float) -> None:
    tasks: set[asyncio.Task[None]] = set()
    due, number = time.monotonic(), 0
    while due < ends:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        # What is late goes at once, and its latency counts from when it was due.
        while due <= time.monotonic():
            task = asyncio.ensure_future(one(number, due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            due, number = due + 1 / load.rate, number + 1
    await asyncio.gather(*tasks)


async def cpu_between(began: float, ends: float) -> float:
    """Return the share of a core that this process takes from `began` to `ends` (time.monotonic())."""
    await asyncio.sleep(max(0.0, began - time.monotonic()))
    before = _cpu_s()
    await asyncio.sleep(ends - time.monotonic())
    return (_cpu_s() - before) / (ends - began)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Do what the argument says."""
    seen: Any = asyncio.run(run(Load(**json.loads(sys.argv[1]))))
    print(json.dumps(asdict(seen)))


if __name__ == "__main__":
    main()
