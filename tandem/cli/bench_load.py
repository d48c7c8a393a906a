"""Load for an inference server, from this process: so many calls in flight for so long, and what became of them."""

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tandem.access import ClientAccess
from tandem.wire.channel import open_aio_channel
from tandem.wire.status import from_rpc_error
from tandem.wire.v1 import inference_pb2 as pb

_CLASSIFY, _GENERATE = "/tandem.v1.Inference/Classify", "/tandem.v1.Inference/Generate"
_DEADLINE_S = 120.0
# Messages that are made before the clock starts.
_NUM_REQUESTS = 32


@dataclass(frozen=True)
class Target:
    """A server and a model on it."""

    address: str
    access: ClientAccess
    model: str


@dataclass
class Seen:
    """What ended within `seconds`: latencies in seconds of calls, of first words, and between words."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    first_words: list[float] = field(default_factory=list)
    between_words: list[float] = field(default_factory=list)
    num_items: int = 0
    # Of one core, of this process.
    client_cpu_share: float = 0.0

    @property
    def items_per_s(self) -> float:
        """Images or words."""
        return self.num_items / self.seconds


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Return p50, p95 and p99 in milliseconds; none of nothing."""
    ordered = sorted(seconds)
    return {
        f"p{percent}_ms": 1000 * ordered[min(percent * len(ordered) // 100, len(ordered) - 1)]
        for percent in (50, 95, 99)
        if ordered
    }


def drive_images(target: Target, images: Path, batch: int, in_flight: int, seconds: float) -> Seen:
    """Classify `batch` images a message, `in_flight` messages at a time; raise what a call fails with."""
    data = [path.read_bytes() for path in sorted(images.iterdir())]
    requests = [_classify_request(target.model, data, first, batch) for first in range(_NUM_REQUESTS)]

    async def call(channel: Any, number: int, seen: Seen, began: float) -> None:
        classify = channel.unary_unary(_CLASSIFY)
        started = time.monotonic()
        await classify(requests[number % len(requests)], timeout=_DEADLINE_S)
        if began <= (now := time.monotonic()) < began + seen.seconds:
            seen.latencies.append(now - started)
            seen.num_items += batch

    return asyncio.run(_drive(target, call, in_flight, seconds))


def drive_texts(target: Target, words: int, in_flight: int, seconds: float) -> Seen:
    """Write texts of `words` words, `in_flight` at a time; raise what a call fails with."""

    async def call(channel: Any, number: int, seen: Seen, began: float) -> None:
        sampling = pb.SamplingParameters(max_words=words, seed=number)
        generate = channel.unary_stream(
            _GENERATE,
            request_serializer=pb.GenerateRequest.SerializeToString,
            response_deserializer=pb.GenerateResponse.FromString,
        )
        started = before = time.monotonic()
        is_first = True
        async for message in generate(pb.GenerateRequest(model=target.model, sampling=sampling), timeout=_DEADLINE_S):
            now, count = time.monotonic(), len(message.words)
            if count and began <= now < began + seen.seconds:
                seen.num_items += count
                waits = seen.first_words if is_first else seen.between_words
                waits += [(now - started if is_first else (now - before) / count)] * (1 if is_first else count)
            is_first = is_first and not count
            before = now if count else before
        if began <= (now := time.monotonic()) < began + seen.seconds:
            seen.latencies.append(now - started)

    return asyncio.run(_drive(target, call, in_flight, seconds))


Call = Callable[[Any, int, Seen, float], Awaitable[None]]


async def _drive(target: Target, call: Call, in_flight: int, seconds: float) -> Seen:
    """Keep `in_flight` calls under way for `seconds`, after a fourth of that which does not count."""
    seen = Seen(seconds)
    async with open_aio_channel(target.address, target.access) as channel:
        began = time.monotonic() + seconds / 4
        ends = began + seconds

        async def caller(number: int) -> None:
            while time.monotonic() < ends:
                await call(channel, number, seen, began)
                number += in_flight

        callers = [asyncio.create_task(caller(number)) for number in range(in_flight)]
        try:
            await asyncio.sleep(seconds / 4)
            before = _cpu_s()
            # Those who fail end the wait; those still under way at its end are not waited for.
            await asyncio.wait(callers, timeout=max(0.0, ends - time.monotonic()), return_when=asyncio.FIRST_EXCEPTION)
            # A machine that is slower than that shows what it can in as long as it takes.
            while not seen.num_items and not any(each.done() for each in callers):
                seen.seconds += seconds
                await asyncio.wait(callers, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            seen.client_cpu_share = (_cpu_s() - before) / seen.seconds
            for each in callers:
                if each.done():
                    each.result()
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, target.address, is_encrypted=target.access.is_encrypted) from None
        finally:
            for each in callers:
                each.cancel()
            await asyncio.gather(*callers, return_exceptions=True)
    return seen


def _classify_request(model: str, images: Sequence[bytes], first: int, batch: int) -> bytes:
    chosen = [pb.Image(data=images[(first * batch + number) % len(images)]) for number in range(batch)]
    return pb.ClassifyRequest(model=model, images=chosen, top_k=5).SerializeToString()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
