"""Checks that an exported file computes what the model computes: torch against onnxruntime, output by output."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify.errors import ArgumentError, ExportError, first_line
from sparsify.model.batches import sample_count
from sparsify.model.copies import deep_copied
from sparsify.model.preserved import preserved_rng
from sparsify.model.signature import InputsLike, SampleInputs, check_module, named_outputs
from sparsify.model.wrappers import unwrapped
from sparsify.onnx.export import deployed_copy, without_adapters
from sparsify.onnx.own_process import check_survival
from sparsify.onnx.runtime import open_session, read_model, run_session
from sparsify.output.tables import DisplayedText
from sparsify.quantization.qdq_ops import QUANTIZE_DEQUANTIZE

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

    from sparsify.onnx.fusion import Unfused
    from sparsify.onnx.ties import ScoreOrder
    from sparsify.onnx.verify_kernels import Proof, TensorDifference

__all__ = ["verify_onnx"]

OUTPUT_TOLERANCE = 1e-4
"""The largest difference of an output, as a fraction of its largest value. Of a quantized model: between each side and
what the reference makes of the integers that this side has."""
HALF_TOLERANCE = 0.01
"""Likewise, where weights are stored in float16."""
UNPROVEN_TOLERANCE = 0.05
"""Where the reference cannot run a quantized model: the root mean square of the difference, as a fraction of that of
the output."""
UNPROVEN_STEPS = 4
"""Likewise, of an output that is quantized itself: quantization steps."""


@dataclass(frozen=True)
class Difference:
    """One output: torch (the model in eval mode) against onnxruntime."""

    output: str
    optimized: bool
    """True if onnxruntime's graph optimizations were on."""
    max_abs: float
    relative: float
    """max_abs / the largest absolute value in torch."""
    rms: float
    """Root mean square of the difference / that of the output in torch."""
    share: float
    """The fraction of values that differ by more than 1e-5 of the largest."""
    step: float | None
    """The scale of the output where it is quantized itself."""
    local: float | None
    """Kernel by kernel: how far either side is from what the reference makes of its integers, as `relative`."""
    ok: bool
    tied: int = 0
    """Places of equal scores behind a top-k or a sort, which were compared as sets: their order is nobody's."""
    cut: int = 0
    """Those of them at the end of a top-k that leaves out others of the same score: not compared."""

    @property
    def steps(self) -> float | None:
        """The largest difference in quantization steps."""
        return None if self.step is None else self.max_abs / self.step


