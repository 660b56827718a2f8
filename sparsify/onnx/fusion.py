"""Finds the operators of a Q/DQ file that run in integers, and says of the others why not. Knows no torch.

An operator runs in integers when *all* it reads comes straight from DequantizeLinear and its result goes straight into
one QuantizeLinear; Gemm and MatMul may also end in float. A Relu between the two vanishes where 0 is the lowest number
of the grid, a Clip where it cuts nothing off. These are the rules by which onnxruntime fuses on x86.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto

from sparsify.onnx.graph import GraphView, integer, only_moves
from sparsify.onnx.rewrite_float_layers import LAYERS, has_float_weight, is_barrier, is_kept_float

__all__: list[str] = []

INTEGER = {
    "Conv": "QLinearConv",
    "Gemm": "QGemm",
    "MatMul": "QLinearMatMul",
    "Add": "QLinearAdd",
    "Mul": "QLinearMul",
    "Concat": "QLinearConcat",
    "GlobalAveragePool": "QLinearGlobalAveragePool",
    "AveragePool": "QLinearAveragePool",
    "Sigmoid": "QLinearSigmoid",
    "LeakyRelu": "QLinearLeakyRelu",
    "Softmax": "QLinearSoftmax",
}
"""{operator: onnxruntime's integer kernel for it}."""
INDIFFERENT = frozenset({"Cast", "Shape"})
"""Operators for which it does not matter that they read floats: a shape is no value, and a Cast asks for floats."""


@dataclass(frozen=True)
class Fused:
    """One operator that runs in integers."""

    node: NodeProto
    quantize: NodeProto | None
    """The QuantizeLinear behind it; None: it gives float."""
    between: tuple[NodeProto, ...] = ()
    """The Relu or Clip before that QuantizeLinear, which vanishes."""

    @property
    def output(self) -> str:
        """The value that the kernel gives."""
        last = self.quantize or self.node
        name: str = last.output[0]
        return name


@dataclass(frozen=True)
class Unfused:
    """One operator next to Q or DQ that runs in float."""

    name: str
    operator: str
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.operator}) runs in float: {self.why}"


