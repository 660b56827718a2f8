"""Whether an exported file computes what the model computes: torch against onnxruntime, output by output."""

from __future__ import annotations

import copy
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.errors import ArgumentError, ExportError
from sparsify.export import deployed_copy
from sparsify.quantize.emit import QUANTIZE_DEQUANTIZE
from sparsify.runtime import first_line, open_session, read_model, run_session
from sparsify.signature import Call, named_outputs, unwrapped

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, NodeProto

__all__ = ["verify_onnx"]

FLOAT_TOLERANCE = 1e-4
"""Of a float model: the largest difference, as a fraction of the largest value of the output."""
HALF_TOLERANCE = 0.01
"""Likewise, where weights are stored in float16."""
QUANTIZED_TOLERANCE = 0.05
"""Of a quantized model: the root mean square of the difference, as a fraction of that of the output. A value that lies
on the edge between two steps may fall either way, and what follows it differs by the whole step: 11.7 % of the values
after sixteen convolutions differ, by four steps at most."""
STEP_TOLERANCE = 4
"""Of an output that is quantized itself: quantization steps."""
DIVERGED = 0.01
"""A quantized tensor diverges when more than this share of its values is off by more than one step."""


@dataclass(frozen=True)
class Difference:
    """One output: torch (the model in eval mode) against onnxruntime."""

    output: str
    optimized: bool
    """Whether onnxruntime's graph optimizations were on."""
    max_abs: float
    relative: float
    """max_abs / the largest absolute value in torch."""
    rms: float
    """Root mean square of the difference / that of the output in torch."""
    share: float
    """The fraction of values that differ by more than 1e-5 of the largest."""
    step: float | None
    """The scale of the output where it is quantized itself."""
    ok: bool

    @property
    def steps(self) -> float | None:
        """The largest difference in quantization steps."""
        return None if self.step is None else self.max_abs / self.step


@dataclass(frozen=True)
class TensorDifference:
    """One quantized tensor within the network: the deployed copy in torch against onnxruntime without optimizations."""

    name: str
    """The node that quantizes it: "<layer>/QuantizeLinear"."""
    steps: float
    """The largest difference."""
    share: float
    """The fraction of values that differ at all."""
    diverges: bool


@dataclass(frozen=True)
class Verification:
    """What `verify_onnx` found. True where `ok`."""

    path: Path
    quantized: bool
    tolerance: float
    outputs: tuple[Difference, ...]
    tensors: tuple[TensorDifference, ...]
    """In the order of computation; empty for a float model."""

    @property
    def ok(self) -> bool:
        """Every output within its tolerance, with optimizations off and on."""
        return all(output.ok for output in self.outputs)

    @property
    def first_divergence(self) -> str | None:
        """The first quantized tensor of which more than 1 % is off by more than one step; None where there is none."""
        return next((tensor.name for tensor in self.tensors if tensor.diverges), None)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        what = "root mean square of the difference" if self.quantized else "largest difference"
        width = max(6, *(len(output.output) for output in self.outputs))
        lines = [
            f"{self.path}: {'agrees' if self.ok else 'DIFFERS'} ({what} <= {self.tolerance:g} of the output)",
            f"{'output':{width}}  onnxruntime    max abs   relative        rms  differing  steps",
        ]
        for output in self.outputs:
            how = "optimized" if output.optimized else "as written"
            steps = "-" if output.steps is None else f"{output.steps:.1f}"
            figures = f"{output.max_abs:9.3g}  {output.relative:9.3g}  {output.rms:9.3g}  {output.share:9.2%}"
            lines.append(f"{output.output:{width}}  {how:11}  {figures}  {steps:>5}{'' if output.ok else '  <--'}")
        if self.tensors:
            worst = max(self.tensors, key=lambda tensor: tensor.steps)
            where = self.first_divergence
            lines.append(
                f"{len(self.tensors)} quantized tensors compared: at most {worst.steps:.0f} steps ({worst.name}); "
                + (f"the first that diverges is {where}" if where else "none diverges")
            )
        return "\n".join(lines)


