"""ONNX files as onnxruntime runs them: opened safely, with what its optimizer made of them. Knows no torch.

Whatever a file holds, opening and running it gives a result or one of the typed errors of `errors.py`.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ArgumentError, DataError, DataFileError, ExportError, first_line

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

__all__: list[str] = []

FILE_WEIGHTS = "sparsify.weights"
"""The key in a file's metadata under which stand, in JSON, {initializer: torch parameter} where the two differ."""
FILE_ELEMENTS = "sparsify.elements"
"""Likewise {initializer: how many numbers it is in torch} where the file holds more, copies or zeros in between."""


def read_model(path: str | os.PathLike[str]) -> ModelProto:
    """The parsed and checked model in a file.

    Raises:
        DataFileError: the file is missing or unreadable.
        DataError: it is not an ONNX model, or a broken one, or its weights lie in files outside its folder.
    """
    import onnx

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
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and (os.path.isabs(entry.value) or ".." in Path(entry.value).parts):
                raise _broken(file, f"{tensor.name!r} has its values in {entry.value!r}, outside the file's folder")
    try:
        onnx.checker.check_model(str(file) if _external(model) else content)
    except Exception as error:
        raise _broken(file, first_line(error)) from error
    return model


def open_session(
    path: str | os.PathLike[str],
    *,
    optimized: bool = True,
    threads: int | None = 1,
    extra_outputs: list[str] | None = None,
    model: ModelProto | None = None,
    float_inputs: bool = False,
) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        path: the file; it is read and checked first.
        optimized: False runs the graph as it stands in the file, node by node.
        threads: None leaves the number to onnxruntime.
        extra_outputs: values within the graph to return as well.
        model: what `read_model(path)` gave, to save the second reading.
        float_inputs: whether MatMul with weights alone as integers computes in float; by its own choice onnxruntime
            rounds what it reads to int8 at every call, which is faster and 0.7 % off.

    Raises:
        DataFileError: the file is missing or unreadable.
        DataError: a broken file.
        ExportError: a valid file that onnxruntime cannot run.
    """
    import onnxruntime

    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ArgumentError(f"threads={threads!r}: give a positive int, or None for onnxruntime's own choice.")
    if model is None:
        model = read_model(path)
    options = session_options(optimized=optimized, threads=threads, float_inputs=float_inputs)
    source: str | bytes = os.fspath(path)
    if extra_outputs:
        for name in extra_outputs:
            model.graph.output.add().name = name
        source = model.SerializeToString()
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ExportError(f"{Path(path)}: onnxruntime cannot run this file: {first_line(error)}") from error


def run_session(session: Any, inputs: dict[str, np.ndarray], outputs: list[str] | None = None) -> dict[str, np.ndarray]:
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
    """What a failed run is reported as."""
    shapes = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in inputs.items())
    return ExportError(f"onnxruntime failed on inputs {shapes}: {first_line(error)}")


def optimized_operators(path: str | os.PathLike[str]) -> Counter[str]:
    """How often each operator type stands in the graph that onnxruntime makes of the file: what really runs.

    Fused integer kernels are called QLinearConv, QLinearAdd, QLinearGlobalAveragePool, QGemm, MatMulIntegerToFloat and
    the like; a plain Conv, Gemm or MatMul there runs in float.

    Raises:
        DataFileError, DataError, ExportError: as `open_session`.
    """
    import onnx
    import onnxruntime

    read_model(path)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        options = session_options(optimized=True, threads=1)
        options.optimized_model_filepath = str(target)
        try:
            onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
            optimized = onnx.load(target, load_external_data=False)
        except Exception as error:
            raise ExportError(f"{Path(path)}: onnxruntime cannot run this file: {first_line(error)}") from error
    return Counter(node.op_type for node in optimized.graph.node)


def session_options(*, optimized: bool, threads: int | None, float_inputs: bool = False) -> Any:
    """One thread unless asked otherwise, and errors only in the log. `float_inputs`: as in `open_session`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    # x86 without VNNI adds pairs of uint8 x int8 products in 16 bits, where they saturate. This has onnxruntime take
    # its kernels for uint8 x uint8 there (https://github.com/microsoft/onnxruntime/pull/12088, seen in 1.31.1); where
    # the CPU adds in 32 bits it changes nothing.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if float_inputs:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Fatal only: what goes wrong reaches the user as an exception, not as lines on stderr.
    options.log_severity_level = 4
    return options


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


def _external(model: ModelProto) -> bool:
    return any(tensor.external_data for tensor in model.graph.initializer)
