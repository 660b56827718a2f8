"""Every quantized tensor of a file, kernel by kernel: torch and onnxruntime, each against the integer reference.

Compared from end to end, one value on the edge between two steps changes all that follows. So each kernel of the
reference is given the integers that the *other* side has before it, and only what it makes of them is compared.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import ExportError
from sparsify.onnx.runtime import SessionSettings, open_session, optimized_model, run_session, start_session

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto

    from sparsify.onnx.fusion import Unfused
    from sparsify.onnx.graph import GraphView
    from sparsify.onnx.reference import Reference

__all__: list[str] = []

SHARE = 0.02
"""Float against integers, kernel by kernel: at most this share of a tensor falls one step aside. Of kernels without
weights any share may: where the scales of an add have a simple ratio, every few sums lie half-way between two steps."""
FEW = 3
"""So many values may differ in a tensor of any size."""
FLOAT_ROUNDING = 1e-4
"""Likewise of a product that onnxruntime computes in float: the fraction of its largest value up to which a difference
is float32's rounding. It is the tolerance of an output."""
FLOAT_KERNELS = frozenset({"QuantizeLinear", "Gemm", "MatMul", "FusedMatMul", "FusedGemm"})
"""Operators in the optimized graph that compute a tensor from floats."""


@dataclass(frozen=True)
class Gap:
    """The difference between two tensors of integers."""

    steps: float
    """The largest difference, in quantization steps."""
    share: float
    """The fraction of values that differ at all."""
    count: int
    """Number of values that differ."""


@dataclass(frozen=True)
class TensorDifference:
    """One quantized tensor, or the float result of an integer kernel: each side against the reference."""

    name: str
    """The node that gives it: "<layer>/QuantizeLinear", or "<layer>/Gemm"."""
    kernel: str
    """The operator that computes it in onnxruntime, optimized: "QLinearConv"; "QuantizeLinear" behind floats."""
    exact: bool
    """True if onnxruntime computes it from integers, so that nothing may differ."""
    weighted: bool
    """True if weights of the model go into it: a sum of two tensors, or a pool, holds nothing that could be wrong."""
    torch: Gap | None
    """The deployed copy in torch, which computes in float; None where it has no tensor of this name."""
    written: Gap | None
    """onnxruntime without optimizations, which computes in float."""
    optimized: Gap | None
    """onnxruntime with optimizations."""
    total: Gap | None
    """Likewise, but from end to end: the reference began at the inputs of the file."""

    @property
    def steps(self) -> float:
        """The largest difference, kernel by kernel."""
        return max((gap.steps for gap in (self.torch, self.written, self.optimized) if gap), default=0.0)

    @property
    def why(self) -> str | None:
        """Says what diverges, and where to look; None where nothing does."""
        if self.optimized is not None and self.exact and self.optimized.count:
            return (
                f"onnxruntime's {self.kernel} gives other integers than exact arithmetic ({_words(self.optimized)}). "
                "On a CPU without VNNI sums of int8 products saturate where onnxruntime cannot follow "
                "session.x64quantprecision: train with reduce_range"
            )
        if self.torch is not None and self._float_diverges(self.torch):
            return (
                f"torch gives other integers than the file from the same inputs ({_words(self.torch)}): the weights, "
                "biases or ranges in the file are not those of the model; was it trained, or the file edited, after "
                "the export?"
            )
        if self.optimized is not None and not self.exact and self._float_diverges(self.optimized):
            return (
                f"it stands behind operators that onnxruntime runs in float, and is farther off than float rounding "
                f"explains ({_words(self.optimized)})"
            )
        if self.written is not None and self._float_diverges(self.written):
            return (
                f"onnxruntime without optimizations gives other integers from the same inputs ({_words(self.written)})"
            )
        return None

    @property
    def diverges(self) -> bool:
        return self.why is not None

    def _float_diverges(self, gap: Gap) -> bool:
        """True if it is more than rounding in float explains, which moves what lies on the edge between two steps."""
        return gap.steps > 1 or (self.weighted and gap.count > FEW and gap.share > SHARE)


@dataclass(frozen=True)
class Proof:
    """Findings of `prove`."""

    tensors: tuple[TensorDifference, ...]
    """In the order of computation."""
    unfused: tuple[Unfused, ...]
    local: Mapping[str, Mapping[str, np.ndarray]]
    """{"torch", "written" or "optimized": {output: what the reference makes of that side's integers}}."""
    reference: Mapping[str, np.ndarray]
    """The outputs of the reference, begun at the inputs of the file."""