def verify_onnx(
    model: nn.Module, path: str | os.PathLike[str], inputs: Any, *, tolerance: float | None = None
) -> Verification:
    """Runs `model` in torch and its file in onnxruntime, with optimizations off and on, and compares every output.

    The model's eval forward is the reference: of a quantized model, the simulated quantization that was trained. It is
    run on a copy; mode, device and buffers of `model` stay as they are.

    Args:
        model: what was exported.
        path: its file.
        inputs: as `sample_inputs` of `export_onnx`, with any batch size that the file takes.
        tolerance: a float model agrees where the largest difference is at most this fraction of the largest value
            (default 1e-4; 0.01 in float16); a quantized one where the root mean square of the difference is at most
            this fraction of that of the output (default 0.05), and an output that is quantized itself is off by at
            most 4 steps.

    Raises:
        ArgumentError: inputs that do not fit the model or the file, or a tolerance that is no positive number.
        DataFileError, DataError: the file is missing or broken.
        ExportError: a file that onnxruntime cannot run, or with other outputs than the model's.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model is a {type(model).__name__}; give a torch.nn.Module.")
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 < tolerance < math.inf):
        raise ArgumentError(f"tolerance={tolerance!r}: give a positive number.")
    model = unwrapped(model)
    call = Call.of(model, inputs)
    proto = read_model(path)
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node)
    steps = _output_steps(proto)
    limit = tolerance or (QUANTIZED_TOLERANCE if quantized else _float_tolerance(proto))

    expected = _eager(model, call)
    plain = open_session(path, optimized=False, model=proto)
    feed = _feed(plain, call, Path(path))
    names = [value.name for value in plain.get_outputs()]
    if len(names) != len(expected):
        raise ExportError(
            f"{Path(path)} has the outputs {', '.join(names)}; {type(model).__name__} returns {', '.join(expected)}."
        )
    found: list[Difference] = []
    for optimized in (False, True):
        session = open_session(path, optimized=True, model=proto) if optimized else plain
        results = run_session(session, feed)
        for name, reference in zip(names, expected.values(), strict=True):
            found.append(_difference(name, optimized, reference, results[name], steps.get(name), quantized, limit))
    order = {name: i for i, name in enumerate(names)}
    found.sort(key=lambda difference: (order[difference.output], difference.optimized))
    tensors = _compare_tensors(model, call, proto, path, feed) if quantized else []
    return Verification(Path(path), quantized, limit, tuple(found), tuple(tensors))


def _float_tolerance(proto: ModelProto) -> float:
    from onnx import TensorProto

    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in proto.graph.initializer)
    return HALF_TOLERANCE if half else FLOAT_TOLERANCE


def _eager(model: nn.Module, call: Call) -> dict[str, np.ndarray]:
    """The outputs of a copy of `model` in eval mode, on its own device, with the RNG put back."""
    model = copy.deepcopy(model).eval()
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    args, kwargs = call.arguments([tensor.detach().to(device) for tensor in call.inputs.values()])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        try:
            outputs = model(*args, **kwargs)
        # Whatever the user's own code raises on inputs that it was not written for.
        except Exception as error:
            raise ArgumentError(
                f"inputs do not run through {type(model).__name__}: {type(error).__name__}: {error}. Give inputs as "
                "they were given to export_onnx, and the model that was exported."
            ) from error
        named, _ = named_outputs(outputs)
    return {name: _array(tensor) for name, tensor in named.items()}


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # numpy has no bfloat16; both widths of half compare in float32.
    result: np.ndarray = (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()
    return result


def _feed(session: Any, call: Call, path: Path) -> dict[str, np.ndarray]:
    """By name where the file has the names, by position where it has the same number of others."""
    names = [value.name for value in session.get_inputs()]
    tensors = {name: tensor.detach().cpu().numpy() for name, tensor in call.inputs.items()}
    if set(names) <= set(tensors):
        return {name: tensors[name] for name in names}
    if len(names) == len(tensors):
        return dict(zip(names, tensors.values(), strict=True))
    raise ArgumentError(f"{path} takes the inputs {', '.join(names)}; given: {', '.join(tensors)}.")


def _difference(
    name: str,
    optimized: bool,
    expected: np.ndarray,
    found: np.ndarray,
    step: float | None,
    quantized: bool,
    tolerance: float,
) -> Difference:
    import numpy as np

    if expected.shape != found.shape:
        raise ExportError(
            f"output {name!r} has the shape {list(found.shape)} in onnxruntime and {list(expected.shape)} in torch; "
            "something in forward was fixed to the sample inputs."
        )
    wide, other = expected.astype(np.float64), found.astype(np.float64)
    # Where both are the same infinity, or both NaN, nothing differs.
    same = (wide == other) | (np.isnan(wide) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(wide - other))
    gap = np.where(np.isnan(gap), np.inf, gap)
    finite = wide[np.isfinite(wide)]
    largest = float(np.abs(finite).max(initial=0.0))
    max_abs = float(gap.max(initial=0.0))
    relative = max_abs / largest if largest else (0.0 if max_abs == 0 else math.inf)
    power = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    spread = float(np.sqrt(np.mean(gap**2))) if gap.size else 0.0
    rms = spread / power if power else (0.0 if spread == 0 else math.inf)
    share = float(np.mean(gap > 1e-5 * largest)) if gap.size else 0.0
    if found.dtype.kind in "iub":
        ok = max_abs == 0 or (quantized and share <= tolerance)
    else:
        ok = (rms if quantized else relative) <= tolerance
    ok = ok and (step is None or max_abs <= (STEP_TOLERANCE + 0.5) * step)
    return Difference(name, optimized, max_abs, relative, rms, share, step, ok)


def _output_steps(proto: ModelProto) -> dict[str, float]:
    """{output: scale} of the outputs that come straight from a DequantizeLinear, through data movement at most."""
    from onnx import numpy_helper

    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    producer = {name: node for node in proto.graph.node for name in node.output}
    steps: dict[str, float] = {}
    for value in proto.graph.output:
        node = producer.get(value.name)
        for _ in range(len(proto.graph.node)):
            if node is None or node.op_type not in _MOVEMENT:
                break
            node = producer.get(node.input[0])
        if node is not None and node.op_type == "DequantizeLinear" and node.input[1] in stored:
            scale = numpy_helper.to_array(stored[node.input[1]])
            if scale.ndim == 0:
                steps[value.name] = float(scale)
    return steps


_MOVEMENT = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool", "Slice", "Gather", "Identity"}


def _compare_tensors(
    model: nn.Module, call: Call, proto: ModelProto, path: str | os.PathLike[str], feed: dict[str, np.ndarray]
) -> list[TensorDifference]:
    """Every quantized tensor that both sides have under one name."""
    import numpy as np

    nodes: dict[str, NodeProto] = {node.name: node for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    try:
        recorded = _record(deployed_copy(model), call)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"the deployed copy of {type(model).__name__} does not run: {first_line(error)}") from error
    common = [name for name in recorded if name in nodes]
    if not common:
        return []
    outputs = {name: nodes[name].output[0] for name in common}
    mine = type(proto)()
    mine.CopyFrom(proto)
    del mine.graph.output[:]
    session = open_session(path, optimized=False, model=mine, extra_outputs=list(dict.fromkeys(outputs.values())))
    results = run_session(session, feed)
    found: list[TensorDifference] = []
    for name in common:
        expected, actual = recorded[name], results[outputs[name]]
        if expected.size == actual.size and expected.shape[-1:] == actual.shape[-1:]:
            # In the file layers over a sequence work on its rows.
            expected = expected.reshape(actual.shape)
        if expected.shape != actual.shape:
            continue
        gap = np.abs(expected.astype(np.int64) - actual.astype(np.int64))
        found.append(
            TensorDifference(
                name,
                steps=float(gap.max(initial=0)),
                share=float(np.mean(gap > 0)) if gap.size else 0.0,
                diverges=bool(gap.size) and float(np.mean(gap > 1)) > DIVERGED,
            )
        )
    return found


def _record(deployed: nn.Module, call: Call) -> dict[str, np.ndarray]:
    """{"<layer>/QuantizeLinear": integers} of one run in eager; the k-th of one layer ends in "_k", as in the file."""
    recorded: dict[str, np.ndarray] = {}
    count: dict[str, int] = defaultdict(int)

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if func.name() == QUANTIZE_DEQUANTIZE:
                layer = inside[-1] if inside else ""
                name = f"{layer}/QuantizeLinear" if layer else "QuantizeLinear"
                count[name] += 1
                integers = (result / args[1]).round() + args[2].to(result.dtype)
                recorded[name if count[name] == 1 else f"{name}_{count[name]}"] = integers.to(torch.int32).numpy()
            return result

    args, kwargs = call.arguments([tensor.detach().cpu() for tensor in call.inputs.values()])
    with _module_stack(deployed) as inside, torch.random.fork_rng(devices=[]), torch.no_grad(), cast(Any, Recorder)():
        deployed(*args, **kwargs)
    return recorded


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward is running, outermost first."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _module, _args, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda _module, _args, _output: stack.pop() and None))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()
