"""Reads the words of a command line: "package.module:function", and inputs by their shapes."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsify.errors import ArgumentError, DataFileError, did_you_mean
from sparsify.onnx.file_inputs import file_inputs, made_up_inputs, read_samples
from sparsify.onnx.runtime import read_model
from sparsify.optimize.code_generation import check_reference

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__: list[str] = []

_INPUT = re.compile(r"(?P<sizes>\d+(x\d+)*)(:(?P<kind>float|int)(<(?P<most>\d+))?)?")


def resolve(reference: str, what: str) -> Any:
    """The object at "package.module:name"; the working folder is searched too.

    Raises:
        ArgumentError: it is written otherwise, the module cannot be imported, or has no such name.
    """
    module_name, path = check_reference(reference, what)
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # A user's module may raise anything.
        raise ArgumentError(f"{what}: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            known = [n for n in dir(found) if not n.startswith("_")]
            raise ArgumentError(f"{what}: {reference!r}: there is no {name!r}.{did_you_mean(name, known)}")
        found = getattr(found, name)
    return found


def called(reference: str, what: str) -> Any:
    """The result of the function at `reference`, called without arguments.

    Raises:
        ArgumentError: there is none, or it raises.
    """
    function = resolve(reference, what)
    if not callable(function):
        raise ArgumentError(f"{what}: {reference!r} is a {type(function).__name__}, not a function without arguments.")
    try:
        return function()
    except Exception as error:  # A user's function may raise anything.
        raise ArgumentError(f"{what}: {reference}() failed: {type(error).__name__}: {error}") from error


def model_of(reference: str) -> nn.Module | Path:
    """A torch model from "package.module:function" (or of a module's own object), or the path of an ONNX file.

    Raises:
        ArgumentError: neither. DataError: the file is not there.
    """
    from torch import nn

    path = Path(reference)
    if path.suffix == ".onnx":
        if not path.is_file():
            raise DataFileError(f"{path}: there is no such file.")
        return path
    found = resolve(reference, "model")
    model = found if isinstance(found, nn.Module) else called(reference, "model")
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: {reference}() gave a {type(model).__name__}; it must give a torch.nn.Module.")
    return model.eval()


def torch_model(reference: str) -> nn.Module:
    """The torch model at `reference`, where a file will not do."""
    model = model_of(reference)
    if isinstance(model, Path):
        raise ArgumentError(f"model: {reference}: this needs the torch model, as package.module:function.")
    return model


def inputs_of(texts: Iterable[str] | None) -> Any:
    """Sample inputs: of one "package.module:function", or random ones: "1x3x224x224", "1x128:int<30522".

    None where nothing is said. Values are the same in every run.

    Raises:
        ArgumentError: what cannot be read, with the forms that can.
    """
    import torch

    texts = list(texts or ())
    if not texts:
        return None
    if len(texts) == 1 and ":" in texts[0] and not _INPUT.fullmatch(texts[0]):
        return called(texts[0], "input")
    generator = torch.Generator().manual_seed(0)
    tensors: list[Tensor] = []
    for text in texts:
        match = _INPUT.fullmatch(text)
        if match is None:
            raise ArgumentError(
                f"input: {text!r} is no shape. Write 1x3x224x224, 1x128:int<30522 for numbers below 30522, or "
                "package.module:function."
            )
        sizes = [int(size) for size in match["sizes"].split("x")]
        if match["kind"] == "int":
            tensors.append(torch.randint(0, int(match["most"] or 2), sizes, generator=generator))
        elif match["most"]:
            raise ArgumentError(
                f"input: {text!r}: only whole numbers have a largest value; write :int<{match['most']}."
            )
        else:
            tensors.append(torch.randn(sizes, generator=generator))
    return tuple(tensors)


def file_samples(path: str | os.PathLike[str], texts: Iterable[str] | None) -> Any:
    """Sample inputs of an ONNX file, of the types that it has; None where nothing is said.

    A shape is that of the next input, or after NAME= of this one; inputs that are not named are made up. One .npz file,
    or one "package.module:function", gives the arrays themselves.

    Raises:
        ArgumentError: what cannot be read, or does not fit the file. DataError: the file, or the .npz file, is broken.
    """
    texts = list(texts or ())
    if not texts:
        return None
    if len(texts) == 1 and texts[0].endswith(".npz"):
        return read_samples(texts[0])
    if len(texts) == 1 and ":" in texts[0] and not _INPUT.fullmatch(texts[0].rpartition("=")[2]):
        return called(texts[0], "input")
    model = read_model(path)
    inputs = file_inputs(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, equals, sizes = text.rpartition("=")
        match = _INPUT.fullmatch(sizes)
        if match is None:
            raise ArgumentError(
                f"input: {text!r} is no shape. Write 1x3x224x224, NAME=1x3x224x224 or "
                "FILE.npz, or package.module:function."
            )
        left = [one for one in inputs if one not in shapes]
        if (equals and name not in inputs) or not left:
            raise ArgumentError(f"input: {text!r}: the inputs of {path} are {', '.join(inputs)}.")
        shapes[name if equals else left[0]] = tuple(int(size) for size in match["sizes"].split("x"))
    return made_up_inputs(model, shapes=shapes, path=path)[0]
