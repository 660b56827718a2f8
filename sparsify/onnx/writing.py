"""An imported graph written again: the nodes that were given, with a module's weights, integers and quantizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from onnx import ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor, nn

from sparsify.errors import ExportError
from sparsify.onnx.graph import copied, fresh_name
from sparsify.onnx.importing import ImportedModel, Step
from sparsify.quantization.deployment import DeployedLayer, DeployedNorm, DeployedQuantize
from sparsify.quantization.layers import QuantizedEmbedding, QuantizedNorm
from sparsify.quantization.wiring import wiring_of

if TYPE_CHECKING:
    from sparsify.onnx.node_layers import StoredWeight

__all__: list[str] = []

Rounded = tuple[str, DeployedQuantize, Tensor, Tensor]
"""One call of a quantizer: its path, itself, what it read and what it gave."""


def written_graph(model: ImportedModel, inputs: dict[str, Any]) -> ModelProto:
    """The graph of `model`, a deployment copy, as it was given, but for what is quantized.

    The module runs once: where its quantizers are called, the file has QuantizeLinear and DequantizeLinear.

    Args:
        model: on the CPU.
        inputs: of one call, by their names in the graph.

    Raises:
        ExportError: a quantizer stands where the graph has no value.
    """
    writer = _Writer(model.given.proto)
    with _watched_quantizers(model) as calls, torch.no_grad():
        for step, module, operands, results in model.run(inputs):
            writer.write(step, module, operands, results, calls)
            calls.clear()
    return writer.finished()


@contextmanager
def _watched_quantizers(model: nn.Module) -> Iterator[list[Rounded]]:
    """The calls of quantizers while the block runs."""
    calls: list[Rounded] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, y, name=name: calls.append((name, cast(DeployedQuantize, module), args[0], y))
        )
        for name, module in model.named_modules()
        if isinstance(module, DeployedQuantize)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


class _Writer:
    def __init__(self, proto: ModelProto) -> None:
        self.proto = ModelProto()
        self.proto.CopyFrom(proto)
        self.given = list(proto.graph.node)
        self.stored = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        self.names = {*self.stored, *(value.name for value in proto.graph.input)}
        self.names |= {name for node in self.given for name in node.output}
        self.nodes: list[NodeProto] = [copied(node) for node in self.given if node.op_type == "Constant"]
        self.rounded: dict[tuple[str, int], str] = {}
        self.called: Counter[str] = Counter()
        # What stands behind the step that is written now.
        self.after: list[NodeProto] = []

    def finished(self) -> ModelProto:
        from sparsify.onnx.graph import remove_unused

        del self.proto.graph.node[:]
        self.proto.graph.node.extend(self.nodes)
        remove_unused(self.proto)
        return self.proto

    def write(
        self, step: Step, module: nn.Module, operands: list[Any], results: list[Any], calls: list[Rounded]
    ) -> None:
        """The nodes of one step."""
        nodes = [copied(self.given[i]) for i in step.nodes]
        behind: list[tuple[str, Rounded]] = []
        for call in calls:
            path, quantizer, x, y = call
            self.called[path] += 1
            name = f"{path}/QuantizeLinear"
            name = name if self.called[path] == 1 else f"{name}_{self.called[path]}"
            if y is results[0]:
                behind.append((name, call))
                continue
            read = next((given for given, value in zip(step.inputs, operands, strict=True) if value is x), None)
            if read is None and hasattr(module, "sides"):
                read = step.inputs[0]
            if read is None:
                raise ExportError(
                    f"{step.path}: {path} rounds a value that the file does not have; name {step.path!r} in ignore."
                )
            new = self._operand(read, name, quantizer)
            for i, given in enumerate(nodes[0].input):
                if given == read:
                    nodes[0].input[i] = new
        for name, call in behind:
            if call[1].enabled:
                self._behind(nodes, step, name, call[1])
        self.nodes += self._layer(step, module, nodes)
        self.nodes += self.after
        self.after = []

    # Activations

    def _operand(self, value: str, name: str, quantizer: DeployedQuantize) -> str:
        """The name of a value on the grid of a quantizer, made once for all who read it there."""
        if not quantizer.enabled:
            return value
        key = value, id(quantizer)
        if key not in self.rounded:
            result = self.rounded[key] = self.fresh(f"{value}_rounded")
            self.nodes += self._pair(value, result, name, quantizer)
        return self.rounded[key]

    def _pair(self, value: str, result: str, name: str, quantizer: DeployedQuantize) -> list[NodeProto]:
        """QuantizeLinear and DequantizeLinear, behind a Clip where the grid has fewer integers than its type."""
        path = name.rpartition("/")[0]
        nodes: list[NodeProto] = []
        limits = torch.iinfo(quantizer.zero_point.dtype)
        if (quantizer.first, quantizer.last) != (limits.min, limits.max):
            low, high = (
                np.asarray((edge - float(quantizer.zero_point)) * float(quantizer.scale), np.float32)
                for edge in (quantizer.first, quantizer.last)
            )
            clipped = self.fresh(f"{value}_clipped")
            edges = [self.value(f"{path}.low", low), self.value(f"{path}.high", high)]
            nodes.append(helper.make_node("Clip", [value, *edges], [clipped], name=f"{path}/Clip"))
            value = clipped
        return nodes + self._grid(value, result, name, quantizer.scale, quantizer.zero_point)

    def _grid(self, value: str, result: str, name: str, scale: Tensor, zero: Tensor, kind: str = "") -> list[NodeProto]:
        path = name.rpartition("/")[0]
        integers = self.fresh(f"{result}_int")
        grid = [
            self.value(f"{path}.{kind}scale", scale.numpy()),
            self.value(f"{path}.{kind}zero_point", zero.numpy()),
        ]
        return [
            helper.make_node("QuantizeLinear", [value, *grid], [integers], name=name),
            helper.make_node(
                "DequantizeLinear", [integers, *grid], [result], name=name.replace("/Quantize", "/Dequantize")
            ),
        ]

    def _behind(self, nodes: list[NodeProto], step: Step, name: str, quantizer: DeployedQuantize) -> None:
        """Rounds what a step gives."""
        target = step.outputs[0]
        plain = self.fresh(f"{target}_float")
        if quantizer.gate is not None:
            source, gate = nodes[0].input[0], self.fresh(f"{target}_gate")
            made = nodes[0]
            if made.op_type == "HardSwish":
                made = helper.make_node("HardSigmoid", [source], [gate], name=f"{made.name}/HardSigmoid", alpha=1 / 6)
            made.output[0] = gate
            buffers: Any = quantizer._buffers
            rounded = self.fresh(f"{gate}_rounded")
            pair = self._grid(gate, rounded, name, buffers["gate_scale"], buffers["gate_zero_point"], "gate_")
            product = helper.make_node("Mul", [source, rounded], [plain], name=f"{step.path}/Mul")
            # Torch counts the gate's integers first.
            self.called[name.rpartition("/")[0]] += 1
            second = f"{name.rpartition('/')[0]}/QuantizeLinear_{self.called[name.rpartition('/')[0]]}"
            nodes[:] = [made, *pair, product]
            self.after = self._pair(plain, target, second, quantizer)
            return
        nodes[-1].output[0] = plain
        self.after = self._pair(plain, target, name, quantizer)

    # Weights

    def _layer(self, step: Step, module: Any, nodes: list[NodeProto]) -> list[NodeProto]:
        """The nodes of a step with the weights that its module has now."""
        if isinstance(module, QuantizedNorm):
            return self._norm(step, module, nodes)
        if step.weight is None:
            return nodes
        if isinstance(module, DeployedLayer) and "weight_scale" in module._buffers:
            return self._integer_layer(step, module, nodes)
        if isinstance(module, QuantizedEmbedding) and "weight_scale" in module._buffers:
            return self._integer_table(step, module, nodes)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            held: Any = module
            for i, each in enumerate((held.weight, held.bias, held.running_mean, held.running_var)):
                nodes[0].input[1 + i] = self._same_or_new(nodes[0].input[1 + i], each.detach().numpy())
            return nodes
        if isinstance(module, DeployedLayer):
            weight, bias = module._weights()
        else:
            weight, bias = module.weight, getattr(module, "bias", None)
        stored = self._same_or_new(step.weight.name, step.weight.of_torch(weight))
        nodes[0].input[0 if isinstance(module, nn.Embedding) else 1] = stored
        if bias is not None and len(nodes) == 1 and len(nodes[0].input) == 2 and not bias.any():
            bias = None
        self._set_bias(nodes, None if bias is None else self._float_bias(nodes, bias.detach().numpy()))
        return nodes

    def _integer_layer(self, step: Step, module: DeployedLayer, nodes: list[NodeProto]) -> list[NodeProto]:
        buffers: Any = module._buffers
        weight = cast("StoredWeight", step.weight)
        wiring = wiring_of(module)
        made: list[NodeProto] = []
        nodes[0].input[1] = self._stored_weight(weight, buffers, wiring.axis, wiring.block, step.path, made)
        if "bias_int32" in buffers:
            scale = buffers["bias_scale"].numpy()
            operands = [
                self.value(f"{step.path}.bias_int32", buffers["bias_int32"].numpy()),
                self.value(f"{step.path}.bias_scale", scale),
            ]
            bias = self.fresh(f"{step.path}.bias")
            axis: dict[str, Any] = {} if scale.ndim == 0 else {"axis": 0}
            made.append(
                helper.make_node(
                    "DequantizeLinear", operands, [bias], name=f"{step.path}/bias/DequantizeLinear", **axis
                )
            )
            self._set_bias(nodes, bias)
        elif "float_bias" in buffers:
            self._set_bias(nodes, self._float_bias(nodes, buffers["float_bias"].numpy()))
        else:
            self._set_bias(nodes, None)
        return made + nodes

    def _stored_weight(
        self, weight: StoredWeight, buffers: Any, axis: int | None, block: int, path: str, made: list[NodeProto]
    ) -> str:
        """The name of a dequantized weight; its node goes to `made`."""
        zero = buffers.get("weight_zero_point")
        kind = "int8" if zero is None else "uint8"
        operands = [self.value(f"{weight.name}_{kind}", weight.of_torch(buffers[f"weight_{kind}"]))]
        turned = weight.transposed

        def beside(tensor: Tensor) -> np.ndarray:
            return weight.of_torch(tensor) if tensor.dim() > 1 else tensor.numpy()

        operands.append(self.value(f"{weight.name}_scale", beside(buffers["weight_scale"])))
        if zero is not None:
            operands.append(self.value(f"{weight.name}_zero_point", beside(zero)))
        options: dict[str, Any] = {}
        if buffers["weight_scale"].dim():
            options["axis"] = (1 - cast(int, axis)) if turned else cast(int, axis)
        if block:
            options["block_size"] = block
            opset = next(each.version for each in self.proto.opset_import if each.domain in ("", "ai.onnx"))
            if opset < 21:
                raise ExportError(
                    f"{path} has a scale for each block of weights, which ONNX can say from opset 21 on; the file is "
                    f"of {opset}. Use strategy: channel, or raise the file by onnx.version_converter."
                )
        result = self.fresh(f"{weight.name}_rounded")
        name = f"{path}/weight/DequantizeLinear"
        made.append(helper.make_node("DequantizeLinear", operands, [result], name=name, **options))
        return result

    def _integer_table(self, step: Step, module: Any, nodes: list[NodeProto]) -> list[NodeProto]:
        """Rows of integers are looked up, then the scale of each."""
        from onnx import TensorProto

        buffers: Any = module._buffers
        weight = cast("StoredWeight", step.weight)
        (gather,) = nodes
        ids, target, path = gather.input[1], gather.output[0], step.path
        zero = buffers.get("weight_zero_point")
        kind = "int8" if zero is None else "uint8"
        scale = buffers["weight_scale"]

        def looked_up(name: str, values: np.ndarray) -> str:
            found = self.fresh(f"{path}.{name}_rows")
            stored = self.value(f"{weight.name}_{name}", values)
            made.append(helper.make_node("Gather", [stored, ids], [found], name=f"{path}/{name}/Gather"))
            return found

        def of_rows(name: str, tensor: Tensor) -> str:
            if tensor.dim() == 0:
                return self.value(f"{weight.name}_{name}", tensor.numpy())
            return looked_up(name, tensor.unsqueeze(1).numpy())

        made: list[NodeProto] = []
        rows = looked_up(kind, buffers[f"weight_{kind}"].numpy())
        values = self.fresh(f"{path}.rows")
        made.append(helper.make_node("Cast", [rows], [values], name=f"{path}/Cast", to=TensorProto.FLOAT))
        if zero is not None:
            shifted = self.fresh(f"{path}.shifted")
            offset = of_rows("zero_point", zero.float())
            made.append(helper.make_node("Sub", [values, offset], [shifted], name=f"{path}/Sub"))
            values = shifted
        factor = of_rows("scale", scale)
        made.append(helper.make_node("Mul", [values, factor], [target], name=f"{path}/Mul"))
        return made

    def _norm(self, step: Step, module: Any, nodes: list[NodeProto]) -> list[NodeProto]:
        """A BatchNorm that is folded, or a depthwise convolution of its own."""
        (norm,) = nodes
        # A product or sum may have its constant first.
        source = next(name for name in norm.input if name not in self.stored)
        target = norm.output[0]
        if isinstance(module, DeployedNorm) and "weight_int8" in module._buffers:
            buffers: Any = module._buffers
            weight = buffers["weight_int8"].numpy()
            made: list[NodeProto] = []
            names: list[str] = []
            for kind, integers in (("weight", weight), ("bias", buffers["bias_int32"].numpy())):
                stored = self.value(f"{step.path}.{kind}_{integers.dtype}", integers)
                scale = self.value(f"{step.path}.{kind}_scale", buffers[f"{kind}_scale"].numpy())
                names.append(self.fresh(f"{step.path}.{kind}"))
                name = f"{step.path}/{kind}/DequantizeLinear"
                made.append(helper.make_node("DequantizeLinear", [stored, scale], [names[-1]], name=name, axis=0))
            conv = helper.make_node(
                "Conv", [source, *names], [target], name=f"{step.path}/Conv", group=int(weight.shape[0])
            )
            return [*made, conv]
        if wiring_of(module).layer is not None:
            return [helper.make_node("Identity", [source], [target], name=f"{step.path}/Identity")]
        return nodes

    def _float_bias(self, nodes: list[NodeProto], bias: np.ndarray) -> str:
        """The name of a bias in float: the one that is there, where its values are the same."""
        holder = nodes[-1]
        there: list[str] = [name for name in holder.input if name in self.stored]
        for name in there:
            tensor = self.stored[name]
            if list(tensor.dims) == list(bias.shape) and np.array_equal(numpy_helper.to_array(tensor), bias):
                return name
        return self.value(f"{nodes[0].name}.bias", bias)

    def _set_bias(self, nodes: list[NodeProto], bias: str | None) -> None:
        """Has a layer read this bias: as its third input, or in the Add behind a MatMul."""
        node = nodes[0]
        if node.op_type == "Gather":
            return
        if node.op_type != "MatMul":
            del node.input[2:]
            if bias is not None:
                node.input.append(bias)
            return
        if len(nodes) == 1 and bias is not None:
            target = node.output[0]
            node.output[0] = self.fresh(f"{target}_product")
            nodes.append(helper.make_node("Add", [node.output[0], bias], [target], name=f"{node.name}/Add"))
        elif len(nodes) == 2 and bias is not None:
            nodes[1].input[:] = [node.output[0], bias]

    # Names and values

    def _same_or_new(self, name: str, values: np.ndarray) -> str:
        """The stored tensor of this name where it has these values, else a new one."""
        if name in self.stored and np.array_equal(numpy_helper.to_array(self.stored[name]), values):
            return name
        return self.value(f"{name}_new" if name in self.stored else name, values)

    def value(self, name: str, values: np.ndarray) -> str:
        """The name of a stored tensor with these values."""
        there = self.stored.get(name)
        if there is not None and np.array_equal(numpy_helper.to_array(there), values):
            return name
        name = self.fresh(name)
        tensor = numpy_helper.from_array(np.array(values, order="C"), name)
        self.proto.graph.initializer.append(tensor)
        self.stored[name] = self.proto.graph.initializer[-1]
        return name

    def fresh(self, name: str) -> str:
        return fresh_name(name, self.names)
