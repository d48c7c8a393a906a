"""Clients that die, stall, lie and send rubbish: a neighbour's answers stay right, to the bit, and the server goes on.

TANDEM_FAULT_TRIALS multiplies how often each fault is tried (1).
"""

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from factories import encode, picture, png
from inference_server import ServerProcess
from waiting import wait_for

from tandem.client import Client, GenerationSummary, SamplingOptions, TextPiece
from tandem.wire.v1 import inference_pb2 as pb

pytest_plugins = ["inference_fixtures"]

TIMES = int(os.environ.get("TANDEM_FAULT_TRIALS", "1"))
CLASSIFY, GENERATE = "/tandem.v1.Inference/Classify", "/tandem.v1.Inference/Generate"
ROOT = Path(__file__).parents[3]
# What a call may end with, whatever is wrong with it.
CLEAR = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"}


class Neighbour:
    """A caller that does nothing wrong, over and over, and compares each answer with the first ones."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stop = threading.Event()
        self.num_answers = 0
        self.wrong: list[str] = []
        with Client(address) as client:
            self._expected = self._ask(client)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _ask(self, client: Client) -> list[Any]:
        classes = [result.top_k for result in client.classify("a", [png(number) for number in range(3)]).results]
        text = [
            step.text if isinstance(step, TextPiece) else step.finish_reason
            for step in client.generate("LSTM", "the cat", 30, SamplingOptions(seed=11))
            if isinstance(step, TextPiece | GenerationSummary)
        ]
        return [classes, "".join(text)]

    def _run(self) -> None:
        with Client(self._address) as client:
            while not self._stop.is_set():
                try:
                    answer = self._ask(client)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is wrong
                    self.wrong.append(repr(error))
                else:
                    self.wrong += [] if answer == self._expected else [repr(answer)]
                self.num_answers += 1

    def check(self) -> None:
        seen = self.num_answers
        wait_for(lambda: self.num_answers > seen + 1)
        self._stop.set()
        self._thread.join(60)
        assert self.wrong == []


@pytest.fixture
def neighbour(server: ServerProcess, client: Client) -> Iterator[Neighbour]:
    neighbour = Neighbour(server.address)
    yield neighbour
    neighbour.check()
    assert server.process.poll() is None


async def codes_of(server: ServerProcess, method: str, requests: list[bytes], timeout_s: float = 60.0) -> Counter[str]:
    """Send requests, 32 at a time; return how they ended."""
    codes: Counter[str] = Counter()
    room = asyncio.Semaphore(32)
    async with grpc.aio.insecure_channel(server.address) as channel:
        unary: Any = channel.unary_unary(method)

        async def send(request: bytes) -> None:
            async with room:
                try:
                    await unary(request, timeout=timeout_s)
                    codes["OK"] += 1
                except grpc.aio.AioRpcError as error:
                    codes[error.code().name] += 1

        await asyncio.gather(*map(send, requests))
    return codes


def spoiled(data: bytes, chance: random.Random) -> bytes:
    """Return `data` with some bytes changed, cut away, doubled or put in."""
    made = bytearray(data)
    for _ in range(chance.randrange(1, 8)):
        place = chance.randrange(len(made)) if made else 0
        way = chance.randrange(5)
        if way == 0 and made:
            made[place] ^= 1 << chance.randrange(8)
        elif way == 1:
            del made[place : place + chance.randrange(1, 64)]
        elif way == 2:
            made[place:place] = chance.randbytes(chance.randrange(1, 16))
        elif way == 3:
            made[place : place + 4] = chance.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
        else:
            made += made[place : place + chance.randrange(1, 256)]
    return bytes(made)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
async def test_spoiled_images_fail_alone(
    server: ServerProcess, neighbour: Neighbour, tried: "Counter[str]", form: str
) -> None:
    chance = random.Random(form)
    whole = [encode(picture(number), form) for number in range(4)]
    ok = whole[0]
    requests = []
    for _ in range(20 * TIMES):
        images = [pb.Image(data=spoiled(chance.choice(whole), chance)) for _ in range(20)]
        # Beside each message's rubbish a good one, which is answered.
        images.append(pb.Image(data=ok, name="good"))
        requests.append(pb.ClassifyRequest(model="a", images=images, top_k=2))
    with Client(server.address) as client:
        alone = client.classify("a", [ok], 2).results[0].top_k
    async with grpc.aio.insecure_channel(server.address) as channel:
        call: Any = channel.unary_unary(CLASSIFY, response_deserializer=pb.ClassifyResponse.FromString)
        for request in requests:
            answer = await call(request.SerializeToString(), timeout=240)
            assert len(answer.results) == 21
            assert all(bool(result.error) != bool(result.top_k) for result in answer.results)
            best = [(each.index, each.probability) for each in answer.results[-1].top_k]
            assert best == [(each.index, each.probability) for each in alone]
            for result in answer.results[:-1]:
                tried[f"spoiled {form}, {'refused' if result.error else 'still decoded'}"] += 1


@pytest.mark.parametrize("method", [CLASSIFY, GENERATE])
async def test_spoiled_messages_end_with_a_clear_status(
    server: ServerProcess, neighbour: Neighbour, tried: "Counter[str]", method: str
) -> None:
    chance = random.Random(method)
    sampling = pb.SamplingParameters(max_words=3, seed=1, top_k=5, stop=["the"], logit_bias={"cat": 1.0})
    message = {
        CLASSIFY: pb.ClassifyRequest(model="a", images=[pb.Image(data=png(0), name="x")] * 3, top_k=2),
        GENERATE: pb.GenerateRequest(model="LSTM", prompt="the cat", sampling=sampling, num_texts=2),
    }[method]
    whole = message.SerializeToString()
    requests = [spoiled(whole, chance) for _ in range(1000 * TIMES)]
    # One that asks for very many words, or for seconds of work, is right: it has this long.
    codes = await codes_of(server, method, requests, timeout_s=2.0)
    for code, count in codes.items():
        tried[f"spoiled message to {method.rpartition('/')[2]} that ended with {code}"] += count
    assert set(codes) <= CLEAR, codes
    assert codes["INVALID_ARGUMENT"] > 100


async def test_deadlines_of_a_millisecond(server: ServerProcess, neighbour: Neighbour, tried: "Counter[str]") -> None:
    images = [pb.Image(data=png(number)) for number in range(8)]
    request = pb.ClassifyRequest(model="b", images=images).SerializeToString()
    text = pb.GenerateRequest(model="GRU", sampling=pb.SamplingParameters(max_words=100_000)).SerializeToString()
    for method, each in ((CLASSIFY, request), (GENERATE, text)):
        codes = await codes_of(server, method, [each] * 300 * TIMES, timeout_s=0.001)
        tried["deadline of 1 ms"] += codes.total()
        assert set(codes) <= {"OK", "DEADLINE_EXCEEDED"}, codes
        assert codes["DEADLINE_EXCEEDED"] > 200


KILLED = """
import sys, threading
from tandem.client import Client, SamplingOptions
address, number, image = sys.argv[1], int(sys.argv[2]), open(sys.argv[3], "rb").read()
def classify():
    with Client(address) as client:
        while True:
            client.classify("b", [image] * 64)
