"""A trained model -> one checked ONNX file."""

from __future__ import annotations

import json
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError, ExportError, SparsifyError, SparsifyWarning, first_line
from sparsify.model.adapters import has_adapters, merged_copy
from sparsify.model.at_work import runs_on
from sparsify.model.signature import InputsLike, SampleInputs, check_module, named_outputs
from sparsify.model.wrappers import clean_name, unwrapped
from sparsify.onnx.exported import ExportedModel, bytes_text, exported_model
from sparsify.onnx.exporter import exact_constants, kept_registry, missing_translations
from sparsify.onnx.free_axes import BATCH, at_another_size, check_free, checked_axes
from sparsify.onnx.model_files import MOST_BYTES
from sparsify.onnx.names import checked_output_names, name_values, with_input_names
from sparsify.onnx.runtime import FILE_WEIGHTS, PRODUCER
from sparsify.onnx.written_values import compare_written
from sparsify.output.files import replacing
from sparsify.quantization import qdq_ops
from sparsify.quantization.deployment import opsets
from sparsify.quantization.plan import is_quantized, unquantized

if TYPE_CHECKING:
    from onnx import ModelProto

    from sparsify.onnx.importing import ImportedModel

__all__ = ["export_onnx", "floating_layers"]

DEFAULT_OPSET = 20
"""Opset that the exporter writes without converting versions, and that most runtimes in use can read."""
OPSETS = range(18, 24)


def export_onnx(
    model: nn.Module,
    sample_inputs: InputsLike,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    packed: bool = False,
) -> ExportedModel:
    """Writes `model`, in eval mode, to one ONNX file at `path`, and says what is in it.

    Quantized layers are written as onnxruntime computes them in integers: int8 weights, int32 biases, BatchNorm folded;
    pruned weights are exact zeros there. Adapters of peft are merged into their layers, unless these are quantized. The
    model is not touched: its mode, device and weights stay as they are.

    Args:
        model: plain, pruned or quantized; wrapped in DistributedDataParallel or torch.compile, too.
        sample_inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments. Their sizes become those of
            the file, but for the batch and `dynamic_axes`. Arguments that are no tensors become constants of the file.
        path: replaced at once when everything went well; on an error what was there stays.
        opset: 18 to 23; None is 20, which the exporter writes without version conversion, and 21 where weights alone
            have four bits or scales of blocks: they are stored as int4 from there on, two in a byte.
        dynamic_batch: axis 0 of the first input, and of the others of that length, may be of any length when the file
            runs; False fixes it.
        dynamic_axes: further axes of any size, by input and axis: {"input_ids": {1: "length"}, "attention_mask": {1:
            "length"}}, or {"x": {2: "height", 3: "width"}}. Axes of one name are of one size, 2 or more in the samples.
            The file is compared with the model at a second size as well.
        input_names, output_names: instead of the names of the parameters of `forward` and of the keys of the output
            ("output" for a tensor, "output_0", "output_1", ... for a tuple).
        packed: True stores zeros and palettes as such, as `pack_onnx` does: the file is smaller, computes the same in
            the same time, and takes longer to load.

    Raises:
        ExportError: the model cannot be exported (the message says where), is larger than 1.8 GiB, or the file would
            not compute what the model computes: both run on the sample, on zeros, on small and on large values.
        ArgumentError: inputs or names that do not fit, an opset that is not supported.
        DataFileError: `path` cannot be written; raised before the work starts.
    """
    check_module(model)
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"path={path!r}: give the path of a file.")
    for run in runs_on(unwrapped(model)):
        run.look("export_onnx()")
    model = without_adapters(unwrapped(model))
    least, best = opsets(model)
    opset = max(DEFAULT_OPSET, best) if opset is None else opset
    if isinstance(opset, bool) or not isinstance(opset, int) or opset not in OPSETS:
        raise ArgumentError(
            f"opset={opset!r}: give one of {OPSETS.start} to {OPSETS.stop - 1}, or None for {DEFAULT_OPSET}."
        )
    if opset < least:
        raise ExportError(
            f"{type(model).__name__} has weights with a scale for each block, which ONNX can say from opset {least} "
            f"on; pass opset={least} instead of {opset}, or train with strategy: channel."
        )
    call = SampleInputs.of(model, sample_inputs)
    if input_names is not None:
        call = with_input_names(call, input_names)
    axes = checked_axes(call, dynamic_axes, batch=dynamic_batch)
    # The temporary file is there before the work starts: a path that cannot be written costs nobody a minute.
    from sparsify.onnx.importing import ImportedModel

    with replacing(path) as temporary:
        if isinstance(model, ImportedModel):
            if axes:
                raise ArgumentError("dynamic_axes: the model was read from an ONNX file, whose axes stay as they are.")
            proto = _given_proto(model, call)
            opset = next(each.version for each in proto.opset_import if each.domain in ("", "ai.onnx"))
        else:
            proto = _model_proto(model, call, opset, dynamic_batch, axes, output_names)
        content = proto.SerializeToString()
        temporary.write_bytes(content)
        size, plain_bytes = len(content), None
        if packed:
            from sparsify.onnx.packing import pack_onnx

            names = [value.name for value in proto.graph.input]
            arrays = [tensor.detach().cpu().numpy() for tensor in call.inputs.values()]
            found = pack_onnx(temporary, temporary, inputs=dict(zip(names, arrays, strict=True)))
            size, plain_bytes = found.size_bytes, found.plain_bytes
    return exported_model(Path(path), proto, opset, size, unquantized(model), plain_bytes)


