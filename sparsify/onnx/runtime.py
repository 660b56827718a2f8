"""ONNX files as onnxruntime runs them: opened safely, with what its optimizer made of them. Knows no torch.

Whatever a file holds, opening and running it gives a result or one of the typed errors of `errors.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import ArgumentError, DataError, DataFileError, ExportError, first_line

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, TensorProto
    from onnxruntime import InferenceSession, SessionOptions

__all__: list[str] = []

PRODUCER = "sparsify"
"""What `export_onnx` writes into a file as its producer."""
FILE_WEIGHTS = "sparsify.weights"
"""The key in a file's metadata under which stand, in JSON, {initializer: torch parameter} where the two differ."""
FILE_ELEMENTS = "sparsify.elements"
"""Likewise {initializer: count of its numbers in torch} where the file holds more, copies or zeros in between."""

EXACT_PRODUCTS = "session.x64quantprecision"
"""The session option with which onnxruntime adds int8 products exactly on CPUs without VNNI."""


def read_model(path: str | os.PathLike[str]) -> ModelProto:
    """The parsed and checked model in a file; the weights of a packed file stand in it as in the plain one.

    Raises:
        DataFileError: the file is missing or unreadable.
        DataError: it is not an ONNX model, or a broken one, or its weights lie in files outside its folder.
    """
    import onnx

    from sparsify.onnx.file_faults import check_stored
    from sparsify.onnx.rebuilt_weights import rebuild_weights

    file = _existing(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataFileError(f"cannot read {file}: {error.strerror or error}.") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:
        raise _broken(file, "it cannot be parsed") from error
    if not model.graph.node and not model.graph.output:
        raise _broken(file, "it holds no graph")
    try:
        external = check_stored(model, file)
    except DataError as error:
        raise _broken(file, str(error)) from error
    try:
        onnx.checker.check_model(_checkable(model, content, external))
    except Exception as error:
        raise _broken(file, first_line(error)) from error
    rebuild_weights(model, file.resolve().parent)
    return model


def _checkable(model: ModelProto, content: bytes, external: bool) -> bytes:
    """The content of a file for onnx's checker, which asks for a shape of every input and output.

    The format does not (https://onnx.ai/onnx/repo-docs/IR.html: a tensor without a shape may be of any rank), and
    onnxruntime 1.31.1 runs such files. Values in other files, which `check_stored` has seen, are left out.
    """
    from sparsify.onnx.rebuilt_weights import tensors_of

    values = [*model.graph.input, *model.graph.output]
    shaped = all(
        value.type.tensor_type.HasField("shape") for value in values if not value.type.HasField("sequence_type")
    )
    if shaped and not external:
        return content
    filled = type(model)()
    filled.CopyFrom(model)
    for value in [*filled.graph.input, *filled.graph.output]:
        kind = value.type.WhichOneof("value")
        if kind in (None, "tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.elem_type = value.type.tensor_type.elem_type or 1
            value.type.tensor_type.shape.SetInParent()
    for tensor in tensors_of(filled) if external else ():
        if tensor.data_location == tensor.EXTERNAL:
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            tensor.dims[:] = [0]
    return bytes(filled.SerializeToString())


@dataclass(frozen=True)
class SessionSettings:
    """Settings with which onnxruntime runs a model on the CPU."""

    optimized: bool = True
    """False runs the graph as it stands, node by node."""
    basic: bool = False
    """True only folds what is constant and drops what changes nothing; all operators stay standard ones."""
    threads: int | None = 1
    """None leaves the number to onnxruntime."""
    float_inputs: bool = False
    """True computes a MatMul whose weights alone are integers in float; by its own choice onnxruntime rounds its input
    to int8 at every call, which is faster and 0.7 % off (https://github.com/microsoft/onnxruntime/issues/29849, seen in
    1.31.1)."""
    exact: bool = True
    """False leaves out `EXACT_PRODUCTS`, as a session does that nobody sets options for."""
    optimized_path: Path | None = None
    """Where the graph is written that onnxruntime makes of the model."""
    profile_prefix: Path | None = None
    """Beginning of the profile's file name; None makes no profile."""
    entries: Mapping[str, str] = field(default_factory=dict)
    """Further entries of the session's configuration."""

    def options(self, *, exact: bool) -> SessionOptions:
        """Options that log nothing."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if self.optimized else level.ORT_DISABLE_ALL
        if self.basic:
            options.graph_optimization_level = level.ORT_ENABLE_BASIC
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
            options.inter_op_num_threads = 1
        if self.optimized_path is not None:
            options.optimized_model_filepath = os.fspath(self.optimized_path)
        if self.profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = os.fspath(self.profile_prefix)
        if exact:
            options.add_session_config_entry(EXACT_PRODUCTS, "1")
        if self.float_inputs:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        for key, value in self.entries.items():
            options.add_session_config_entry(key, value)
        # Fatal only: what goes wrong reaches the user as an exception, not as lines on stderr.
        options.log_severity_level = 4
        return options


def open_session(
    path: str | os.PathLike[str],
    *,
    optimized: bool = True,
    threads: int | None = 1,
    extra_outputs: list[str] | None = None,
    model: ModelProto | None = None,
    float_inputs: bool = False,
    exact: bool = True,
) -> InferenceSession:
    """An onnxruntime session on the CPU.

    Args:
        path: the file; it is read and checked first.
        optimized: as in `SessionSettings`.
        threads: likewise.
        extra_outputs: values within the graph to return as well.
        model: the result of `read_model(path)`, to save the second reading; `extra_outputs` are added to it.
        float_inputs: as in `SessionSettings`.
        exact: likewise.

    Raises:
        DataFileError: the file is missing or unreadable.
        DataError: a broken file.
        ExportError: a valid file that onnxruntime cannot run.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ArgumentError(f"threads={threads!r}: give a positive int, or None for onnxruntime's own choice.")
    if model is None:
        model = read_model(path)
    for name in extra_outputs or ():
        model.graph.output.add().name = name
    settings = SessionSettings(optimized=optimized, threads=threads, float_inputs=float_inputs, exact=exact)
    return start_session(model, settings, path=path, changed=bool(extra_outputs))


def start_session(
    model: ModelProto,
    settings: SessionSettings,
    *,
    path: str | os.PathLike[str] | None,
    changed: bool,
) -> InferenceSession:
    """An onnxruntime session on the CPU that adds products of int8 exactly, where onnxruntime can.

    x86 without VNNI adds pairs of uint8 x int8 products in 16 bits, where they saturate (an output was 60 % off). With
    `EXACT_PRODUCTS` onnxruntime stores such weights as uint8 there and takes its kernels for uint8 x uint8, which are
    exact and slower: https://github.com/microsoft/onnxruntime/pull/12088, seen in 1.31.1. Where the CPU adds in 32 bits
    it changes nothing. It is needless once onnxruntime does so of its own choice.

    Args:
        model: the graph to run.
        settings: how to run it.
        path: the file that the model is from, next to which its external values lie; None where there is none.
        changed: True where `model` is no longer what the file holds.

    Raises:
        ExportError: onnxruntime cannot run the model.
    """
    import onnxruntime

    def start(content: str | bytes, *, exact: bool) -> InferenceSession:
        options = settings.options(exact=exact)
        if path is not None:
            folder = os.fspath(Path(path).resolve().parent)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    whole = model.SerializeToString() if changed or path is None else os.fspath(path)
    try:
        try:
            return start(whole, exact=settings.exact)
        except Exception:
            if not settings.exact or not _has_integer_weights(model):
                raise
        # Where several nodes read one int8 weight, onnxruntime 1.31.1 cannot store it as uint8: the second copy gets
        # the name of the first ("Attempt to replace the existing tensor"). Needless once it converts a weight once:
        # ConvertS8WeightToU8, https://github.com/microsoft/onnxruntime/pull/12331.
        with suppress(Exception):
            return start(unshared(model).SerializeToString(), exact=True)
        return start(whole, exact=False)
    except Exception as error:  # its exceptions have no common base
        where = (
            "onnxruntime cannot run this model" if path is None else f"{Path(path)}: onnxruntime cannot run this file"
        )
        raise ExportError(f"{where}: {first_line(error)}") from error


def unshared(model: ModelProto) -> ModelProto:
    """A copy in which every reader of a dequantized int8 weight has a DequantizeLinear and initializers of its own."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    names = set(stored) | {name for node in graph.node for name in [node.name, *node.input, *node.output]}

    def fresh(name: str) -> str:
        number = 2
        while f"{name}_{number}" in names:
            number += 1
        names.add(f"{name}_{number}")
        return f"{name}_{number}"

    def own(name: str) -> str:
        tensor = graph.initializer.add()
        tensor.CopyFrom(stored[name])
        tensor.name = fresh(name)
        return str(tensor.name)

    taken: set[str] = set()
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "DequantizeLinear" or not _is_int8(stored.get(node.input[0])):
            continue
        for k in (0, 2):
            if k < len(node.input) and node.input[k] in stored:
                if node.input[k] in taken:
                    node.input[k] = own(node.input[k])
                taken.add(node.input[k])
        readers = [reader for reader in graph.node if node.output[0] in reader.input]
        for reader in readers[1:]:
            second = onnx.NodeProto()
            second.CopyFrom(node)
            for k in (0, 2):
                if k < len(node.input) and node.input[k] in stored:
                    second.input[k] = own(node.input[k])
            second.name, second.output[0] = node.name and fresh(node.name), fresh(node.output[0])
            for k, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[k] = second.output[0]
            nodes.append(second)
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(ordered)
    return copy


def _has_integer_weights(model: ModelProto) -> bool:
    return any(_is_int8(tensor) for tensor in model.graph.initializer)


def _is_int8(tensor: TensorProto | None) -> bool:
    return tensor is not None and tensor.data_type == tensor.INT8


def run_session(
    session: InferenceSession, inputs: dict[str, np.ndarray], outputs: list[str] | None = None
) -> dict[str, np.ndarray]:
    """The outputs by name.

    Raises:
        ExportError: onnxruntime failed on these inputs.
    """
    names = outputs or [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, session.run(names, inputs), strict=True))
    except Exception as error:
        raise run_failure(error, inputs) from error


def run_failure(error: Exception, inputs: dict[str, np.ndarray]) -> ExportError:
    """The error that a failed run is reported as."""
    shapes = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in inputs.items())
    return ExportError(f"onnxruntime failed on inputs {shapes}: {first_line(error)}")


def optimized_operators(path: str | os.PathLike[str]) -> Counter[str]:
    """Counts the operators of the graph that onnxruntime makes of the file: what really runs.

    Fused integer kernels are called QLinearConv, QLinearAdd, QLinearGlobalAveragePool, QGemm, MatMulIntegerToFloat and
    the like; a plain Conv, Gemm or MatMul there runs in float.

    Raises:
        DataFileError, DataError, ExportError: as `open_session`.
    """
    optimized = optimized_model(read_model(path), SessionSettings(), path=path, changed=False)
    return Counter(node.op_type for node in optimized.graph.node)


def optimized_model(
    model: ModelProto, settings: SessionSettings, *, path: str | os.PathLike[str] | None, changed: bool
) -> ModelProto:
    """The graph that onnxruntime makes of a model. The arguments are those of `start_session`."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        start_session(model, replace(settings, optimized_path=target), path=path, changed=changed)
        return onnx.load(target)


def _existing(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"path={path!r}: give the path of an ONNX file.")
    file = Path(path)
    if not file.exists():
        raise DataFileError(f"{file}: no such file.")
    if not file.is_file():
        raise DataFileError(f"{file}: not a file.")
    return file


def _broken(file: Path, why: str) -> DataError:
    return DataError(f"{file}: not a usable ONNX model: {why}. Export it again.")