class Fusion:
    """Operators of `model` that run in integers, `fused` by the kernel's output, and `unfused`, in the file's order."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.view = GraphView(graph)
        self._stored = self.view.initializers
        self.fused: dict[str, Fused] = {}
        self.unfused: list[Unfused] = []
        for node in graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") or not self._concerned(node):
                continue
            found = self._fuse(node)
            if isinstance(found, Fused):
                self.fused[found.output] = found
            elif not only_moves(node) and node.op_type not in INDIFFERENT:
                self.unfused.append(Unfused(node.name or node.output[0], node.op_type, found))

    def source(self, name: str) -> NodeProto | None:
        """The DequantizeLinear that makes a value."""
        node = self.view.producer.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def _concerned(self, node: NodeProto) -> bool:
        """It reads quantized values; but a table of embeddings or a weight alone does not make an operator integer."""
        if is_barrier(node):
            return False
        sources = [self.source(name) for name in node.input if name]
        if is_kept_float(self.view, node) or any(
            source is not None and source.input[0] not in self._stored for source in sources
        ):
            return True
        weighted = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        return weighted and any(source is not None for source in sources)

    def _fuse(self, node: NodeProto) -> Fused | str:
        kind = node.op_type
        if kind in LAYERS and has_float_weight(self.view, node):
            name = node.input[1]
            return f"its weight{f' {name!r}' if name in self._stored else ''} is in float, as the model has it"
        if is_kept_float(self.view, node):
            return "its weights alone are quantized"
        if kind not in INTEGER:
            return f"onnxruntime has no integer kernel for {kind}; leave out the quantizer before it if speed matters"
        needed = [name for name in node.input if name]
        for i, name in enumerate(needed):
            source = self.source(name)
            if source is None:
                if i == 2 and kind in ("Conv", "Gemm"):
                    return f"its bias {name!r} is in float; it has to be int32 on the grid of input and weight"
                where = self.view.producer.get(name)
                made = f"what {where.name or where.output[0]} gives" if where is not None else f"{name!r}"
                if i == 0 and kind in LAYERS and self._only_weights(needed):
                    return f"its weights alone are quantized, and it reads {made} in float"
                return f"it reads {made} in float; quantize that as well"
            if why := self._unsuitable(
                source, weight=source.input[0] in self._stored, bias=i == 2 and kind in ("Conv", "Gemm")
            ):
                return why
        if kind == "Gemm" and (
            integer(node, "transA", 0) or any(a.name in ("alpha", "beta") and a.f != 1.0 for a in node.attribute)
        ):
            return "it transposes its first operand or scales by alpha or beta"
        return self._behind(node)

    def _only_weights(self, operands: list[str]) -> bool:
        """True if the second operand is a stored weight."""
        source = self.source(operands[1]) if len(operands) > 1 else None
        return source is not None and source.input[0] in self._stored

    def _behind(self, node: NodeProto) -> Fused | str:
        between: list[NodeProto] = []
        name = node.output[0]
        floating = Fused(node, None) if node.op_type in ("Gemm", "MatMul") else None
        while True:
            readers = self.view.consumers(name)
            if name in self.view.outputs:
                return floating or "its result is an output of the file in float"
            if len(readers) != 1:
                names = ", ".join(reader.name or reader.output[0] for reader in readers)
                return floating or f"its result is read {len(readers)} times before it is quantized, by {names}"
            reader = readers[0]
            if reader.op_type == "QuantizeLinear":
                kept = next((each for each in between if not self._vanishes(each, reader)), None)
                if kept is not None:
                    return floating or (
                        f"{kept.name or kept.op_type} between it and its quantizer cuts values off; a Relu needs the "
                        "zero point at the lowest number, a Clip a range within its bounds"
                    )
                why = self._unsuitable(reader, weight=False, bias=False)
                return floating or why if why else Fused(node, reader, tuple(between))
            if reader.op_type not in ("Relu", "Clip") or reader.input[0] != name:
                return floating or f"its result goes in float to {reader.name or reader.op_type}; quantize it"
            between.append(reader)
            name = reader.output[0]

    def _unsuitable(self, node: NodeProto, *, weight: bool, bias: bool) -> str | None:
        """Why a Q or DQ node's grid fits no integer kernel."""
        scale = self.view.constant(node.input[1])
        zero = self.view.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if scale is None:
            return f"the scale {node.input[1]!r} is computed, not stored"
        if bias:
            stored = self._stored.get(node.input[0])
            if stored is None or stored.data_type != TensorProto.INT32:
                return f"its bias {node.input[0]!r} is not stored as int32"
            return None
        if weight:
            if any(attribute.name == "block_size" and attribute.i for attribute in node.attribute):
                return f"{node.input[0]!r} has a scale for each block; only weight-only kernels take those"
            stored_type = self._stored[node.input[0]].data_type
            if stored_type not in (TensorProto.INT8, TensorProto.UINT8):
                return f"{node.input[0]!r} is stored as {TensorProto.DataType.Name(stored_type)}, not in 8 bits"
            return None
        if scale.ndim != 0:
            return f"the scale {node.input[1]!r} has the shape {list(scale.shape)}; activations need rank 0"
        kind = np.dtype(np.uint8) if zero is None else zero.dtype
        if kind != np.uint8:
            return f"activations of {kind}: on x86 onnxruntime fuses those of uint8; use an unsigned scheme"
        return None

    def _vanishes(self, node: NodeProto, quantize: NodeProto) -> bool:
        scale, zero = self.view.constant(quantize.input[1]), self.view.constant(quantize.input[2])
        if scale is None or zero is None:
            return False
        info = np.iinfo(zero.dtype)
        if node.op_type == "Relu":
            return int(zero.reshape(-1)[0]) == info.min
        low, high = (
            (float(edge) - float(zero.reshape(-1)[0])) * float(scale.reshape(-1)[0]) for edge in (info.min, info.max)
        )
        bounds = [self.view.constant(name) if name else None for name in [*node.input[1:], "", ""][:2]]
        slack = float(np.finfo(np.float32).eps)
        least = -np.inf if bounds[0] is None else float(bounds[0])
        most = np.inf if bounds[1] is None else float(bounds[1])
        return least <= low + slack and most >= high - slack
