"""A recurrent language model as an ONNX graph of ONNX's own LSTM, GRU and RNN, which take any number of tokens.

torch.export unrolls recurrent layers over the tokens of its example, so that its programs are of one length; here the
graph is built node by node. docs/decisions/0007-export.md says more.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from tandem.export.language_programs import LOGITS, TOKEN_IDS, state_of
from tandem.export.metadata import after
from tandem.models.awd_lstm import AwdLanguageModel
from tandem.models.recurrent import RecurrentLanguageModel

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

# Where torch's gates stand in ONNX's order: input, output, forget, cell; update, reset, hidden.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN_TANH": (0,), "RNN_RELU": (0,)}
# That which onnxruntime reads since 1.17 with opset 20.
_IR_VERSION = 9


def recurrent_model(network: RecurrentLanguageModel | AwdLanguageModel, opset: int) -> "ModelProto":
    """Return `network` as a model from token_ids (B, T) and its state to logits (B, T, V) and the state after them."""
    from onnx import TensorProto, helper

    graph = _Graph()
    graph.hold("embedding", network.embedding.weight)
    graph.node("Gather", ["embedding", TOKEN_IDS], ["embedded"])
    graph.node("Transpose", ["embedded"], ["hidden_0"], perm=[1, 0, 2])
    hidden = _layers(graph, network)
    graph.node("Transpose", [hidden], ["last"], perm=[1, 0, 2])
    _head(graph, network)
    state = state_of(network)
    inputs = [helper.make_tensor_value_info(TOKEN_IDS, TensorProto.INT64, ["batch", "time"])]
    outputs = [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", "time", network.head.out_features])]
    for each in state:
        shape = ["batch" if size == -1 else size for size in each.shape]
        inputs.append(helper.make_tensor_value_info(each.name, TensorProto.FLOAT, shape))
        outputs.append(helper.make_tensor_value_info(after(each.name), TensorProto.FLOAT, shape))
    body = helper.make_graph(graph.nodes, "language_model", inputs, outputs, graph.weights)
    return helper.make_model(
        body, opset_imports=[helper.make_opsetid("", opset)], ir_version=_IR_VERSION, producer_name="tandem"
    )


class _Graph:
    """Nodes and weights as they are added."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []

    def node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, **attributes))

    def hold(self, name: str, values: "Tensor | NDArray[np.generic]") -> None:
        from onnx import numpy_helper

        array = values.detach().numpy() if isinstance(values, Tensor) else values
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))


def _layers(graph: _Graph, network: RecurrentLanguageModel | AwdLanguageModel) -> str:
    """Add the layers from `hidden_0` (T, B, E) on; return the name of what the last says."""
    stacks = list(network.layers) if isinstance(network, AwdLanguageModel) else [network.layers]
    names = [each.name for each in state_of(network)]
    graph.hold("axis_1", np.array([1], np.int64))
    number = 0
    for stack in stacks:
        assert isinstance(stack, nn.RNNBase)
        size = 2 if isinstance(stack, nn.LSTM) else 1
        own, names = names[:size], names[size:]
        parts = {name: [f"{name}_of_{layer}" for layer in range(stack.num_layers)] for name in own}
        for name in own:
            graph.node("Split", [name], parts[name], axis=0, num_outputs=stack.num_layers)
        for layer in range(stack.num_layers):
            _layer(graph, stack, layer, number, [parts[name][layer] for name in own])
            number += 1
        for name in own:
            graph.node("Concat", [after(part) for part in parts[name]], [after(name)], axis=0)
    return f"hidden_{number}"


def _layer(graph: _Graph, stack: nn.RNNBase, layer: int, number: int, state: list[str]) -> None:
    from_below, from_before, *biases = (_reordered(each, stack.mode) for each in stack.all_weights[layer])
    graph.hold(f"W_{number}", from_below[None])
    graph.hold(f"R_{number}", from_before[None])
    graph.hold(f"B_{number}", np.concatenate(biases)[None])
    attributes: dict[str, Any] = {"hidden_size": stack.hidden_size}
    if stack.mode == "GRU":
        attributes["linear_before_reset"] = 1
    if stack.mode.startswith("RNN"):
        attributes["activations"] = ["Tanh" if stack.mode == "RNN_TANH" else "Relu"]
    inputs = [f"hidden_{number}", f"W_{number}", f"R_{number}", f"B_{number}", "", *state]
    told = f"directions_{number}"
    graph.node(stack.mode.partition("_")[0], inputs, [told, *(after(each) for each in state)], **attributes)
    graph.node("Squeeze", [told, "axis_1"], [f"hidden_{number + 1}"])


def _reordered(weight: Tensor, mode: str) -> NDArray[np.float32]:
    gates = weight.detach().chunk(len(_GATES[mode]))
    ordered: NDArray[np.float32] = np.concatenate([gates[place].numpy() for place in _GATES[mode]])
    return ordered


def _head(graph: _Graph, network: RecurrentLanguageModel | AwdLanguageModel) -> None:
    head = network.head
    if head.weight is network.embedding.weight:
        # Stored once; onnxruntime turns it round when it loads the file.
        graph.node("Transpose", ["embedding"], ["head"], perm=[1, 0])
    else:
        graph.hold("head", head.weight.detach().T)
    graph.hold("head_bias", head.bias)
    graph.node("MatMul", ["last", "head"], ["products"])
    graph.node("Add", ["products", "head_bias"], [LOGITS])
