"""Which calls are refused as they arrive, and when."""

from collections import Counter
from typing import Any

import grpc
import pytest

from services.inference.shedding import Shedder

CLASSIFY = "/tandem.v1.Inference/Classify"


class Details:
    def __init__(self, method: str = CLASSIFY, priority: str = "normal") -> None:
        self.method = method
        self.invocation_metadata = (("tandem-priority", priority),)


async def let_in(_: object) -> str:
    return "let in"


async def outcomes(shedder: Shedder, count: int, details: Any = None) -> Counter[bool]:
    intercept: Any = shedder.intercept_service
    found = [await intercept(let_in, details or Details()) for _ in range(count)]
    return Counter(handler == "let in" for handler in found)


async def test_a_server_that_keeps_up_refuses_nobody() -> None:
    shedder = Shedder(lambda: 0, lambda: 0.0)
    for _ in range(50):
        assert await outcomes(shedder, 20) == {True: 20}
        shedder.note(0.05, 0.05)
    assert shedder.share == 0


async def test_while_calls_come_late_a_growing_share_is_refused_and_then_a_falling_one() -> None:
    num_late = 0
    shedder = Shedder(lambda: num_late, lambda: 0.0)
    shares = []
    for _ in range(8):
        num_late += (await outcomes(shedder, 100))[True]
        shedder.note(0.05, 0.05)
        shares.append(shedder.share)
    assert shares == sorted(shares)
    assert shares[-1] > 0.5
    refused = (await outcomes(shedder, 1000))[False]
    assert refused == pytest.approx(1000 * shedder.share, abs=2), "evenly"
    for _ in range(100):
        shedder.note(0.05, 0.05)
    assert await outcomes(shedder, 10) == {True: 10}


@pytest.mark.parametrize(
    ("asked_s", "cpu_s", "is_shed"), [(0.01, 0.01, False), (0.045, 0.01, True), (0.01, 0.045, True)]
)
async def test_late_calls_of_an_impatient_caller_are_nobody_elses(asked_s: float, cpu_s: float, is_shed: bool) -> None:
    """Deadlines shorter than the work are late on an idle server too; one that is asked for too much is not idle."""
    num_late, asked = 0, 0.0
    shedder = Shedder(lambda: num_late, lambda: asked)
    for _ in range(5):
        num_late += (await outcomes(shedder, 100))[True]
        asked += asked_s
        shedder.note(0.05, cpu_s)
    assert (shedder.share > 0) == is_shed


async def test_what_was_shed_would_have_asked_too() -> None:
    num_late, asked = 0, 0.0
    shedder = Shedder(lambda: num_late, lambda: asked)
    shedder.share = 0.8
    num_late += (await outcomes(shedder, 100))[True]
    # A fifth is let in, and asks for a fifth of what would be the whole of the device.
    asked += 0.01
    shedder.note(0.05, 0.0)
    assert shedder.share > 0.8


async def test_a_few_late_calls_say_nothing() -> None:
    num_late = 0
    shedder = Shedder(lambda: num_late, lambda: 0.0)
    await outcomes(shedder, 3)
    num_late = 3
    shedder.note(0.05, 0.05)
    assert shedder.share == 0


@pytest.mark.parametrize(
    "details",
    [
        Details("/tandem.v1.Models/ListModels"),
        Details("/grpc.health.v1.Health/Check"),
        Details("/tandem.v1.Inference/Generate"),
        Details(priority="high"),
        Details(priority="HIGH"),
    ],
)
async def test_operators_probes_streams_and_the_urgent_are_always_heard(details: Details) -> None:
    shedder = Shedder(lambda: 0, lambda: 0.0)
    shedder.share = 0.95
    assert await outcomes(shedder, 50, details) == {True: 50}


async def test_the_refusal_says_when_to_try_again() -> None:
    told: list[str] = []
    shedder = Shedder(lambda: 0, lambda: 0.0, lambda: told.append("shed"))
    shedder.share = 0.95
    server = grpc.aio.server(interceptors=(shedder,))
    method: Any = grpc.unary_unary_rpc_method_handler(None)  # type: ignore[arg-type]
    service = grpc.method_handlers_generic_handler("tandem.v1.Inference", {"Classify": method})
    server.add_generic_rpc_handlers((service,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: Any = channel.unary_unary(CLASSIFY)
            shedder._owed = 0.5
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"\xff no message at all", timeout=60)
    finally:
        await server.stop(0)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata() or ())["grpc-retry-pushback-ms"] == "1000"
    assert told == ["shed"]