@dataclass(frozen=True)
class Verification(DisplayedText):
    """Findings of `verify_onnx`. True where `ok`."""

    path: Path
    quantized: bool
    tolerance: float
    outputs: tuple[Difference, ...]
    tensors: tuple[TensorDifference, ...]
    """In the order of computation; empty for a float model."""
    unfused: tuple[Unfused, ...]
    """Operators next to quantized values that onnxruntime runs in float, and why."""
    exact: bool
    """The reference, from the inputs to the outputs, equals onnxruntime with optimizations in every bit."""
    unproven: str | None
    """Why the reference could not run the file; outputs are then compared with a tolerance."""
    stock: float | None = None
    """The largest difference between the outputs of a session without `session.x64quantprecision` and those that were
    checked, as a fraction of the largest value; None where it is within the tolerance of a float file. `ok` does not
    depend on it: the file is right, and the CPU saturates."""
    parted: tuple[str, str] | None = None
    """Where an output differs and no tensor before it: (the operator that makes it, of what)."""

    @property
    def ok(self) -> bool:
        """Every output within its tolerance, and no tensor that diverges."""
        return all(output.ok for output in self.outputs) and not any(tensor.diverges for tensor in self.tensors)

    @property
    def exit_code(self) -> int:
        """0 where `ok`, else 1."""
        return 0 if self.ok else 1

    @property
    def first_divergence(self) -> str | None:
        """The first tensor that one kernel makes otherwise than the reference, or what makes an output that differs;
        None where there is none."""
        found = next((tensor.name for tensor in self.tensors if tensor.diverges), None)
        return found if found is not None or self.parted is None else self.parted[0]

    @property
    def why(self) -> str | None:
        """Why that one diverges, in words."""
        found = next((tensor.why for tensor in self.tensors if tensor.diverges), None)
        return found if found is not None or self.parted is None else self.parted[1]

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        what = "root mean square of the difference" if self.unproven else "largest difference"
        how_far = ", kernel by kernel," if self.quantized and not self.unproven else ""
        width = max(6, *(len(output.output) for output in self.outputs))
        lines = [
            f"{self.path}: {'agrees' if self.ok else 'DIFFERS'} ({what}{how_far} <= {self.tolerance:g} of the output)",
            f"{'output':{width}}  onnxruntime    max abs   relative        rms  differing  steps",
        ]
        for output in self.outputs:
            how = "optimized" if output.optimized else "as written"
            steps = "-" if output.steps is None else f"{output.steps:.1f}"
            figures = f"{output.max_abs:9.3g}  {output.relative:9.3g}  {output.rms:9.3g}  {output.share:9.2%}"
            lines.append(f"{output.output:{width}}  {how:11}  {figures}  {steps:>5}{'' if output.ok else '  <--'}")
        for output in self.outputs:
            if output.tied and output.optimized:
                left = f"; {output.cut} at the end, where others have the same score, were not" if output.cut else ""
                lines.append(f"{output.output}: {output.tied} places of equal scores were compared as sets{left}")
        if self.unproven:
            lines.append(f"not proven kernel by kernel: {self.unproven}")
        if self.tensors:
            lines += self._proof()
        if self.stock is not None:
            lines.append(
                "on this CPU sums of int8 products saturate in a session without session.x64quantprecision: outputs "
                f"differ by {self.stock:.2g} of the largest value; set it with add_session_config_entry("
                '"session.x64quantprecision", "1") of SessionOptions, or train with reduce_range'
            )
        lines += [f"  {each}" for each in self.unfused]
        return "\n".join(lines)

    def _proof(self) -> list[str]:
        integer = [tensor for tensor in self.tensors if tensor.exact]
        wrong = sum(1 for tensor in integer if tensor.optimized and tensor.optimized.count)
        whole = "and so is the whole file" if self.exact else "from end to end it is not, as parts run in float"
        lines = [
            f"{len(self.tensors)} tensors compared with the integer reference, kernel by kernel: "
            f"{len(integer) - wrong} of {len(integer)} integer kernels of onnxruntime are exact, {whole}"
        ]
        for side, text in (("torch", "torch"), ("written", "as written"), ("optimized", "optimized")):
            gaps = [(gap, tensor) for tensor in self.tensors if (gap := getattr(tensor, side)) is not None]
            if gaps:
                gap, tensor = max(gaps, key=lambda pair: (pair[0].steps, pair[0].share))
                lines.append(f"  {text}: at most {gap.steps:.0f} steps, {gap.share:.2%} of the values ({tensor.name})")
        where = self.first_divergence
        lines.append(f"the first that diverges is {where}: {self.why}" if where else "none diverges")
        return lines


