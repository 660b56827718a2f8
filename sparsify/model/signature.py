"""The inputs and outputs of a model as tensors by name, and the arguments of a call.

Users give sample inputs as a tensor, a tuple or a dictionary, and models return tensors, tuples, dictionaries or
dataclasses of them; files and comparisons want flat names.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.errors import ArgumentError

__all__: list[str] = []

InputsLike = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Sample inputs as a user gives them: a tensor, a tuple or list of arguments, or keyword arguments."""
CallArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""(args, kwargs)."""


def check_module(model: object, where: str = "", *, other: str = "") -> nn.Module:
    """`model`, which is a torch module.

    Args:
        model: the argument that a user gave.
        where: the name of what is called, before the message.
        other: what may be given in place of a module, after the message.

    Raises:
        ArgumentError: it is something else.
    """
    if not isinstance(model, nn.Module):
        text = f"model is a {type(model).__name__}: give a torch.nn.Module{other}."
        raise ArgumentError(f"{where}: {text}" if where else text)
    return model


@dataclass(frozen=True)
class SampleInputs:
    """One call of a model: its tensors by name, and how to put others in their places."""

    inputs: dict[str, Tensor]
    leaves: tuple[Any, ...]
    """All arguments flattened; None where a tensor goes, in the order of `inputs`."""
    tensor_at: tuple[int, ...]
    structure: pytree.TreeSpec

    @classmethod
    def of(
        cls, model: nn.Module, sample_inputs: InputsLike | None, more: Mapping[str, Any] | None = None
    ) -> SampleInputs:
        """`sample_inputs`: a tensor; a tuple or list of arguments; or a mapping of keyword arguments. `more` of these.

        Names are those of the parameters of `model.forward`; what stands inside a tuple or dictionary argument is
        called "<parameter>_<index or key>".

        Raises:
            ArgumentError: no tensor among them, or arguments that `forward` does not take.
        """
        if not isinstance(sample_inputs, (Tensor, Mapping, tuple, list)):
            raise ArgumentError(
                f"sample_inputs={_brief(sample_inputs)}: give a tensor, a tuple of arguments or a dictionary of "
                "keywords."
            )
        args, kwargs = _plain_arguments(sample_inputs)
        kwargs |= {str(name): value for name, value in (more or {}).items()}
        names = _parameter_names(model, args, kwargs)
        leaves, structure = pytree.tree_flatten_with_path((args, kwargs))
        inputs: dict[str, Tensor] = {}
        values: list[Any] = []
        tensor_at: list[int] = []
        for i, (path, value) in enumerate(leaves):
            if not isinstance(value, Tensor):
                values.append(value)
                continue
            # path[0] tells args from kwargs, path[1] which argument it is.
            first = path[1]
            parts = [names[first.idx] if isinstance(first, pytree.SequenceKey) else _key_text(first)]
            inputs[_unique(_identifier("_".join(parts + [_key_text(key) for key in path[2:]])), inputs)] = value
            values.append(None)
            tensor_at.append(i)
        if not inputs:
            raise ArgumentError(f"sample_inputs={_brief(sample_inputs)}: there is no tensor among the inputs.")
        return cls(inputs, tuple(values), tuple(tensor_at), structure)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with `tensors` in the places of `inputs`, in their order."""
        leaves = list(self.leaves)
        for i, tensor in zip(self.tensor_at, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs


def named_outputs(output: object) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in what a model returned, by name, and what else was there ("past_key_values: DynamicCache").

    One tensor is "output", those of a tuple are "output_0", "output_1", ..., those of a dictionary, named tuple or
    dataclass (`ModelOutput`) bear their keys; inside others joined by "_". None is left out.
    """
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    for path, value in _leaves_of(output, ()):
        name = "_".join(path)
        if isinstance(value, Tensor):
            if not path or path[0].isdigit():
                name = f"output_{name}" if name else "output"
            tensors[_unique(_identifier(name), tensors)] = value
        else:
            others.append(f"{name or 'output'}: {type(value).__name__}")
    return tensors, others


def call_arguments(inputs: object) -> CallArguments:
    """The (args, kwargs) that `inputs` stands for.

    Args:
        inputs: a tensor or another single value, a tuple or list of arguments, a mapping of keyword arguments, or
            (args, kwargs) itself.

    >>> call_arguments([1, 2]), call_arguments({"x": 1}), call_arguments(((1,), {"y": 2}))
    (((1, 2), {}), ((), {'x': 1}), ((1,), {'y': 2}))
    """
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs[0], inputs[1]
    return _plain_arguments(inputs)


def batch_arguments(model: nn.Module, batch: object) -> CallArguments:
    """The (args, kwargs) of `model` in one batch of a data loader, moved to the device of the model.

    What `forward` does not take is left out: of a tuple or list the last values (labels), of a mapping the keys that
    are no parameters of it.
    """
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    args, kwargs = _plain_arguments(batch)
    taken = inspect.signature(model.forward).parameters
    kinds = [parameter.kind for parameter in taken.values()]
    if isinstance(batch, Mapping) and inspect.Parameter.VAR_KEYWORD not in kinds:
        kwargs = {name: value for name, value in kwargs.items() if name in taken}
    if isinstance(batch, (tuple, list)) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        args = args[: sum(kind in positional for kind in kinds)]
    return tuple(_moved_to(value, device) for value in args), {k: _moved_to(v, device) for k, v in kwargs.items()}


def _moved_to(value: object, device: torch.device) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


def _plain_arguments(inputs: object) -> CallArguments:
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


def _parameter_names(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """The names of the positional arguments; "<name>_<i>" for those that land in *args."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"sample_inputs do not fit {type(model).__name__}.forward{signature}: {error}.") from None
    names: list[str] = []
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}_{i}" for i in range(len(value))]
        elif kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
    return names


def _key_text(key: object) -> str:
    return next((str(getattr(key, kind)) for kind in ("key", "idx", "name") if hasattr(key, kind)), str(key))


def _leaves_of(value: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, Mapping):
        items: list[tuple[str, Any]] = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = [(str(i), item) for i, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        if value is not None:
            yield path, value
        return
    for key, item in items:
        yield from _leaves_of(item, (*path, key))


def _identifier(name: str) -> str:
    return re.sub(r"\W", "_", name) or "input"


def _unique(name: str, taken: Mapping[str, Any]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    return candidate


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