def write():
    with Client(address) as client:
        for _ in client.generate("Transformer", None, 100_000, SamplingOptions(seed=number), num_texts=4):
            print("at work", flush=True)
threading.Thread(target=classify, daemon=True).start()
write()
"""


def test_clients_that_are_killed_leave_nothing_behind(
    server: ServerProcess, neighbour: Neighbour, tried: "Counter[str]", tmp_path: Path
) -> None:
    """In the middle of messages and of streams; the server then holds no more than it held before."""
    (tmp_path / "image.png").write_bytes(png(0))
    for round_ in range(2 * TIMES):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", KILLED, server.address, str(number), str(tmp_path / "image.png")],
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
            for number in range(3)
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline(), "it is at work"
        if round_ % 2:
            # Stopped, it neither reads nor closes; then its host ends it.
            for process in processes:
                process.send_signal(signal.SIGSTOP)
        for process in processes:
            process.kill()
            process.communicate()
            tried["client killed in the middle of its calls"] += 1
    wait_for(lambda: num_connections(server) <= 3)


def num_connections(server: ServerProcess) -> int:
    """Return how many established connections the server has, by the kernel's table."""
    port = f":{int(server.address.rpartition(':')[2]):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(port) and row[3] == "01" for row in rows)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
HALF = (
    b"",
    PREFACE[:10],
    PREFACE,
    PREFACE + SETTINGS,
    # Headers that never end, and a message that is announced and never comes.
    PREFACE + SETTINGS + b"\0\0\x10\1\0\0\0\0\1",
    PREFACE + SETTINGS + b"\xff\xff\xff\0\0\0\0\0\1",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x16\3\1\2\0\1\0\1\xfc\3\3" + b"\0" * 64,
)


def test_half_open_connections_and_other_protocols_cost_nobody_anything(
    server: ServerProcess, neighbour: Neighbour, tried: "Counter[str]"
) -> None:
    host, _, port = server.address.rpartition(":")
    opened = []
    try:
        for number in range(64 * TIMES):
            connection = socket.create_connection((host, int(port)), timeout=10)
            connection.sendall(HALF[number % len(HALF)])
            opened.append(connection)
            tried["connection that begins and says no more"] += 1
        seen = neighbour.num_answers
        wait_for(lambda: neighbour.num_answers > seen + 3)
    finally:
        for number, connection in enumerate(opened):
            if number % 2:
                # A reset, instead of a farewell.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()


async def test_messages_over_the_limit_end_their_calls_alone(
    server: ServerProcess, neighbour: Neighbour, tried: "Counter[str]"
) -> None:
    image = bytes(65 * 2**20)
    requests = [pb.ClassifyRequest(model="a", images=[pb.Image(data=image)]).SerializeToString()] * 3
    many = pb.ClassifyRequest(model="a", images=[pb.Image(data=b"x")] * 1025).SerializeToString()
    long = pb.GenerateRequest(model="LSTM", prompt="the " * 700_000).SerializeToString()
    codes = await codes_of(server, CLASSIFY, [*requests, many])
    codes += await codes_of(server, GENERATE, [long])
    tried["message over the limit"] += codes.total()
    assert set(codes) <= {"RESOURCE_EXHAUSTED", "INVALID_ARGUMENT"}, codes


async def test_models_that_are_not_there(server: ServerProcess, neighbour: Neighbour, tried: "Counter[str]") -> None:
    names = ("nobody", "a:99", "a@nowhere", "run:none", "run:run-a/99", "../a", "", "a" * 500, "LSTM")
    requests = [pb.ClassifyRequest(model=name, images=[pb.Image(data=png(0))]).SerializeToString() for name in names]
    codes = await codes_of(server, CLASSIFY, requests * 20 * TIMES)
    tried["model that is not there, or of another kind"] += codes.total()
    assert set(codes) <= {"NOT_FOUND", "INVALID_ARGUMENT"}, codes
