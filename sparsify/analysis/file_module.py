"""An ONNX file as a torch module whose weights are parameters: what profiles and recipes are made of works on files."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsify.analysis.layers import LayerInfo, ModelAnalysis
from sparsify.analysis.onnx_layers import FileLayer, analyze_file, file_layers, inlined
from sparsify.errors import ArgumentError, StateError
from sparsify.model.signature import check_module
from sparsify.model.wrappers import clean_name
from sparsify.onnx.file_inputs import file_inputs, input_sizes, samples_by_name
from sparsify.onnx.runtime import PRODUCER, SessionSettings, read_model, run_session, start_session

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto
    from onnxruntime import InferenceSession

__all__: list[str] = []

RECURRENT = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")
PACKED = "a file holds the weights of a recurrent layer packed, under no name of torch; give the torch model"
_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED_CONVS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@dataclasses.dataclass(frozen=True)
class _Fed:
    """A stored tensor that a parameter stands for."""

    value: str
    parameter: nn.Parameter
    transposed: bool
    dtype: np.dtype[Any]


class FileModule(nn.Module):
    """A module that runs an ONNX file in onnxruntime, with its weights as parameters that can be changed.

    The parameters have the names that `analyze_model` gives the weights of the file, and lie in layers of torch's
    types, so that what chooses by names and types finds them. There are no gradients.

    Args:
        path: of the file.

    Attributes:
        path: of the file. foreign: True where `export_onnx` did not write it: its weights bear its own names then.

    Raises:
        DataError, ExportError: as `analyze_model`. StateError: its weights are integers already.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        from onnx import numpy_helper

        self.path = Path(path)
        self._proto = inlined(read_model(path))
        self.foreign = self._proto.producer_name != PRODUCER
        self.layers = file_layers(path, self._proto)
        integer = [layer.info for layer in self.layers if layer.info.weight and layer.info.bits <= 8]
        if integer:
            raise StateError(
                f"{self.path}: {integer[0].weight!r} holds integers of {integer[0].bits} bits; give the float file."
            )
        self._inputs = file_inputs(self._proto)
        self._fed: list[_Fed] = []
        self._session: InferenceSession | None = None
        held: dict[str, nn.Parameter] = {}
        for layer in self.layers:
            if layer.info.weight is not None and layer.stored is not None:
                self._hold(layer, clean_name(layer.info.weight), held)

        for tensor in self._proto.graph.initializer:
            if tensor.name.endswith(".bias") and tensor.data_type == tensor.FLOAT:
                path, _, own = clean_name(tensor.name).rpartition(".")
                bias = torch.from_numpy(numpy_helper.to_array(tensor, str(self.path.resolve().parent)).copy())
                self._place(path, own, None, nn.Parameter(bias))

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._run(args, kwargs)

        # Batches are matched with inputs by it; names that are no words of Python are matched by place.
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [name for name in self._inputs if name.isidentifier()]
        if len(names) == len(self._inputs):
            forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        self.forward = forward

    def _hold(self, layer: FileLayer, name: str, held: dict[str, nn.Parameter]) -> None:
        stored = layer.stored
        assert stored is not None
        values = stored.values
        if name not in held:
            wide = values if values.dtype.kind == "f" and values.dtype.itemsize > 1 else values.astype("float32")
            tensor = torch.from_numpy(wide.copy())
            held[name] = nn.Parameter(tensor.T.contiguous() if layer.transposed else tensor)
            path, _, own = name.rpartition(".")
            made = _layer_of(layer, held[name], own)
            fits = own == "weight" or isinstance(made, nn.MultiheadAttention)
            self._place(path, own, made if fits else None, held[name])
            if made is not None and not fits:
                # No layer of torch has a parameter of this name: it is tied to the weight of one.
                made._parameters["weight"] = held[name]
                self._modules[layer.info.name] = made
        shape = tuple(held[name].shape)
        transposed = layer.transposed and len(shape) == 2
        expected = shape[::-1] if transposed else shape
        if all(one.value != stored.name for one in self._fed) and expected == values.shape:
            self._fed.append(_Fed(stored.name, held[name], transposed, values.dtype))

    def _place(self, path: str, own: str, layer: nn.Module | None, parameter: nn.Parameter) -> None:
        """Puts a parameter where its name says; past add_module, which refuses names that files may have."""
        module: nn.Module = self
        parts = path.split(".") if path else []
        for i, part in enumerate(parts):
            child = module._modules.get(part)
            if child is None:
                child = layer if layer is not None and i == len(parts) - 1 else nn.Module()
                module._modules[part] = child
            module = child
        module._parameters[own] = parameter

    def _run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        names = list(self._inputs)
        if len(args) > len(names):
            raise ArgumentError(f"{self.path}: {len(args)} inputs; it takes {', '.join(names)}.")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        feed = samples_by_name(self._inputs, given, self.path)
        if missing := [name for name in names if name not in feed]:
            raise ArgumentError(f"{self.path}: no input {missing[0]!r}; it takes {', '.join(names)}.")
        input_sizes(self._inputs, {name: value.shape for name, value in feed.items()}, 1, self.path, ask=True)
        for one in self._fed:
            values = one.parameter.detach()
            array = (values.T if one.transposed else values).contiguous().cpu().numpy()
            feed[one.value] = array.astype(one.dtype, copy=False)
        if self._session is None:
            self._session = _session_with_inputs(self.path, self._proto, self._fed)
        outputs = run_session(self._session, feed).items()
        found = {name: torch.from_numpy(value) for name, value in outputs if _is_numeric(value)}
        return next(iter(found.values())) if len(found) == 1 else found

    @property
    def note(self) -> str:
        """A sentence on the names in a recipe that is made of a foreign file."""
        return f"names are those of initializers in {self.path.name}, which another program wrote."

    def analysis(self, sample_inputs: Any = None) -> ModelAnalysis:
        """The analysis of the file, with the names that parameters have here; no MACs where there are no inputs."""
        if sample_inputs is None:
            infos = [dataclasses.replace(layer.info, macs=0) for layer in self.layers]
            whole = ModelAnalysis(self.path.name, tuple(infos), (), sum(p.numel() for p in self.parameters()), 0)
        else:
            whole = analyze_file(self.path, sample_inputs)
        return dataclasses.replace(whole, layers=tuple(map(_cleaned, whole.layers)))


