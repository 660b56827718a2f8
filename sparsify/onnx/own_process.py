"""A file in a process of its own, before this one opens it: a crash of onnxruntime is an error and not the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import ExportError
from sparsify.onnx.runtime import PRODUCER

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto

__all__: list[str] = []

_TRIAL = """
import sys
import numpy
import onnxruntime
for level in (onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    print(level.name, flush=True)
    session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
    session.run(None, dict(numpy.load(sys.argv[2])))
"""


def check_survival(proto: ModelProto, path: str | os.PathLike[str], feed: dict[str, np.ndarray]) -> None:
    """Refuses a file that ends the process in which onnxruntime opens and runs it.

    That takes .4 s, and so it is done only where a crash was seen: with files in float16, which onnxruntime rewrites
    for float32 (`part_transposes`), and with files that `export_onnx` did not write
    (https://github.com/microsoft/onnxruntime/issues/24144). What fails there without a crash fails in this process
    too, and is reported then.

    Args:
        proto: the file at `path`.
        path: where it lies, with its external data beside it.
        feed: the inputs by name.

    Raises:
        ExportError: the process ended.
    """
    if not _may_crash(proto) or not sys.executable:
        return
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        values = Path(folder) / "inputs.npz"
        np.savez(values, **feed)  # type: ignore[arg-type]
        command = [sys.executable, "-c", _TRIAL, os.fspath(Path(path).resolve()), os.fspath(values)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError:
            # Where no process may be started, as in some sandboxes, the file is opened in this one.
            return
    if ended.returncode in (0, 1):
        return
    import onnxruntime

    reached = ended.stdout.split()
    how = "without optimizations" if reached[-1:] == ["ORT_DISABLE_ALL"] else "with optimizations"
    raise ExportError(
        f"{Path(path)}: onnxruntime {onnxruntime.__version__} ends its process {how} ({_reason(ended.returncode)}), "
        "and would end yours. Export the model in float32 (copy.deepcopy(model).float()), or open the file with "
        "another version of onnxruntime or a lower graph_optimization_level."
    )


def _may_crash(proto: ModelProto) -> bool:
    from onnx import TensorProto

    graph = proto.graph
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.initializer)
    half |= any(value.type.tensor_type.elem_type == TensorProto.FLOAT16 for value in [*graph.input, *graph.output])
    return half or proto.producer_name != PRODUCER


def _reason(code: int) -> str:
    """The name of the signal, or the exit status."""
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"exit status {code}"
