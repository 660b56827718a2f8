"""Single ONNX nodes in onnxruntime, a session each: what torch has no call for, and numbers known before a run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from onnx import NodeProto, OperatorSetIdProto, TensorProto, helper, numpy_helper
from torch import Tensor

from sparsify.errors import ExportError, first_line
from sparsify.onnx.graph import all_inputs
from sparsify.onnx.runtime import SessionSettings, start_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__: list[str] = []

EdgeValue = Tensor | np.ndarray | None
"""What stands on an edge of a graph: a tensor; an array where it is known before a run; None where an input is left
out."""


class OneNode:
    """One node in a session of its own, made on the first call; a copy shares it.

    Args:
        node: of any operator and domain, also with graphs of its own.
        constants: the stored tensors among what it reads.
        opsets: of the model that it is from.
        ir_version: likewise.
    """

    def __init__(
        self, node: NodeProto, constants: dict[str, TensorProto], opsets: list[OperatorSetIdProto], ir_version: int
    ) -> None:
        self.node = node
        self.constants = {name: constants[name] for name in dict.fromkeys(all_inputs(node)) if name in constants}
        self.arrays = {name: array_of(tensor) for name, tensor in self.constants.items()}
        self.reads = [name for name in dict.fromkeys(all_inputs(node)) if name not in self.constants]
        self.outputs = [name for name in node.output if name]
        self.opsets, self.ir_version = opsets, ir_version
        self.shapes: dict[tuple[Any, ...], list[tuple[tuple[int, ...], torch.dtype]]] = {}
        """Of its results, by the shapes of what it read."""
        self._known: dict[tuple[Any, ...], int] = {}
        self._arrays: list[list[EdgeValue]] = []
        self._sessions: dict[tuple[str, ...], InferenceSession] = {}
        self.key = len(_KNOWN)
        _KNOWN.append(self)

    def __deepcopy__(self, memo: object) -> OneNode:
        return self

    def __reduce__(self) -> Any:
        parts = (self.node, self.constants, self.opsets, self.ir_version)
        return _again, (*(_bytes(parts[0]), {k: _bytes(v) for k, v in self.constants.items()}), *parts[2:])

    def __call__(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """The results for what it reads, constants left out, in the order of `reads`.

        Raises:
            ExportError: onnxruntime cannot run it.
        """
        types = tuple(str(array.dtype) for array in arrays)
        if types not in self._sessions:
            self._sessions[types] = self._session(arrays)
        try:
            return cast("list[np.ndarray]", self._sessions[types].run(None, dict(zip(self.reads, arrays, strict=True))))
        except Exception as error:
            raise ExportError(f"{self.node.name} ({self.node.op_type}) failed: {first_line(error)}") from error

    def number_of(self, values: list[EdgeValue]) -> int:
        """The number under which the arrays among `values` are kept, with None where tensors stand."""
        arrays = [value if isinstance(value, np.ndarray) else None for value in values]
        key = tuple(None if array is None else (str(array.dtype), array.shape, array.tobytes()) for array in arrays)
        if key not in self._known:
            self._known[key] = len(self._arrays)
            self._arrays.append(list(arrays))
        return self._known[key]

    def filled(self, number: int, tensors: list[np.ndarray]) -> Iterator[np.ndarray]:
        """Arrays that the node reads: those of this number, and `tensors` between them."""
        given = iter(tensors)
        for array in self._arrays[number]:
            yield next(given) if array is None else cast(np.ndarray, array)

    def _session(self, arrays: list[np.ndarray]) -> InferenceSession:
        kinds = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in arrays]
        graph = helper.make_graph(
            [self.node],
            "one_node",
            [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(self.reads, kinds, strict=True)],
            [helper.make_empty_tensor_value_info(name) for name in self.outputs],
            list(self.constants.values()),
        )
        model = helper.make_model(graph, opset_imports=self.opsets, ir_version=self.ir_version)
        return start_session(model, SessionSettings(), path=None, changed=True)


def run_in_torch(node: OneNode, values: list[EdgeValue]) -> list[Tensor]:
    """The results of a node for tensors and arrays; one operator to a tracer, which cannot look inside."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    results: list[Tensor] = _operator()(tensors, node.key, node.number_of(values))
    return results


def _run(tensors: list[Tensor], key: int, number: int) -> list[Tensor]:
    node = _KNOWN[key]
    arrays = node([*node.filled(number, [tensor.detach().cpu().numpy() for tensor in tensors])])
    results = [torch.from_numpy(np.array(array)) for array in arrays]
    node.shapes[_shapes_of(tensors, number)] = [(tuple(result.shape), result.dtype) for result in results]
    return results


def _shaped(tensors: list[Tensor], key: int, number: int) -> list[Tensor]:
    """Results for a trace, which computes nothing: of the shapes of a run on such tensors, else on zeros."""
    node, form = _KNOWN[key], _shapes_of(tensors, number)
    if form not in node.shapes:
        zeros = [np.zeros(tuple(tensor.shape), _numpy_type(tensor.dtype)) for tensor in tensors]
        arrays = node(list(node.filled(number, zeros)))
        kinds = [torch.from_numpy(np.empty(0, array.dtype)).dtype for array in arrays]
        node.shapes[form] = [(array.shape, kind) for array, kind in zip(arrays, kinds, strict=True)]
    return [tensors[0].new_empty(shape, dtype=kind) for shape, kind in node.shapes[form]]


def _shapes_of(tensors: list[Tensor], number: int) -> tuple[Any, ...]:
    return (number, *(tuple(int(size) for size in tensor.shape) for tensor in tensors))


def _numpy_type(dtype: torch.dtype) -> Any:
    name = str(dtype).removeprefix("torch.")
    return np.dtype(name)


@cache
def _operator() -> Any:
    library: Any = cast(Any, torch.library.Library)("sparsify_onnx", "DEF")
    library.define("node(Tensor[] tensors, int key, int number) -> Tensor[]")
    library.impl("node", _run, "CompositeExplicitAutograd")
    torch.library.register_fake("sparsify_onnx::node", _shaped, lib=library)
    _KEPT.append(library)
    return torch.ops.sparsify_onnx.node.default


_KNOWN: list[OneNode] = []
_KEPT: list[Any] = []
"""A library unregisters its operators when it is collected."""


def _bytes(proto: Any) -> bytes:
    return bytes(proto.SerializeToString())


def _again(node: bytes, constants: dict[str, bytes], opsets: Any, ir_version: int) -> OneNode:
    stored = {name: TensorProto.FromString(value) for name, value in constants.items()}
    return OneNode(NodeProto.FromString(node), stored, opsets, ir_version)


def array_of(tensor: TensorProto) -> np.ndarray:
    """The values of a stored tensor."""
    return numpy_helper.to_array(tensor)
