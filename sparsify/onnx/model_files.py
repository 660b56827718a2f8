"""Writes a model as one ONNX file, or as two where its values do not fit into one."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import DataFileError
from sparsify.onnx.rebuilt_weights import graphs_of, loaded, tensors_of
from sparsify.output.files import replacing

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

__all__: list[str] = []

MOST_BYTES = int(1.8 * 2**30)
"""Bytes in one file: protobuf ends at 2 GiB."""
ALIGNED = 4096
"""Tensors of external data begin at multiples of it, so that they can be mapped into memory."""
EXTERNAL_FROM = 1024
"""Bytes from which on a tensor goes to external data."""


def external_bytes(tensor: TensorProto) -> int:
    """Bytes of a tensor that lie in another file."""
    if tensor.data_location != tensor.EXTERNAL:
        return 0
    length = next((entry.value for entry in tensor.external_data if entry.key == "length"), None)
    if length is not None and length.isdecimal():
        return int(length)
    from onnx import helper

    count = 1
    for dim in tensor.dims:
        count *= dim
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def model_bytes(model: ModelProto) -> int:
    """Bytes of a model with its external data."""
    return int(model.ByteSize()) + sum(external_bytes(tensor) for tensor in _stored_tensors(model))


def files_beside(model: ModelProto, path: str | os.PathLike[str]) -> list[Path]:
    """The files in which values of the model at `path` lie, each once, in order; `read_model` has seen that they are in
    its folder."""
    folder = Path(path).resolve().parent
    places = {
        entry.value: folder / entry.value
        for tensor in tensors_of(model)
        if tensor.data_location == tensor.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return list(places.values())


@contextmanager
def replacing_model(model: ModelProto, folder: Path, path: str | os.PathLike[str]) -> Iterator[tuple[Path, int]]:
    """Writes a model beside `path`, and puts it there when the block ends well. Yields (temporary file, bytes).

    Up to 1.8 GiB it is one file. Of a larger one the values lie in "<name>.<digest>.data", which older files of that
    pattern make room for at the end: the old model stays whole until the new one is there.

    Args:
        model: its values are moved into it, or out of it.
        folder: where its external data lies.
        path: the file.

    Raises:
        DataFileError: `path` cannot be written.
        DataError: external data cannot be read.
    """
    target = Path(path)
    with replacing(target) as temporary:
        size, data = model_bytes(model), None
        new = False
        try:
            if size <= MOST_BYTES:
                for tensor in _stored_tensors(model):
                    if tensor.data_location == tensor.EXTERNAL:
                        tensor.CopyFrom(loaded(tensor, folder))
            else:
                data, new = _written_data(model, folder, target)
            content = model.SerializeToString()
            try:
                temporary.write_bytes(content)
            except OSError as error:
                raise DataFileError(f"cannot write {target}: {error.strerror or error}.") from error
            yield temporary, len(content) + (data.stat().st_size if data is not None else 0)
        except BaseException:
            if data is not None and new:
                with suppress(OSError):
                    data.unlink()
            raise
    for old in target.parent.glob(f"{glob.escape(target.name)}.{'[0-9a-f]' * 16}.data"):
        if old != data:
            with suppress(OSError):
                old.unlink()


def _written_data(model: ModelProto, folder: Path, target: Path) -> tuple[Path, bool]:
    """(the file of the large values, True if it was not there before)."""

    def values() -> Iterator[tuple[TensorProto, bytes]]:
        for tensor in _stored_tensors(model):
            if tensor.HasField("raw_data") or tensor.data_location == tensor.EXTERNAL:
                yield tensor, loaded(tensor, folder).raw_data

    digest = hashlib.sha256()
    for _, raw in values():
        digest.update(raw)
    data = target.with_name(f"{target.name}.{digest.hexdigest()[:16]}.data")
    new = not data.exists()
    places: list[tuple[TensorProto, int, int]] = []
    with replacing(data) as temporary, temporary.open("wb") as file:
        for tensor, raw in values():
            if len(raw) < EXTERNAL_FROM:
                tensor.CopyFrom(loaded(tensor, folder))
                continue
            file.write(b"\0" * (-file.tell() % ALIGNED))
            places.append((tensor, file.tell(), len(raw)))
            file.write(raw)
    for tensor, offset, length in places:
        tensor.ClearField("raw_data")
        del tensor.external_data[:]
        tensor.data_location = tensor.EXTERNAL
        for key, value in (("location", data.name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
    return data, new


def _stored_tensors(model: ModelProto) -> Iterator[TensorProto]:
    for graph in graphs_of(model.graph):
        yield from graph.initializer
