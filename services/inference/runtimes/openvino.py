"""Classifiers run by OpenVINO on the CPU. The package is imported when the first one is built.

An image's logits don't depend on its batch: measured over batches of 1 to 33, first and last rows, with eleven
networks at 64 px (2 cores with AVX-512 and AMX, OpenVINO 2026.4, float32 and bfloat16), every row is equal to
the bit, also where eager torch keeps a rest (ConvNeXt, Swin, EfficientNet), and on one thread as on two. The batch
size is left open in the graph: a graph fixed to one size is no more than 0.1 ms faster. The first batch of each size
builds its kernels (5 to 15 ms), so the check on load runs each size on each stream; where there is one stream only,
batches are filled up to SIZES.

The network is traced by TorchScript and handed to OpenVINO's frontend. `openvino.convert_model` does the same and then
0.6 s of transformations (with the interpreter's lock held for up to 0.2 s) that compiling does again: the compiled
graphs are equal to the bit, and ResNet-18 is converted in 0.07 s instead. It would also set up the package's telemetry,
which thus never runs. A network built like one before it takes over its graph with other weights: 3 ms, which a
swap under load does not notice. Through torch.export the same takes 2 s, and 8 s for MobileNet v3.
"""

import warnings
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from services.inference.runtimes.eager import check_finite
from services.inference.runtimes.interface import Precision
from services.inference.runtimes.pixels import FromPixels, in_buckets

if TYPE_CHECKING:
    from openvino import Model

# Up to 8 exact; above, three images of fill are at most a fifth of the work.
SIZES = (*range(1, 9), *range(12, 33, 4))

# From so many images on batches are cut, and run beside each other on streams of their own: for fewer, all threads
# share each layer, which is quicker alone (ResNet-18, 2 cores: one image 3.0 ms against 5.8), but has them wait for one
# another at each. On cores that others use too, by 0.4 of one, cut batches of 8 to 32 are 1.1 to 1.4 times as fast, and
# on idle ones 1.03 to 1.25 times (n = 2).
_CUT_FROM = 4
_MAX_STREAMS = 4

# What is imported of it when the first classifier is built.
MODULES = ("openvino.frontend.pytorch.ts_decoder", "openvino.op")

# Weights in the graph are called as in the traced module, with this before the name.
_OWN = "self."


@dataclass(eq=False)
class Graph:
    """A network as OpenVINO's graph, its weights shared with the torch module that it was made from."""

    model: "Model"
    # The graph points into its memory.
    network: FromPixels


