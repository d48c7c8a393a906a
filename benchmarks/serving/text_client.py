"""A reader of texts: `python -m benchmarks.serving.text_client LOAD` takes a TextLoad as JSON; writes Written."""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc

from benchmarks.serving.client import cpu_between
from tandem.wire.v1 import inference_pb2 as pb

GENERATE = "/tandem.v1.Inference/Generate"
# As in services.inference.bench, which would bring torch with it.
TEXT_WORDS, PROMPT_WORDS = 200, 8


@dataclass(frozen=True)
class TextLoad:
    """`streams` texts at a time; when one ends, another begins."""

    address: str
    model: str
    streams: int
    seconds: float
    warm_up_s: float = 1.0


@dataclass
class Written:
    """What came within the measured time."""

    words: int = 0
    messages: int = 0
    seconds: float = 0.0
    # From the call to the first word, milliseconds.
    firsts_ms: list[float] = field(default_factory=list)
    cpu_share: float = 0.0


def drive(load: TextLoad) -> Written:
    """Drive the server from a process of its own; return what it saw."""
    return start(load).result()


@dataclass(frozen=True)
class Reading:
    """A client at work."""

    process: "subprocess.Popen[bytes]"

    def result(self) -> Written:
        """Wait for its end."""
        output, _ = self.process.communicate()
        if self.process.returncode:
            raise RuntimeError("the reader failed")
        return Written(**json.loads(output))


def start(load: TextLoad) -> Reading:
    """Start a client."""
    command = [sys.executable, "-m", "benchmarks.serving.text_client", json.dumps(asdict(load))]
    return Reading(subprocess.Popen(command, stdout=subprocess.PIPE))


async def run(load: TextLoad) -> Written:
    """Read texts for the warm-up, then for the measured time."""
    prompt = " ".join(f"word{number}" for number in range(PROMPT_WORDS))
    seen = Written(seconds=load.seconds)
    began = time.monotonic() + load.warm_up_s
    ends = began + load.seconds
    async with grpc.aio.insecure_channel(load.address) as channel:
        call: Any = channel.unary_stream(GENERATE, response_deserializer=pb.GenerateResponse.FromString)

        async def reader(seed: int) -> None:
            while (asked := time.monotonic()) < ends:
                # Of many lengths, the mean TEXT_WORDS: of one, all that begin together would end together.
                max_words = TEXT_WORDS // 2 + seed * 37 % (TEXT_WORDS + 1)
                sampling = pb.SamplingParameters(max_words=max_words, seed=seed)
                request = pb.GenerateRequest(model=load.model, prompt=prompt, sampling=sampling)
                first = True
                async for message in call(request.SerializeToString()):
                    now = time.monotonic()
                    if began <= now < ends:
                        seen.words += len(message.words)
                        seen.messages += 1
                        if first and asked >= began:
                            seen.firsts_ms.append((now - asked) * 1000)
                    first = False
                seed += load.streams

        cpu = asyncio.create_task(cpu_between(began, ends))
        await asyncio.gather(*(reader(seed) for seed in range(load.streams)))
        seen.cpu_share = await cpu
    return seen


def main() -> None:
    """Do what the argument says."""
    print(json.dumps(asdict(asyncio.run(run(TextLoad(**json.loads(sys.argv[1])))))))


if __name__ == "__main__":
    main()
