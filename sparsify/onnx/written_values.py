"""Compares the values of a file that is about to be put in place with those of the model, on several inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.errors import ExportError, SparsifyWarning, first_line
from sparsify.model.preserved import preserved_rng
from sparsify.onnx.runtime import SessionSettings, run_session, start_session

if TYPE_CHECKING:
    from onnx import ModelProto

__all__: list[str] = []

TOLERANCE = 0.01
"""The largest difference of a float output, as a fraction of its largest value here or on the sample. Sums in another
order stay far below; a constant or an operator that went missing does not."""
NOISE = 1e-7
"""What is left of sums that cancel out: no difference where an output holds nothing else."""
SCALES = {"small values": 1e-6, "large values": 1e3}
ITEMS = 2
"""Items of a batch that are compared."""

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
# A last bit of their inputs decides: equal to the model's or far from it, without a fault in the file.
STEPS = frozenset(
    {"QuantizeLinear", "DynamicQuantizeLinear", "TopK", "ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "Unique"}
    | {"Floor", "Ceil", "Round", "Mod", "Sign", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "IsNaN"}
    | {"IsInf", "Cast", "GridSample", "Hardmax", "MaxRoiPool", "RoiAlign"}
)


def compare_written(model: nn.Module, proto: ModelProto, tensors: Sequence[Tensor], batched: Sequence[bool]) -> None:
    """Refuses a file whose values are not those of the model: on the sample, on zeros, on small and large values.

    Args:
        model: on the CPU, in eval mode; takes `tensors` in a row and gives its outputs in the order of the file's.
        proto: the file.
        tensors: inputs of one call, in the order of the file's.
        batched: for each of them, True if its axis 0 is the free batch axis of the file.

    Raises:
        ExportError: an output is not finite where the model's is, with the operator that made it so; or, where nothing
            but sums and products lies before it, an output that differs by more than `TOLERANCE`.
    """
    operators = {node.op_type for node in proto.graph.node}
    if operators & RANDOM:
        return
    try:
        session = start_session(proto, SessionSettings(optimized=False), path=None, changed=True)
    except ExportError as error:
        warnings.warn(f"{first_line(error)} The file is written; its values were not compared.", SparsifyWarning, 5)
        return
    names = [value.name for value in proto.graph.input]
    tensors = [tensor[:ITEMS] if free else tensor for tensor, free in zip(tensors, batched, strict=True)]
    sizes: dict[str, float] = {}
    for kind, values in _variants(tensors):
        expected = _outputs(model, values)
        feeds = {name: value.contiguous().numpy() for name, value in zip(names, values, strict=True)}
        if expected is None:
            continue
        try:
            found = run_session(session, feeds)
        except ExportError as error:
            raise ExportError(f"the file does not run on {kind}: {first_line(error)} Nothing was written.") from error
        for (name, actual), tensor in zip(found.items(), expected, strict=True):
            wanted = tensor.detach().numpy()
            if not np.issubdtype(wanted.dtype, np.floating) or wanted.shape != actual.shape:
                continue
            finite = np.isfinite(wanted)
            if not np.isfinite(actual[finite]).all():
                message = (
                    f"the file would not compute what the model computes: on {kind} its output {name!r} is not finite, "
                    f"where the model's is{_first_not_finite(proto, feeds)}."
                )
                if kind != "large values":
                    raise ExportError(f"{message} Nothing was written.")
                warnings.warn(f"{message} The file was written.", SparsifyWarning, 5)
            elif finite.any() and not operators & STEPS and kind != "large values":
                size = max(float(np.abs(wanted[finite]).max()), sizes.get(name, 0.0))
                # The sample comes first: on zeros an output may be the rounding error of what cancels out.
                sizes.setdefault(name, size)
                difference = np.abs(actual[finite] - wanted[finite]).max()
                if difference > TOLERANCE * size + NOISE:
                    raise ExportError(
                        f"the file would not compute what the model computes: on {kind} its output {name!r} differs by "
                        f"{difference:.3g}, of values up to {size:.3g}. Nothing was written."
                    )


def _outputs(model: nn.Module, values: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """The model's outputs; None where its forward refuses these values."""
    try:
        with torch.no_grad(), preserved_rng(model):
            return tuple(model(*values))
    except Exception:  # any code of a user may stand in forward
        return None


def _variants(tensors: Sequence[Tensor]) -> Iterator[tuple[str, list[Tensor]]]:
    """The inputs, and the same with other floats; whole numbers and booleans stay."""
    yield "the sample inputs", list(tensors)
    if any(tensor.is_floating_point() for tensor in tensors):
        for kind, scale in {"zeros": 0.0, **SCALES}.items():
            yield kind, [tensor * scale if tensor.is_floating_point() else tensor for tensor in tensors]


def _first_not_finite(proto: ModelProto, feeds: dict[str, np.ndarray]) -> str:
    """Words for the first node that makes something not finite of finite values; empty where none is found."""
    from onnx import ModelProto as Model
    from onnx import ValueInfoProto

    wide = Model()
    wide.CopyFrom(proto)
    known = {value.name for value in wide.graph.output}
    made = [name for node in wide.graph.node for name in node.output if name]
    wide.graph.output.extend(ValueInfoProto(name=name) for name in made if name not in known)
    try:
        session = start_session(wide, SessionSettings(optimized=False), path=None, changed=True)
        values = run_session(session, feeds)
    except ExportError:
        return ""
    bad = {
        name
        for name, value in values.items()
        if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all()
    }
    for node in wide.graph.node:
        if bad & set(node.output) and not bad & set(node.input):
            return f"; {node.op_type} ({node.name or node.output[0]}) is the first that is not"
    return ""