class OpenVinoClassifier:
    """A classifier on `num_threads` threads; `network` is in eval mode on the CPU and stays as it is."""

    name = "openvino"

    def __init__(self, graph: Graph, image_size: int, precision: Precision, num_threads: int) -> None:
        self.dtype: str = precision
        self._graph = graph
        self._image_size = image_size
        self._request = _compile(graph, precision, num_threads, 1).create_infer_request()
        count = num_streams(num_threads)
        self.beside_from = _CUT_FROM if count > 1 else 0
        # What the workers of a device share of a full batch, and none is filled up: three images are a quarter of nine.
        self.beside_sizes = tuple(range(1, -(-SIZES[-1] // count) + 1))
        streams = _compile(graph, precision, num_threads, count) if count > 1 else None
        self._streams = [streams.create_infer_request() for _ in range(count)] if streams is not None else []
        # Each part of a batch that is cut has one of `beside_sizes`, which need no filling up.
        self._sizes = range(1, SIZES[-1] + 1) if count > 1 else SIZES
        self._free = deque(streams.create_infer_request() for _ in range(count)) if streams is not None else deque()

    def predict(self, pixels: Tensor) -> Tensor:
        """Return logits float32 (B, C) for pixels uint8 (B, 3, S, S), B ≥ 1."""
        return in_buckets(pixels, self._sizes, self._run)

    def predict_beside(self, pixels: Tensor) -> Tensor:
        """Do what `predict` does, on one stream, while others do the same on theirs."""
        request = self._free.pop()
        try:
            return in_buckets(pixels, self.beside_sizes, partial(_infer, request))
        finally:
            self._free.append(request)

    def on_each_stream(self, pixels: Tensor) -> list[Tensor]:
        """Return the logits of `pixels` from every stream, at once; B is one of `beside_sizes`."""
        array = pixels.contiguous().numpy()
        return [torch.from_numpy(logits) for logits in self._beside_each_other([array] * len(self._streams))]

    def _run(self, pixels: Tensor) -> Tensor:
        if not self._streams or len(pixels) < _CUT_FROM:
            return _infer(self._request, pixels)
        parts = np.array_split(pixels.contiguous().numpy(), min(len(self._streams), len(pixels) // 2))
        return torch.from_numpy(np.concatenate(self._beside_each_other(parts)))

    def _beside_each_other(self, arrays: Sequence["np.ndarray[Any, Any]"]) -> list["np.ndarray[Any, Any]"]:
        requests = self._streams[: len(arrays)]
        for request, array in zip(requests, arrays, strict=True):
            request.start_async([array], share_inputs=True)
        errors = []
        for request in requests:
            # Of all, also where one fails: they read memory that goes with this call.
            try:
                request.wait()
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)
        if errors:
            raise errors[0]
        return [request.get_output_tensor().data.copy() for request in requests]

    def warm(self) -> None:
        """Run once; raise CheckpointCorrupt if the answer is not finite."""
        check_finite(self.predict(torch.zeros(1, 3, self._image_size, self._image_size, dtype=torch.uint8)))


def num_streams(num_threads: int) -> int:
    """Return how many batches run beside each other on so many threads."""
    return min(num_threads, _MAX_STREAMS)


def _infer(request: Any, pixels: Tensor) -> Tensor:
    answers = request.infer([pixels.contiguous().numpy()], share_inputs=True, share_outputs=True)
    # What comes back is the request's own memory, overwritten by the next batch.
    return torch.from_numpy(answers[0].copy())


def _compile(graph: Graph, precision: Precision, num_threads: int, num_streams: int) -> Any:
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": num_threads,
        "NUM_STREAMS": num_streams,
        # Two processes whose threads are tied to the same cores would wait for each other.
        "ENABLE_CPU_PINNING": False,
    }
    return _core().compile_model(graph.model, "CPU", options)


class GraphCache:
    """Makes graphs, from the first one of the same structure where there was one lately.

    That one is kept with its weights, outside the memory budget, so there are only so many: the new versions of a model
    or two come one after another, and a graph made anew takes no more than 0.2 s.
    """

    _NUM_KEPT = 2

    def __init__(self) -> None:
        # The last one used at the end.
        self._graphs: OrderedDict[str, Graph] = OrderedDict()

    def graph(self, network: FromPixels, image_size: int) -> Graph:
        """Return the graph of `network`, in eval mode on the CPU; its weights must not change from now on.

        Raises whatever torch and OpenVINO raise for a network that they can't trace or express.
        """
        structure = _structure(network, image_size)
        like = self._graphs.get(structure)
        if like is not None:
            self._graphs.move_to_end(structure)
            return Graph(_with_weights(like.model, network), network)
        graph = self._graphs[structure] = Graph(_convert(network, image_size), network)
        if len(self._graphs) > self._NUM_KEPT:
            self._graphs.popitem(last=False)
        return graph


def _structure(network: FromPixels, image_size: int) -> str:
    shapes = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in network.state_dict().items()]
    return repr((image_size, str(network), shapes))


@cache
def _core() -> Any:
    from openvino import Core

    return Core()


@cache
def _frontend() -> Any:
    from openvino.frontend import FrontEndManager

    return FrontEndManager().load_by_framework("pytorch")


@torch.inference_mode()
def _convert(network: FromPixels, image_size: int) -> "Model":
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings():
        # Of a trace's deprecation, and of shapes that it takes for constants: the check on load sees what that does.
        warnings.simplefilter("ignore")
        example = torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8)
        traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        decoder = TorchScriptPythonDecoder(traced)
    model = _frontend().convert(_frontend().load(decoder))
    model.reshape([-1, 3, image_size, image_size])
    _forget_trace()
    return model


def _forget_trace() -> None:
    """Empty the tables in which torch keeps what it has traced: 4 MiB for each ResNet-18, and nothing without (n = 10).

    Nothing else of the server's uses TorchScript. These names are torch's own, so that they may go; then it keeps them.
    """
    with suppress(AttributeError):
        torch._C._jit_clear_class_registry()
        torch.jit._state._clear_class_state()
        torch.jit._recursive.concrete_type_store = torch.jit._recursive.ConcreteTypeStore()


def _with_weights(model: "Model", network: FromPixels) -> "Model":
    """Return a copy of `model` with the weights of `network`, which has the same structure."""
    from openvino.op import Constant

    weights = network.state_dict()
    copy = model.clone()
    for node in copy.get_ops():
        name = node.get_friendly_name()
        if node.get_type_name() != "Constant" or not name.startswith(_OWN):
            continue
        constant = Constant(weights[name.removeprefix(_OWN)].numpy(), shared_memory=True)
        constant.set_friendly_name(name)
        for target in list(node.output(0).get_target_inputs()):
            target.replace_source_output(constant.output(0))
    return copy