def verify_onnx(
    model: nn.Module, path: str | os.PathLike[str], inputs: InputsLike, *, tolerance: float | None = None
) -> Verification:
    """Runs `model` in torch and its file in onnxruntime, with optimizations off and on, and compares every output.

    A MatMul that reads floats and weights of integers is computed in float here; of its own choice onnxruntime rounds
    what it reads to int8 (0.7 % of the output): its option session.qdq_matmulnbits_accuracy_level = 1 leaves it alone.

    A quantized file is proven kernel by kernel: every quantized tensor of torch, of onnxruntime as the file is written
    and of onnxruntime with optimizations is compared with what exact integer arithmetic makes of that side's own
    inputs to the kernel. Integer kernels of onnxruntime have to be exact; torch and other computation in float may put
    values that lie on the edge one step aside, of a layer with weights 2 % at most. The run is on a copy; mode, device
    and buffers of `model` stay as they are.

    Sessions here have the option session.x64quantprecision = 1, without which sums of int8 products saturate on CPUs
    without VNNI. `stock` says how far a session without it is off on this CPU.

    Args:
        model: what was exported.
        path: its file.
        inputs: as `sample_inputs` of `export_onnx`, with any batch size that the file takes.
        tolerance: an output agrees where the largest difference is at most this fraction of the largest value (default
            1e-4; 0.01 in float16); in a quantized model the difference to the reference on the same integers. Of a
            file that the reference cannot run (`unproven` says why), the root mean square of the difference is held
            to this fraction (default 0.05), and a quantized output to 4 steps.

    Raises:
        ArgumentError: inputs that do not fit the model or the file, or a tolerance that is no positive number.
        DataFileError, DataError: the file is missing or broken.
        ExportError: a file that onnxruntime cannot run, or with other outputs than the model's; files in float16, and
            those that `export_onnx` did not write, are run in a process of their own before, so that one that crashes
            there is an ExportError too.
    """
    check_module(model)
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and 0 < tolerance < math.inf):
        raise ArgumentError(f"tolerance={tolerance!r}: give a positive number.")
    user_model = unwrapped(model)
    model = without_adapters(user_model, say=False)
    call = SampleInputs.of(model, inputs)
    if not sample_count(call.inputs):
        raise ArgumentError("inputs are an empty batch, on which nothing can be compared; give at least one item.")
    proto = read_model(path)
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node)
    steps = _output_steps(proto)
    # Not the merged copy: merging is part of what is checked.
    expected = _eager(user_model, call)
    feed = _input_arrays(proto, call, Path(path))
    check_survival(proto, path, feed)
    plain = open_session(path, optimized=False, model=proto)
    names = [value.name for value in plain.get_outputs()]
    if len(names) != len(expected):
        raise ExportError(
            f"{Path(path)} has the outputs {', '.join(names)}; {type(model).__name__} returns {', '.join(expected)}."
        )
    results = {False: run_session(plain, feed)}
    results[True] = run_session(open_session(path, optimized=True, model=proto, float_inputs=True), feed)
    for name, values in zip(names, expected.values(), strict=True):
        if values.shape != results[False][name].shape:
            raise ExportError(
                f"output {name!r} has the shape {list(results[False][name].shape)} in onnxruntime and "
                f"{list(values.shape)} in torch; something in forward was fixed to the sample inputs."
            )
    from sparsify.onnx.ties import rankings
    from sparsify.onnx.verify_kernels import computed_as_written, prove

    behind = rankings(proto)
    ranked = [name for each in behind.values() for name in (each.scores, each.best)]
    proof, unproven, stock = None, None, 0.0
    if quantized:
        others = run_session(open_session(path, optimized=True, model=proto, float_inputs=True, exact=False), feed)
        stock = max((_relative(results[True][name], others[name]) for name in names), default=0.0)
        recorded = _recorded(model, call)
        try:
            proof = prove(proto, path, feed, recorded, results[True], keep=ranked)
        except ExportError as error:
            unproven = str(error)
    limit = tolerance or (UNPROVEN_TOLERANCE if unproven else _float_tolerance(proto))
    scores = dict(feed)
    if behind:
        scores.update(
            proof.reference
            if proof
            else computed_as_written(proto, path, feed, [each for each in ranked if each not in feed])
        )
    found = [
        _difference(
            name,
            optimized,
            values,
            results[optimized][name],
            steps.get(name),
            limit,
            proof,
            quantized,
            behind.get(name),
            scores,
        )
        for name, values in zip(names, expected.values(), strict=True)
        for optimized in (False, True)
    ]
    wrong = next((output.output for output in found if not output.ok), None)
    return Verification(
        Path(path),
        quantized,
        limit,
        tuple(found),
        tensors=proof.tensors if proof else (),
        unfused=proof.unfused if proof else (),
        exact=proof is not None and all(_same_values(proof.reference[name], results[True][name]) for name in names),
        unproven=unproven,
        stock=stock if stock > _float_tolerance(proto) else None,
        parted=_parted(proto, wrong) if wrong is not None and proof is not None else None,
    )


def _parted(proto: ModelProto, output: str) -> tuple[str, str]:
    """(the operator that makes an output, of which quantized tensors and stored values it is made in float)."""
    from sparsify.onnx.graph import GraphView, all_inputs

    view = GraphView(proto.graph)
    node = view.producer.get(output)
    waiting, stored = [output], dict[str, None]()
    seen = {output}
    while waiting:
        made = view.producer.get(waiting.pop())
        for name in all_inputs(made) if made is not None and made.op_type != "QuantizeLinear" else ():
            if name in view.initializers and view.initializers[name].dims:
                stored[name] = None
            if name not in seen:
                seen.add(name)
                waiting.append(name)
    of = f" from {', '.join(list(stored)[:4])}" if stored else ""
    return (
        output if node is None else node.name or node.op_type,
        f"it makes the output {output!r}{of} in float, and torch makes another: was the model trained, or the file "
        "edited, after the export?",
    )


def _recorded(model: nn.Module, call: SampleInputs) -> dict[str, np.ndarray]:
    """The integers of every quantizer in the deployed copy."""
    try:
        return _record(deployed_copy(model), call)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"the deployed copy of {type(model).__name__} does not run: {first_line(error)}") from error