def without_adapters(model: nn.Module, *, say: bool = True) -> nn.Module:
    """A copy of `model` with the adapters of peft merged into their layers, where it has any; zeros of weights that
    they fill are said. A quantized model was trained with adapters beside its integers, and keeps them.

    Raises:
        ExportError: the adapters cannot be merged.
    """
    if not has_adapters(model) or is_quantized(model):
        return model
    merged, filled = merged_copy(model)
    if filled and say:
        weights = {name: parameter.numel() for name, parameter in merged.named_parameters()}
        first = ", ".join(
            f"{name!r} from {before / weights[name]:.1%} to {after / weights[name]:.1%}"
            for name, (before, after) in list(filled.items())[:3]
        )
        total = sum(weights[name] for name in filled)
        now, then = (sum(counts[i] for counts in filled.values()) / total for i in (0, 1))
        warnings.warn(
            f"merging the adapters fills zeros of {len(filled)} pruned weight{'s' if len(filled) > 1 else ''}, from "
            f"{now:.1%} to {then:.1%} together: {first}{', ...' if len(filled) > 3 else ''}. To keep the sparsity, "
            "merge first and prune what comes back (model.merge_and_unload().requires_grad_(True)), or leave pruned "
            "layers out of target_modules.",
            SparsifyWarning,
            stacklevel=3,
        )
    return merged


def floating_layers(model: nn.Module) -> dict[str, str]:
    """Layers and operations of a quantized `model` that stay in float, by name, each with the reason why.

    Empty where everything is quantized, and for a model that is not quantized at all.
    """
    return unquantized(unwrapped(model))


def _model_proto(
    model: nn.Module,
    call: SampleInputs,
    opset: int,
    dynamic_batch: bool,
    axes: Mapping[str, Mapping[int, str]],
    output_names: Sequence[str] | None,
) -> ModelProto:
    """The checked model."""
    import onnx

    from sparsify.onnx import (
        rewrite_equal_tensors,
        rewrite_float_layers,
        rewrite_recurrent,
        rewrite_weight_only,
        rewrites,
    )

    name = type(model).__name__
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise ExportError(
            f"{name} has weights in bfloat16, for which onnxruntime has no kernels on the CPU; "
            "export copy.deepcopy(model).float()."
        )
    odd = next((p.dtype for p in model.parameters() if p.dtype in (torch.float16, torch.float64)), None)
    if odd is not None and is_quantized(model):
        raise ExportError(
            f"{name} is quantized and has weights in {str(odd).removeprefix('torch.')}; integers are written beside "
            "float32 alone: export copy.deepcopy(model).float()."
        )
    deployed = deployed_copy(model)
    batched, tensors = _batched(call) if dynamic_batch else ([], list(call.inputs.values()))
    adapter = _Adapter(deployed, call).eval()
    tensors = [tensor.detach().cpu() for tensor in tensors]
    free = {key: {**({0: BATCH} if key in batched else {}), **axes.get(key, {})} for key in call.inputs}
    dynamic = tuple(dict.fromkeys(free[key], torch.export.Dim.DYNAMIC) or None for key in call.inputs)
    with _quiet_loggers(), torch.no_grad():
        try:
            program = torch.export.export(adapter, tuple(tensors), strict=False, dynamic_shapes=(dynamic,))
        except SparsifyError:
            raise
        except Exception as error:
            raise ExportError(
                _why_not_traced(
                    name, error, bool(batched), sorted({axis for entry in axes.values() for axis in entry.values()})
                )
            ) from error
        try:
            with kept_registry(), exact_constants():
                exported = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=opset,
                    custom_translation_table={**missing_translations(opset), **qdq_ops.translations(opset)},
                    verbose=False,
                )
        except Exception as error:
            raise ExportError(_why_not_translated(name, error)) from error
    if exported is None:
        raise ExportError(f"{name}: torch.onnx.export gave nothing back.")
    for other in adapter.returned.others:
        warnings.warn(
            f"{name} also returns {other}, which an ONNX file cannot hold; it is left out.",
            SparsifyWarning,
            stacklevel=4,
        )
    proto: ModelProto = exported.model_proto
    written = next((entry.version for entry in proto.opset_import if entry.domain == ""), None)
    if written != opset:
        raise ExportError(f"{name} could only be written at opset {written}, not {opset}; pass opset={written}.")
    name_values(proto, call, checked_output_names(name, adapter.returned.names, call, output_names))
    rewrites.rewrite(proto)
    rewrite_weight_only.fuse(proto)
    rewrite_recurrent.store_recurrent_weights(proto)
    rewrite_float_layers.keep_float_layers(proto)
    rewrites.unique_names(proto)
    rewrite_equal_tensors.share_equal_tensors(proto, _own_weights(deployed))
    rewrites.name_dimensions(proto, free)
    check_free(name, proto, free)
    _note_weights(proto, deployed)
    proto.producer_name = PRODUCER
    proto.producer_version = ""
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        raise ExportError(
            f"{name} was exported, but the file does not pass onnx's checker: {first_line(error)}"
        ) from error
    compare_written(adapter, proto, tensors, [key in batched for key in call.inputs])
    if axes:
        resized = at_another_size(adapter, dict(zip(call.inputs, tensors, strict=True)), axes)
        compare_written(adapter, proto, list(resized.values()), [key in batched for key in call.inputs])
    return proto


