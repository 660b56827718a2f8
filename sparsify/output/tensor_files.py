"""Tensors by name in a safetensors file: no pickle, and nothing is believed of a file that its bytes do not bear out.

The package `safetensors` is an extra, `sparsify[safetensors]`, and imported when a file is written or read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparsify.errors import ArgumentError, DataError, DataFileError, install_line

__all__: list[str] = []

_STORED: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""The types that every version of the format has -> their names there. Others are stored as their bytes."""

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(*_STORED, torch.complex64, torch.complex128, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    )
}
"""The types of tensors that can be stored, by name."""


def dtype_name(tensor: Tensor) -> str:
    """The name of the type of a tensor, as in `DTYPES` where it can be stored: "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes tensors, each as if it stood alone: neither shared memory nor the layout is kept.

    Raises:
        ArgumentError: safetensors is not installed.
    """
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        value = _bytes_or_itself(tensor)
        # What shares memory, or is a part of a larger one, is refused by safetensors.
        memory = value.untyped_storage()
        if memory.data_ptr() in taken or memory.nbytes() != value.nbytes:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        plain[name] = value
    # The metadata is what transformers asks for.
    _safetensors("safetensors.torch").save_file(plain, path, metadata={"format": "pt"})


class TensorFile:
    """A file that is open for reading: its names, shapes and types are known, values come one by one."""

    def __init__(self, path: Path, opened: Any) -> None:
        self._path, self._opened = path, opened
        self.stored: dict[str, tuple[str, tuple[int, ...]]] = {}
        """Name -> (type as the file calls it, shape)."""
        for name in opened.keys():  # noqa: SIM118  it is no mapping
            part = opened.get_slice(name)
            self.stored[name] = str(part.get_dtype()), tuple(part.get_shape())

    def check(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Checks that a tensor of this type and shape is there.

        Raises:
            DataError: it is not, or is another one.
        """
        wanted = _STORED.get(dtype, "U8"), shape if dtype in _STORED else (*shape, dtype.itemsize)
        if self.stored.get(name) != wanted:
            found = self.stored.get(name)
            here = "is not in it" if found is None else f"is {found[0]} of shape {found[1]} in it"
            raise DataError(f"{self._path}: {name!r} {here}, and should be {wanted[0]} of shape {wanted[1]}.")

    def tensor(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor, in memory of its own."""
        try:
            found: Tensor = self._opened.get_tensor(name)
        except Exception as error:
            raise DataError(f"{self._path}: {name!r} cannot be read: {error}.") from error
        # A copy: what was read lies where it lay in the file, on no boundary that kernels like.
        found = found.clone()
        return found if dtype in _STORED else found.view(dtype).reshape(shape)


@contextmanager
def opened_tensors(path: Path) -> Iterator[TensorFile]:
    """The tensors of a file, open inside the block.

    Raises:
        ArgumentError: safetensors is not installed.
        DataFileError: there is no such file.
        DataError: it is no such file, or a part of one.
    """
    module = _safetensors("safetensors")
    try:
        opened = module.safe_open(path, framework="pt", device="cpu")
    except OSError as error:
        raise DataFileError(f"cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:
        raise DataError(f"{path} is no safetensors file, or a part of one: {error}. Save the model again.") from error
    with opened as file:
        yield TensorFile(path, file)


def file_digest(path: Path) -> str:
    """The sha256 of the bytes of a file, as hexadecimal digits.

    Raises:
        DataFileError: it is missing or unreadable.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataFileError(f"cannot read {os.fspath(path)}: {error.strerror or error}.") from error
    return digest.hexdigest()


def _bytes_or_itself(tensor: Tensor) -> Tensor:
    """A tensor on the CPU and contiguous; its bytes along one more dimension where its type is rare."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if plain.dtype in _STORED:
        return plain
    return plain.reshape(-1).view(torch.uint8).reshape(*plain.shape, plain.dtype.itemsize)


def _safetensors(name: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise ArgumentError(
            f"saved models need the package safetensors, which is not installed: {install_line('safetensors')}."
        ) from error