def _same_values(one: np.ndarray, other: np.ndarray) -> bool:
    import numpy as np

    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def _float_tolerance(proto: ModelProto) -> float:
    from onnx import TensorProto

    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in proto.graph.initializer)
    return HALF_TOLERANCE if half else OUTPUT_TOLERANCE


def _eager(model: nn.Module, call: SampleInputs) -> dict[str, np.ndarray]:
    """The outputs of a copy of `model` in eval mode, on its own device, with the RNG put back."""
    model = deep_copied(model).eval()
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    args, kwargs = call.arguments([tensor.detach().to(device) for tensor in call.inputs.values()])
    with preserved_rng(model), torch.no_grad():
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


def _input_arrays(proto: ModelProto, call: SampleInputs, path: Path) -> dict[str, np.ndarray]:
    """By name where the file has the names, by position where it has the same number of others."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    names = [value.name for value in proto.graph.input if value.name not in stored]
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
    tolerance: float,
    proof: Proof | None,
    quantized: bool,
    ranking: ScoreOrder | None,
    scores: Mapping[str, np.ndarray],
) -> Difference:
    import numpy as np

    from sparsify.onnx.ties import in_one_order

    places = cut = 0
    mine, theirs = expected, found
    if ranking is not None:
        local_scores = {**scores, **proof.local["torch"]} if proof else scores
        tied = in_one_order(expected, found, ranking, local_scores)
        expected, found, places, cut = tied.expected, tied.found, tied.places, tied.cut
    gap, largest = _apart(expected, found)
    finite = expected[np.isfinite(expected)].astype(np.float64)
    max_abs = float(gap.max(initial=0.0))
    relative = _checked_fraction(max_abs, largest)
    power = float(np.sqrt(np.mean(finite**2))) if finite.size else 0.0
    rms = _checked_fraction(float(np.sqrt(np.mean(gap**2))) if gap.size else 0.0, power)
    share = float(np.mean(gap > 1e-5 * largest)) if gap.size else 0.0
    local = None
    if proof is not None:
        local = 0.0
        for side, value in (("torch", mine), ("optimized" if optimized else "written", theirs)):
            made = proof.local[side].get(name, proof.reference[name])
            if ranking is not None:
                tied = in_one_order(made, value, ranking, {**scores, **proof.local[side]})
                made, value = tied.expected, tied.found
            local = max(local, _relative(made, value))
        ok = local <= tolerance
    elif quantized:
        within = share <= tolerance if found.dtype.kind in "iub" else rms <= tolerance
        ok = within and (step is None or max_abs <= (UNPROVEN_STEPS + 0.5) * step)
    else:
        ok = max_abs == 0 if found.dtype.kind in "iub" else relative <= tolerance
    return Difference(name, optimized, max_abs, relative, rms, share, step, local, ok, places, cut)


def _apart(expected: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, float]:
    """(absolute differences, the largest finite absolute value of `expected`)."""
    import numpy as np

    wide, other = expected.astype(np.float64), found.astype(np.float64)
    # Where both are the same infinity, or both NaN, nothing differs.
    same = (wide == other) | (np.isnan(wide) & np.isnan(other))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(wide - other))
    gap = np.where(np.isnan(gap), np.inf, gap)
    return gap, float(np.abs(wide[np.isfinite(wide)]).max(initial=0.0))


def _relative(expected: np.ndarray, found: np.ndarray) -> float:
    gap, largest = _apart(expected, found)
    return _checked_fraction(float(gap.max(initial=0.0)), largest)


def _checked_fraction(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if part == 0 else math.inf)


def _output_steps(proto: ModelProto) -> dict[str, float]:
    """{output: scale} of the outputs that come straight from a DequantizeLinear, through data movement at most."""
    from sparsify.onnx.graph import GraphView, only_moves

    view = GraphView(proto.graph)
    steps: dict[str, float] = {}
    for value in proto.graph.output:
        node = view.producer.get(view.origin(value.name, only_moves))
        if node is not None and node.op_type == "DequantizeLinear":
            scale = view.constant(node.input[1])
            if scale is not None and scale.ndim == 0:
                steps[value.name] = float(scale)
    return steps


def _record(deployed: nn.Module, call: SampleInputs) -> dict[str, np.ndarray]:
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
    with _module_stack(deployed) as inside, preserved_rng(deployed), torch.no_grad(), cast(Any, Recorder)():
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