def _given_proto(model: ImportedModel, call: SampleInputs) -> ModelProto:
    """The checked model of a graph that was imported: with all that it had, and the weights and integers of now."""
    import onnx

    from sparsify.onnx import rewrite_equal_tensors, rewrite_float_layers, rewrite_weight_only, rewrites
    from sparsify.onnx.writing import written_graph

    deployed = deployed_copy(model)
    tensors = [tensor.detach().cpu() for tensor in call.inputs.values()]
    args, kwargs = call.arguments(tensors)
    inputs = model.inputs_of(args, kwargs)
    proto = written_graph(cast("ImportedModel", deployed), inputs)
    if is_quantized(model):
        rewrites.rewrite_graph(proto)
        rewrite_weight_only.fuse(proto)
        rewrite_float_layers.keep_float_layers(proto)
        rewrites.unique_names(proto)
        rewrite_equal_tensors.share_equal_tensors(proto, set())
    try:
        onnx.checker.check_model(proto, full_check=False)
    except Exception as error:
        raise ExportError(f"what was made of the file does not pass onnx's checker: {first_line(error)}") from error
    order = [
        tensors[list(call.inputs).index(name)] if name in call.inputs else inputs[name] for name in model.given.inputs
    ]
    compare_written(_Ordered(cast("ImportedModel", deployed)), proto, order, [False] * len(order))
    return proto


