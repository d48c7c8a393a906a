"""The server that one writes in an afternoon: grpc.aio, eager torch, PIL, and a simple batcher. It speaks tandem.v1."""

import argparse
import asyncio
import io
from pathlib import Path
from typing import Any

import grpc
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from benchmarks.runtimes import SIDE, trained
from tandem.wire.limits import CHANNEL_OPTIONS
from tandem.wire.v1 import inference_pb2 as pb
from tandem.wire.v1 import inference_pb2_grpc as rpc

MAX_BATCH, MAX_DELAY_S = 32, 0.005


class Batcher:
    """Collects images until there are enough of them, or the first has waited long enough."""

    def __init__(self) -> None:
        self._network = trained()
        self._queue: asyncio.Queue[tuple[Tensor, asyncio.Future[Any]]] = asyncio.Queue()

    async def classify(self, pixels: Tensor) -> tuple[list[float], list[int]]:
        """Return the five best classes of float32 (3, S, S)."""
        future = asyncio.get_running_loop().create_future()
        await self._queue.put((pixels, future))
        answer: tuple[list[float], list[int]] = await future
        return answer

    async def serve(self) -> None:
        """Run batches for ever."""
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            ends = loop.time() + MAX_DELAY_S
            while len(batch) < MAX_BATCH and (left := ends - loop.time()) > 0:
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except TimeoutError:
                    break
            values, indices = await asyncio.to_thread(self._run, torch.stack([pixels for pixels, _ in batch]))
            for (_, future), row, places in zip(batch, values.tolist(), indices.tolist(), strict=True):
                if not future.done():
                    future.set_result((row, places))

    @torch.inference_mode()
    def _run(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = torch.softmax(self._network(pixels), 1).topk(5)
        return values, indices


class Servicer(rpc.InferenceServicer):
    """Classify alone."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    async def Classify(self, request: pb.ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        """The five best classes of each image."""
        del context
        tensors = [await asyncio.to_thread(_tensor, image.data) for image in request.images]
        answers = await asyncio.gather(*(self._batcher.classify(each) for each in tensors))
        response = pb.ClassifyResponse()
        for probabilities, indices in answers:
            classes = [
                pb.ScoredClass(index=index, id=f"n{index:08}", words=f"class {index}", probability=probability)
                for probability, index in zip(probabilities, indices, strict=True)
            ]
            response.results.add(top_k=classes)
        return response


def _tensor(data: bytes) -> Tensor:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    pixels = pil_to_tensor(center_crop(resize(image, [SIDE]), [SIDE]))
    normalised: Tensor = (pixels.float() / 255 - 0.5) / 0.25
    return normalised


async def serve(port_file: Path) -> None:
    """Serve until the process is ended."""
    batcher = Batcher()
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    rpc.add_InferenceServicer_to_server(Servicer(batcher), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    port_file.write_text(f"127.0.0.1:{port}\n")
    await batcher.serve()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--listen")
    parser.add_argument("--port-file", type=Path)
    asyncio.run(serve(parser.parse_args().port_file))
