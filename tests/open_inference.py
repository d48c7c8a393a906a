"""A server in the test's own process, and what the public client of the Open Inference Protocol sends it."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from factories import SIZE, png
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from services.inference.server import running_server
from tandem.data.images import decode_image
from tandem.settings import Settings

FINAL = "triton_final_response"


class InProcess:
    """A server on an event loop of its own thread."""

    def __init__(self, home: Path, **changes: str) -> None:
        environment = {"TANDEM_LISTEN": "127.0.0.1:0", "TANDEM_HOME": str(home), "TANDEM_DEVICE": "cpu"}
        # Its batches can be listened to, and take no time to be chosen.
        self.settings = Settings.from_environment({**environment, "TANDEM_ENGINE": "eager", **changes})
        self.loop, self.stop, self.started = asyncio.new_event_loop(), asyncio.Event(), threading.Event()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(),))
        self.thread.start()
        assert self.started.wait(60)

    async def _serve(self) -> None:
        async with running_server(self.settings) as self.running:
            for name in self.running.engine.models.registry.names():
                await self.running.engine.models.get(name)
            self.started.set()
            await self.stop.wait()

    @property
    def address(self) -> str:
        return self.running.address

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(30)
        assert not self.thread.is_alive()


def encoded(*images: bytes) -> list[Any]:
    tensor = triton.InferInput("image", [len(images)], "BYTES")
    tensor.set_data_from_numpy(np.array(images, dtype=np.object_))
    return [tensor]


def pixels(*images: bytes) -> list[Any]:
    values = np.stack([decode_image(image).numpy() for image in images])
    tensor = triton.InferInput("pixels", values.shape, "UINT8")
    tensor.set_data_from_numpy(values)
    return [tensor]


def prompt(text: str) -> list[Any]:
    tensor = triton.InferInput("prompt", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    return [tensor]


def parameters(result: Any) -> dict[str, Any]:
    response = result.get_response()
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in response.parameters.items()}


def refused(call: Callable[[], object]) -> tuple[str, str]:
    """Return the status that `call` is refused with, and its message."""
    with pytest.raises(InferenceServerException) as caught:
        call()
    return str(caught.value.status()).removeprefix("StatusCode."), caught.value.message()


def infer(host: InProcess, request: Any) -> Any:
    with grpc.insecure_channel(host.address) as channel:
        call: Any = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        return service_pb2.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=240))


def request(**fields: Any) -> Any:
    """Return a right request for one image, with `fields` in the place of its own."""
    raw = decode_image(png(0)).numpy().tobytes()
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 3, SIZE, SIZE]}
    given = {"model_name": "pictures", "inputs": [tensor], "raw_input_contents": [raw], **fields}
    return service_pb2.ModelInferRequest(**{name: value for name, value in given.items() if value is not None})


def tensor(name: str = "pixels", datatype: str = "UINT8", shape: Any = (1, 3, SIZE, SIZE), **more: Any) -> Any:
    return {"name": name, "datatype": datatype, "shape": list(shape), **more}


def text_parameter(value: str) -> Any:
    return service_pb2.InferParameter(string_param=value)


def number_parameter(value: int) -> Any:
    return service_pb2.InferParameter(int64_param=value)
