"""The inputs of an ONNX file: their types and sizes, samples held against them, and arrays made up. Knows no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ArgumentError, DataError, did_you_mean

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto, ValueInfoProto

__all__: list[str] = []

FILL = {"sequence": 128, "image": 224}
"""Sizes for dynamic dimensions other than the batch: image for axes 2 and up of rank 4 and 5."""
LARGEST_INPUT = 2**30
"""Bytes of random inputs: a broken file may ask for any number."""
NAMELESS = ("", "?")
"""Symbols that say nothing: paddle2onnx calls every free size "?" (seen in files of its version 1.0)."""
_DTYPES = {
    "FLOAT": "float32",
    "FLOAT16": "float16",
    "DOUBLE": "float64",
    **{
        name.upper(): name
        for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
    },
}

Size = int | str | None


@dataclass(frozen=True)
class FileInput:
    """One input of a file.

    Attributes:
        name: as the file calls it.
        kind: its type in words, "tensor(FLOAT)".
        dtype: as numpy calls it; None where no array can be made up for it.
        shape: sizes; a name where it is free and named, None where it is free; None where the file gives no shape.
    """

    name: str
    kind: str
    dtype: str | None
    shape: tuple[Size, ...] | None


def file_inputs(model: ModelProto) -> dict[str, FileInput]:
    """The inputs that have to be fed, by name: those of the graph without initializers."""
    from sparsify.onnx.graph import GraphView

    return {name: _input(value) for name, value in GraphView(model.graph).inputs.items()}


def _input(value: ValueInfoProto) -> FileInput:
    from onnx import TensorProto

    which = value.type.WhichOneof("value")
    if which != "tensor_type":
        return FileInput(value.name, (which or "value without a type").removesuffix("_type"), None, None)
    tensor = value.type.tensor_type
    known = tensor.elem_type in TensorProto.DataType.values()
    kind = TensorProto.DataType.Name(tensor.elem_type) if known else str(tensor.elem_type)
    shape = None
    if tensor.HasField("shape"):
        shape = tuple(
            dim.dim_value
            if dim.HasField("dim_value") and dim.dim_value >= 0
            else None
            if dim.dim_param in NAMELESS
            else dim.dim_param
            for dim in tensor.shape.dim
        )
    return FileInput(value.name, f"tensor({kind.lower()})", _DTYPES.get(kind), shape)


def samples_by_name(
    inputs: Mapping[str, FileInput], given: object, path: str | os.PathLike[str]
) -> dict[str, np.ndarray]:
    """Samples as arrays of the inputs' types, by their names; a mapping may leave some out.

    Args:
        inputs: of the file.
        given: an array, a tuple of arrays in the file's order, or a mapping by name; tensors too.
        path: the file, for messages.

    Raises:
        ArgumentError: a name that is no input, another number of arrays, or values of another kind.
    """
    names = list(inputs)
    if not isinstance(given, Mapping):
        arrays = given if isinstance(given, tuple | list) else [given]
        if len(arrays) != len(names):
            raise ArgumentError(f"{path}: {len(arrays)} sample inputs for {len(names)} inputs: {', '.join(names)}.")
        given = dict(zip(names, arrays, strict=True))
    if unknown := [str(name) for name in given if name not in inputs]:
        raise ArgumentError(
            f"{path}: sample_inputs are {', '.join(map(str, given))}, the inputs {', '.join(names)}."
            f"{did_you_mean(unknown[0], names)}"
        )
    return {str(name): _typed_array(inputs[name], value, path) for name, value in given.items()}


def _typed_array(declared: FileInput, value: Any, path: str | os.PathLike[str]) -> np.ndarray:
    import numpy as np

    where = f"{path}: sample_inputs: {declared.name!r}"
    try:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"{where} is a {type(value).__name__}, which is no array: {error}") from error
    if declared.dtype is None:
        return array
    wanted = np.dtype(declared.dtype)
    if array.dtype == wanted:
        return array
    # Numbers of another width fit; whole numbers are no measurements, and measurements are no ids.
    whole = "iu"
    if array.dtype.kind in whole and wanted.kind in whole:
        limits = np.iinfo(wanted)
        if array.size and (array.min() < limits.min or array.max() > limits.max):
            raise ArgumentError(f"{where} holds {array.min()} to {array.max()}; the file takes {wanted}.")
    elif array.dtype.kind != wanted.kind:
        raise ArgumentError(f"{where} holds {array.dtype}; the file takes {wanted}. Convert it with .astype({wanted}).")
    return array.astype(wanted)


def input_sizes(
    inputs: Mapping[str, FileInput],
    given: Mapping[str, Sequence[int]],
    batch_size: int,
    path: str | os.PathLike[str],
    *,
    ask: bool,
) -> dict[str, tuple[int, ...]]:
    """The shape of every input. A free size with a name is the same wherever the name stands.

    Axis 0 gets `batch_size` where it is free, and so do other axes of that name; what else is free gets 224 (axes 2 and
    up of images) or 128.

    Args:
        inputs: of the file.
        given: shapes of some of them, which come first.
        batch_size: items in a batch, where no given shape tells.
        path: the file, for messages.
        ask: whether sizes other than the batch that nothing tells are an error.

    Raises:
        ArgumentError: given shapes contradict the file or one another; a size that is not known, with `ask`.
        DataError: an input has no shape, and nothing is asked.
    """
    bound = _bound(inputs, given, path)
    free = [name for name, one in inputs.items() if one.shape and not isinstance(one.shape[0], int)]
    known = [int(given[name][0]) for name in free if name in given]
    known += [bound[one] for name in free if (one := _batch_name(inputs[name])) is not None and one in bound]
    size = known[0] if known else batch_size
    if free and (named := _batch_name(inputs[free[0]])) is not None:
        bound.setdefault(named, size)
    found: dict[str, tuple[int, ...]] = {}
    for name, asked in inputs.items():
        if name in given:
            found[name] = tuple(int(size) for size in given[name])
            continue
        if asked.shape is None:
            _refuse_shapeless(asked, inputs, path, ask=ask)
        shape: list[int] = []
        for axis, declared in enumerate(asked.shape or ()):
            if isinstance(declared, int):
                shape.append(declared)
                continue
            if declared is not None and declared in bound:
                shape.append(bound[declared])
                continue
            if axis and ask:
                raise ArgumentError(
                    f"{path}: axis {axis} of input {name!r} is {declared or 'of any length'!r}. Give "
                    f"sample_inputs, a dictionary with an array for each of {', '.join(inputs)}."
                )
            shape.append(size if axis == 0 else _free_size(axis, len(asked.shape or ())))
            if declared is not None:
                bound[declared] = shape[-1]
        found[name] = tuple(shape)
    return found


def _batch_name(one: FileInput) -> str | None:
    """The name of a free axis 0."""
    first = one.shape[0] if one.shape else None
    return first if isinstance(first, str) else None


def _free_size(axis: int, rank: int) -> int:
    if rank >= 4:
        return 3 if axis == 1 else FILL["image"]
    return FILL["sequence"]


def _refuse_shapeless(
    one: FileInput, inputs: Mapping[str, FileInput], path: str | os.PathLike[str], *, ask: bool
) -> None:
    if ask:
        raise ArgumentError(
            f"{path}: input {one.name!r} has no shape in the file. Give sample_inputs, a dictionary with an array for "
            f"each of {', '.join(inputs)}."
        )
    raise DataError(
        f"input {one.name!r} has no shape in the file, so that nothing can be made up for it. Give inputs, export it "
        "with one, or write it into graph.input with onnx."
    )


def _bound(
    inputs: Mapping[str, FileInput], given: Mapping[str, Sequence[int]], path: str | os.PathLike[str]
) -> dict[str, int]:
    """{name of a free size: what the given shapes make it}."""
    bound: dict[str, tuple[int, str]] = {}
    for name, sizes in given.items():
        declared = inputs[name].shape
        if declared is None:
            continue
        said = f"{path}: sample_inputs: {name!r} has the shape {list(sizes)}"
        shown = [one if one is not None else "any" for one in declared]
        if len(sizes) != len(declared):
            raise ArgumentError(f"{said}; the file takes {shown}.")
        for axis, (size, one) in enumerate(zip(sizes, declared, strict=True)):
            if isinstance(one, int) and one != size:
                raise ArgumentError(f"{said}; the file takes {shown}, of which axis {axis} is fixed to {one}.")
            if isinstance(one, str):
                other, where = bound.setdefault(one, (int(size), f"axis {axis} of {name!r}"))
                if other != size:
                    raise ArgumentError(f"{said}, so that {one!r} is {size} on axis {axis}; it is {other} on {where}.")
    return {name: size for name, (size, _) in bound.items()}


def made_up_inputs(
    model: ModelProto,
    batch_size: int = 1,
    *,
    samples: Mapping[str, np.ndarray] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    path: str | os.PathLike[str] = "the file",
) -> tuple[dict[str, np.ndarray], int]:
    """({name: array}, the batch size that they have) for the inputs of a file.

    Floats are normal, whole numbers that look rows up (token ids) lie within the table, those called masks and all
    others are ones.

    Args:
        model: the file.
        batch_size: where axis 0 is free; see `input_sizes`.
        samples: arrays for some of them, as `samples_by_name` gives them.
        shapes: shapes of some others.
        path: for messages.

    Raises:
        DataError: inputs that are no tensors, of a type that is not known, without a shape, or too large.
        ArgumentError: another batch size than the one that the file fixes; samples or shapes that do not fit.
    """
    import numpy as np

    inputs = file_inputs(model)
    samples = dict(samples or {})
    for one in inputs.values():
        if one.dtype is None and one.name not in samples:
            raise DataError(f"input {one.name!r} is a {one.kind}; only tensors of numbers can be made up.")
    given: dict[str, Sequence[int]] = {name: value.shape for name, value in samples.items()}
    sizes = input_sizes(inputs, {**given, **(shapes or {})}, batch_size, path, ask=False)
    free = next((name for name, one in inputs.items() if one.shape and not isinstance(one.shape[0], int)), None)
    # Where no batch is free it is that of the first input; a state may have another axis first.
    first = free if free is not None else next(iter(inputs), "")
    size = sizes[first][0] if first and sizes[first] else batch_size
    if batch_size not in (1, size):
        given_size = first in given
        why = "the inputs that were given have a batch" if given_size else "this file has a fixed batch"
        way = "leave one of both out" if given_size else "export it with dynamic_batch"
        raise ArgumentError(f"batch_size={batch_size}: {why} of {size}; {way}.")
    generator, rows = np.random.default_rng(0), rows_looked_up(model)
    feed: dict[str, np.ndarray] = {}
    for name, declared in inputs.items():
        if name in samples:
            feed[name] = samples[name]
            continue
        dtype = np.dtype(declared.dtype)
        if math.prod(sizes[name]) * dtype.itemsize > LARGEST_INPUT:
            raise DataError(f"input {name!r} has the shape {list(sizes[name])}, more than {LARGEST_INPUT} bytes.")
        feed[name] = _random(name, dtype, sizes[name], rows.get(name), generator)
    return feed, size


def rows_looked_up(model: ModelProto) -> dict[str, int]:
    """{input: rows of the smallest table that it indexes}."""
    from sparsify.onnx.graph import STORAGE, GraphView, integer, only_moves

    view = GraphView(model.graph)
    constants = view.constants()
    rows: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type != "Gather" or len(node.input) < 2:
            continue
        stored = constants.get(view.origin(node.input[0], lambda each: each.op_type in STORAGE))
        table, axis = [] if stored is None else list(stored.dims), integer(node, "axis", 0)
        if table and -len(table) <= axis < len(table):
            source = view.origin(node.input[1], lambda each: only_moves(each) or each.op_type == "Cast")
            rows[source] = min(rows.get(source, table[axis]), table[axis])
    return rows


def _random(
    name: str, dtype: np.dtype[Any], shape: Sequence[int], rows: int | None, generator: np.random.Generator
) -> np.ndarray:
    import numpy as np

    if dtype.kind == "f":
        # In single precision, which takes half the memory; a file may ask for a gigabyte.
        return generator.standard_normal(shape, dtype=np.float32).astype(dtype, copy=False)
    if rows is not None and "mask" not in name.lower():
        return generator.integers(0, max(rows, 1), shape).astype(dtype)
    if dtype == np.uint8:
        return generator.integers(0, 256, shape, dtype=np.uint8)
    return np.ones(shape, dtype)


def read_samples(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by their names; nothing is unpickled.

    Raises:
        DataFileError: it is missing or cannot be read. DataError: it is no .npz file, or holds objects.
    """
    import zipfile

    import numpy as np

    from sparsify.errors import DataFileError

    file = Path(path)
    try:
        with np.load(file, allow_pickle=False) as found:
            return {name: found[name] for name in found.files}
    except OSError as error:
        raise DataFileError(f"cannot read {file}: {error.strerror or error}.") from error
    except (ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file}: no arrays can be read from it: {error}. Write them with numpy.savez.") from error