class _Ordered(nn.Module):
    """An imported graph as a function of its inputs in a row, which returns its outputs in a row."""

    def __init__(self, model: ImportedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(*tensors)
        return tuple(outputs.values()) if isinstance(outputs, dict) else (outputs,)


def deployed_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, that computes what the file computes.

    Raises:
        ExportError: the model cannot be copied, or is too large for a file.
    """
    from sparsify.quantization.deployment import deployment_copy

    name = type(model).__name__
    try:
        deployed = deployment_copy(model)
        size = sum(tensor.numel() * tensor.element_size() for tensor in [*deployed.parameters(), *deployed.buffers()])
        if size > MOST_BYTES:
            raise ExportError(
                f"{name} has {bytes_text(size)} of weights; one ONNX file holds {bytes_text(MOST_BYTES)}."
            )
        return deployed.cpu().eval()
    except SparsifyError:
        raise
    except Exception as error:
        raise ExportError(f"{name} cannot be copied for export: {first_line(error)}") from error


@dataclass
class _Returned:
    """Outputs that the model was seen to return. An object: lists and dicts on a module are put back after tracing."""

    names: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


class _Adapter(nn.Module):
    """The model as a function of its tensors in a row, which returns its tensors in a row."""

    def __init__(self, model: nn.Module, call: SampleInputs) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.returned = _Returned()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        args, kwargs = self.call.arguments(tensors)
        named, others = named_outputs(self.model(*args, **kwargs))
        if not named:
            raise ExportError(
                f"{type(self.model).__name__} returns no tensor{': ' if others else ''}{', '.join(others)}."
            )
        self.returned.names, self.returned.others = list(named), others
        inputs = {id(tensor) for tensor in tensors}
        seen: set[int] = set()
        result: list[Tensor] = []
        for tensor in named.values():
            # A file gives each output its own name: an input handed through, or one tensor under two keys, is copied.
            result.append(tensor.clone() if id(tensor) in seen | inputs else tensor)
            seen.add(id(tensor))
        return tuple(result)


def _batched(call: SampleInputs) -> tuple[list[str], list[Tensor]]:
    """The inputs that have the batch on axis 0, and all inputs with at least two items in it.

    torch.export takes the length 1 for a constant (https://github.com/pytorch/pytorch/issues/151582, seen in torch
    2.13.0); the items are repeated then. Needless once it keeps a dynamic axis of one item.
    """
    length = next((tensor.shape[0] for tensor in call.inputs.values() if tensor.dim()), None)
    if length is None:
        return [], list(call.inputs.values())
    if length == 0:
        raise ArgumentError("sample_inputs are an empty batch; give at least one item.")
    batched = [name for name, tensor in call.inputs.items() if tensor.dim() and tensor.shape[0] == length]
    tensors = [
        torch.cat([tensor, tensor]) if length == 1 and name in batched else tensor
        for name, tensor in call.inputs.items()
    ]
    return batched, tensors


def _own_weights(model: nn.Module) -> set[str]:
    """Names of parameters, and of what stands for them in integers: "<parameter>_int8", "<parameter>_scale"."""
    own = {name for name, _ in model.named_parameters()}
    return own | {name for name, _ in model.named_buffers() if re.search(r"(weight|bias)\w*_(u?int\d+|scale)$", name)}


def _note_weights(proto: ModelProto, model: nn.Module) -> None:
    """Writes into the file what the weights are called in torch, where they bear another name: tied, or transposed."""
    from onnx import TensorProto, numpy_helper

    from sparsify.quantization.attention import Projection

    first = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    names = {name: first[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    for path, module in model.named_modules():
        if isinstance(module, Projection) and module.weight is module.parameter:
            names.update({f"{path}.weight_{kind}": first[id(module.parameter)] for kind in ("int8", "uint8")})
    noted: dict[str, str] = {}
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            noted[tensor.name] = names[tensor.name]
        elif len(tensor.dims) > 1 and tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE):
            shape, values = list(tensor.dims), None
            for name, parameter in model.named_parameters():
                if shape in (list(parameter.shape), list(parameter.shape)[::-1]):
                    values = numpy_helper.to_array(tensor) if values is None else values
                    own = parameter.detach().numpy()
                    if any(_equal(values, form) for form in (own, own.T)):
                        noted[tensor.name] = clean_name(name)
                        break
    noted = {initializer: name for initializer, name in noted.items() if initializer != name}
    if noted:
        proto.metadata_props.add(key=FILE_WEIGHTS, value=json.dumps(noted))


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """As array_equal. The first slice tells nearly all weights of one shape apart, and large models have hundreds."""
    return one.shape == other.shape and np.array_equal(one[:1], other[:1]) and np.array_equal(one, other)


def _why_not_traced(name: str, error: Exception, dynamic: bool, axes: Sequence[str]) -> str:
    text = first_line(error)
    place = _place(error)
    message = f"{name} cannot be traced{f' ({place})' if place else ''}: {type(error).__name__}: {text}"
    constrained = any(word in str(error) for word in ("Constraints violated", "specializ", "ConstraintViolation"))
    if axes and constrained:
        return f"{message} Its forward fixes the size of {', '.join(axes)}; leave it out of dynamic_axes."
    if dynamic and constrained:
        return f"{message} Its forward fixes the batch size; use x.shape[0] there, or pass dynamic_batch=False."
    return f"{message} Move Python control flow that depends on values out of forward, or export a part of the model."


def _why_not_translated(name: str, error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(error)
    # The exporter's text names the node and, further down, the line of the user's forward.
    where = re.search(r'File "([^"]+)", line (\d+), in (\w+)', text[text.find("stack trace") :])
    place = f" ({Path(where[1]).name}:{where[2]}, in {where[3]})" if where else ""
    return f"{name} cannot be written as ONNX{place}: {first_line(cause)}"


def _place(error: BaseException) -> str:
    """The innermost line of a traceback that is neither torch's nor sparsify's: "file.py:12, in forward"."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith(own) and not frame.filename.startswith("<"):
            return f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}"
    where = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(error))
    outside = [hit for hit in where if not hit[0].startswith(own)]
    return f"{Path(outside[-1][0]).name}:{outside[-1][1]}, in {outside[-1][2]}" if outside else ""


@contextmanager
def _quiet_loggers() -> Iterator[None]:
    """The exporters' own warnings and log lines are about their insides; what the user must know is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
