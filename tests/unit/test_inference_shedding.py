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
    shedder = Shedder(lambda: 0)
    for _ in range(50):
        assert await outcomes(shedder, 20) == {True: 20}
        shedder.note()
    assert shedder.share == 0


async def test_while_calls_come_late_a_growing_share_is_refused_and_then_a_falling_one() -> None:
    num_late = 0
    shedder = Shedder(lambda: num_late)
    shares = []
    for _ in range(8):
        num_late += (await outcomes(shedder, 100))[True]
        shedder.note()
        shares.append(shedder.share)
    assert shares == sorted(shares)
    assert shares[-1] > 0.5
    refused = (await outcomes(shedder, 1000))[False]
    assert refused == pytest.approx(1000 * shedder.share, abs=2), "evenly"
    for _ in range(100):
        shedder.note()
    assert await outcomes(shedder, 10) == {True: 10}


async def test_a_few_late_calls_say_nothing() -> None:
    num_late = 0
    shedder = Shedder(lambda: num_late)
    await outcomes(shedder, 3)
    num_late = 3
    shedder.note()
    assert shedder.share == 0


@pytest.mark.parametrize(
    "details",
    [
        Details("/tandem.v1.Models/ListModels"),
        Details("/grpc.health.v1.Health/Check"),
        Details("/tandem.v1.Inference/Generate"),
        Details(priority="high"),
    ],
)
async def test_operators_probes_streams_and_the_urgent_are_always_heard(details: Details) -> None:
    shedder = Shedder(lambda: 0)
    shedder.share = 0.95
    assert await outcomes(shedder, 50, details) == {True: 50}


async def test_the_refusal_says_when_to_try_again() -> None:
    told: list[str] = []
    shedder = Shedder(lambda: 0, lambda: told.append("shed"))
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