def _cleaned(info: LayerInfo) -> LayerInfo:
    packed = PACKED if info.type.rpartition("::")[2] in RECURRENT else ""
    return dataclasses.replace(
        info,
        weight=None if info.weight is None else clean_name(info.weight),
        why_not_prunable=info.why_not_prunable or packed,
    )


def _layer_of(layer: FileLayer, weight: Tensor, own: str) -> nn.Module | None:
    """A layer of torch for a weight, without one of its own; None where it has no other name there."""
    kind, rank, groups = layer.info.type.rpartition("::")[2], weight.dim() - 2, layer.info.groups
    if kind in RECURRENT:
        return None
    if "proj_weight" in own:
        # Without its parameters: those that the file has are put in.
        attention = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        nn.Module.__init__(attention)
        return attention
    convs = _TRANSPOSED_CONVS if kind == "ConvTranspose" else _CONVS
    if "Conv" in kind and rank in convs:
        first, second = weight.shape[:2]
        into, out = (first, second * groups) if kind == "ConvTranspose" else (second * groups, first)
        kernel: Any = tuple(weight.shape[2:])
        made: nn.Module = convs[rank](into, out, kernel, groups=groups, bias=False, device="meta")
    elif kind == "Gather" and rank == 0:
        made = nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    elif rank == 0:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        return None
    return made


def _is_numeric(value: object) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and dtype.kind in "fiub"


def _session_with_inputs(path: Path, proto: ModelProto, fed: Sequence[_Fed]) -> InferenceSession:
    """A session of a file in which these stored tensors are inputs."""
    from onnx import helper

    from sparsify.onnx.graph import with_inner_graphs

    changed = type(proto)()
    changed.CopyFrom(proto)
    names = {one.value: one for one in fed}
    for graph in with_inner_graphs(changed):
        for i in reversed(range(len(graph.initializer))):
            if graph.initializer[i].name in names:
                del graph.initializer[i]
        for i in reversed(range(len(graph.node))):
            node = graph.node[i]
            if node.op_type == "Constant" and node.output[0] in names:
                del graph.node[i]
        if graph is not changed.graph:
            for i in reversed(range(len(graph.input))):
                if graph.input[i].name in names:
                    del graph.input[i]
    taken = {value.name for value in changed.graph.input}
    for name, one in names.items():
        if name not in taken:
            shape = list(one.parameter.shape)
            kind = helper.np_dtype_to_tensor_dtype(one.dtype)
            changed.graph.input.append(
                helper.make_tensor_value_info(name, kind, shape[::-1] if one.transposed else shape)
            )
    return start_session(changed, SessionSettings(threads=None), path=path, changed=True)


def module_or_file(model: object, where: str = "") -> nn.Module:
    """The module, or that of an ONNX file where a path is given.

    Raises:
        ArgumentError: it is neither. DataError, StateError: as `FileModule`.
    """
    if isinstance(model, str | os.PathLike):
        return FileModule(model)
    return check_module(model, where, other=", or the path of an ONNX file")


def refuse_file(model: nn.Module, what: str) -> None:
    """Refuses the module of a file for what needs its code, or gradients."""
    if isinstance(model, FileModule):
        raise ArgumentError(f"{what} needs the torch model: {model.path} has neither a forward to trace nor gradients.")