def prove(
    proto: ModelProto,
    path: str | os.PathLike[str],
    feed: dict[str, np.ndarray],
    recorded: Mapping[str, np.ndarray],
    expected: dict[str, np.ndarray],
    keep: Collection[str] = (),
) -> Proof:
    """Compares kernel by kernel.

    Args:
        proto: the file at `path`.
        path: where it lies, with its external data beside it.
        feed: the inputs by name.
        recorded: {node that quantizes: integers} in torch.
        expected: the outputs of onnxruntime with optimizations; looking inside must not have changed them.
        keep: inner values that the findings hold beside the outputs.

    Raises:
        ExportError: the reference cannot run the file.
    """
    from sparsify.onnx.reference import Reference

    reference = Reference(proto)
    tensors = _compared_tensors(reference, proto)
    quantized = [node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    moved = {name: _moved(reference.fusion.view, name) for name in quantized if tensors[name].name in recorded}
    end_to_end = reference.run(feed, keep=[*tensors, *keep, *(name for names in moved.values() for name in names)])
    optimized, kernels = _inside(proto, path, feed, quantized, list(tensors), expected)
    torch_values, places = _torch_values({name: recorded[tensors[name].name] for name in moved}, moved, end_to_end)

    def side(values: Mapping[str, np.ndarray], places: Mapping[str, str] | None = None) -> _Side:
        local = reference.run(feed, given=values, keep=[*values, *keep]) if values else {}
        return _Side(values, local, places or {})

    sides = {
        "torch": side(torch_values, places),
        "written": side(computed_as_written(proto, path, feed, quantized)),
        "optimized": side(optimized),
    }
    differences = [
        _tensor_difference(reference, name, node, sides, end_to_end[name], kernels.get(name, "-"))
        for name, node in tensors.items()
    ]
    return Proof(
        tuple(differences),
        tuple(_unfused(reference, kernels)),
        {name: each.local for name, each in sides.items()},
        {name: end_to_end[name] for name in [*reference.outputs, *keep] if name in end_to_end},
    )


@dataclass(frozen=True)
class _Side:
    """One of those that are compared with the reference."""

    values: Mapping[str, np.ndarray]
    """Its tensors, by their values in the file."""
    local: Mapping[str, np.ndarray]
    """The same, as the reference makes them of this side's own inputs of each kernel."""
    places: Mapping[str, str]
    """{value: other value in whose form this side has it}, see `_moved`."""

    def gap(self, name: str, step: np.ndarray | None, exact: bool = False) -> Gap | None:
        """The gap to the reference; None where this side has no such tensor."""
        place = self.places.get(name, name)
        return _gap(self.local[place], self.values[place], step, exact) if place in self.values else None


def _compared_tensors(reference: Reference, proto: ModelProto) -> dict[str, NodeProto]:
    """{value: node that makes it} of quantized tensors and float results of integer kernels, as they are computed."""
    floats = {name for name, fused in reference.fusion.fused.items() if fused.quantize is None}
    return {
        name: node
        for node in proto.graph.node
        for name in node.output
        if node.op_type == "QuantizeLinear" or name in floats
    }


def _torch_values(
    recorded: Mapping[str, np.ndarray], moved: Mapping[str, list[str]], end_to_end: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({value in the file: integers in torch, in its shape}, {quantized value: the one that it is compared at})."""
    values: dict[str, np.ndarray] = {}
    places: dict[str, str] = {}
    for name, names in moved.items():
        forms = {at: aligned for at in names if (aligned := _aligned(recorded[name], end_to_end[at])) is not None}
        if forms:
            # Several forms may have one shape: of a square transposed, both have.
            place = min(forms, key=lambda one: int((forms[one] != end_to_end[one]).sum()))
            values[place], places[name] = forms[place], place
    return values, places


def _tensor_difference(
    reference: Reference,
    name: str,
    node: NodeProto,
    sides: Mapping[str, _Side],
    end_to_end: np.ndarray,
    kernel: str,
) -> TensorDifference:
    """Each side of one tensor against the reference."""
    step = _step(reference, name)
    optimized = sides["optimized"].values.get(name)
    fused = reference.fusion.fused.get(name)
    # A QuantizeLinear of an input of the file has nothing before it that could round otherwise.
    exact = optimized is not None and (kernel not in {*FLOAT_KERNELS, "-"} or node.input[0] in reference.inputs)
    return TensorDifference(
        name=node.name or name,
        kernel=kernel,
        exact=exact,
        weighted=fused is None or fused.node.op_type in ("Conv", "Gemm", "MatMul"),
        torch=sides["torch"].gap(name, step),
        written=sides["written"].gap(name, step),
        optimized=sides["optimized"].gap(name, step, exact),
        total=None if optimized is None else _gap(end_to_end, optimized, step, exact),
    )


def _unfused(reference: Reference, kernels: Mapping[str, str]) -> list[Unfused]:
    """Operators that cannot run in integers, and those that could but do not."""
    from sparsify.onnx.fusion import Unfused

    found = list(reference.fusion.unfused)
    for output, fused in reference.fusion.fused.items():
        if kernels.get(output) in FLOAT_KERNELS:
            node = fused.node
            why = "onnxruntime left it in float although all its neighbours are quantized"
            found.append(Unfused(node.name or node.output[0], node.op_type, why))
    return found


def computed_as_written(
    proto: ModelProto, path: str | os.PathLike[str], feed: dict[str, np.ndarray], names: list[str]
) -> dict[str, np.ndarray]:
    mine = copy.deepcopy(proto)
    del mine.graph.output[:]
    if not names:
        return {}
    session = open_session(path, optimized=False, model=mine, extra_outputs=list(dict.fromkeys(names)))
    return run_session(session, feed)


def _inside(
    proto: ModelProto,
    path: str | os.PathLike[str],
    feed: dict[str, np.ndarray],
    quantized: list[str],
    wanted: list[str],
    expected: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """({value: what it is in the optimized graph}, {value: the operator that makes it there}).

    Quantized tensors become outputs before onnxruntime optimizes, which they do not disturb. A float result would: of
    those the ones are taken that the optimized graph, saved, still has.
    """
    import numpy as np

    from sparsify.onnx.graph import GraphView

    mine = copy.deepcopy(proto)
    present = {value.name for value in mine.graph.output}
    for name in dict.fromkeys(quantized):
        if name not in present:
            mine.graph.output.add().name = name
    seen = optimized_model(mine, SessionSettings(float_inputs=True), path=path, changed=True)
    view = GraphView(seen.graph)
    have = {value.name for value in seen.graph.output}
    for name in wanted:
        if name in view.producer and name not in have:
            seen.graph.output.add().name = name
    session = start_session(seen, SessionSettings(optimized=False), path=path, changed=True)
    values = run_session(session, feed)
    for name, value in expected.items():
        if not np.array_equal(values[name], value, equal_nan=value.dtype.kind == "f"):
            raise ExportError(
                f"{Path(path)}: onnxruntime optimizes this graph otherwise when its inner values are asked for "
                f"(output {name!r} differs), so that they prove nothing."
            )
    kernels = {name: _kernel(view, name) for name in wanted if name in view.producer}
    return {name: values[name] for name in wanted if name in values}, kernels


def _kernel(view: GraphView, name: str) -> str:
    """The operator that computes a value of the optimized graph, before what only moves it.

    onnxruntime puts a Transpose behind convolutions for the layout of their results, and moves a QuantizeLinear before
    operators that move integers; its MaxPool in the other layout is called NhwcMaxPool.
    """
    from sparsify.onnx.graph import only_moves

    def moves(node: NodeProto) -> bool:
        return (only_moves(node) or node.op_type == "NhwcMaxPool") and node.input[0] in view.producer

    return str(view.producer[view.origin(name, moves)].op_type)


def _moved(view: GraphView, name: str) -> list[str]:
    """The integers of one quantizer, and what they become that are moved before anybody computes with them.

    A transposed convolution that runs as a convolution gives its pixels as channels, which torch does not have; a
    quantizer behind a product stands in torch behind what moves its result.
    """
    from sparsify.onnx.graph import only_moves

    names = [name]
    while True:
        readers = view.consumers(names[-1])
        if len(readers) != 1 or not only_moves(readers[0]) or readers[0].input[0] != names[-1]:
            return names
        if len(readers[0].output) != 1:
            return names
        names.append(readers[0].output[0])


def _step(reference: Reference, name: str) -> np.ndarray | None:
    """Scale of the sums, per column, of an integer kernel that gives floats; None for all others."""
    import numpy as np

    fused = reference.fusion.fused.get(name)
    if fused is None or fused.quantize is not None:
        return None
    scales = []
    for operand in fused.node.input[:2]:
        source = reference.fusion.source(operand)
        scale = reference.fusion.view.constant(source.input[1]) if source is not None else None
        scales.append(np.float32(1) if scale is None else np.asarray(scale))
    return np.asarray(scales[0] * scales[1])


def _gap(expected: np.ndarray, found: np.ndarray, step: np.ndarray | None, exact: bool) -> Gap:
    """The gap between integers, or between floats that stand for sums of integers, each `step` wide."""
    import numpy as np

    if step is None:
        apart = np.abs(expected.astype(np.int64) - found.astype(np.int64)).astype(np.float64)
    else:
        wide = expected.astype(np.float64)
        gap = np.abs(wide - found)
        apart = gap / step
        if not exact:
            # Added up in float the last bits are others: another sum of integers is a whole step away.
            apart[(apart < 0.5) | (gap <= FLOAT_ROUNDING * np.abs(wide).max(initial=0))] = 0
    count = int(np.count_nonzero(apart))
    return Gap(float(apart.max(initial=0)), count / apart.size if apart.size else 0.0, count)


def _aligned(integers: np.ndarray, like: np.ndarray) -> np.ndarray | None:
    """torch's tensor in its shape in the file, where layers over a sequence work on rows; None where none fits."""
    if integers.shape != like.shape:
        flattened = integers.ndim != like.ndim and integers.size == like.size
        if not (flattened and (integers.shape[-1:] == like.shape[-1:] or integers.shape[:1] == like.shape[:1])):
            return None
    return integers.reshape(like.shape).astype(like.dtype)


def _words(gap: Gap) -> str:
    return f"at most {gap.steps:.0f} steps, {gap.share:.2%} of the values"
