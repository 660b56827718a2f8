"""The inputs and outputs of a model as tensors by name, and the arguments of a call.

Users give sample inputs as a tensor, a tuple or a dictionary, and models return tensors, tuples, dictionaries or
dataclasses of them; files and comparisons want flat names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsify.errors import ArgumentError
from sparsify.model.batches import mapped, named_fields, with_known_mappings

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
        """`sample_inputs`: a tensor; a tuple or list of arguments; or keyword arguments in a mapping, dataclass or
        named tuple. `more` of these.

        Names are those of the parameters of `model.forward`; what stands inside a tuple or dictionary argument is
        called "<parameter>_<index or key>".

        Raises:
            ArgumentError: no tensor among them, or arguments that `forward` does not take.
        """
        if not isinstance(sample_inputs, (Tensor, tuple, list)) and named_fields(sample_inputs) is None:
            raise ArgumentError(
                f"sample_inputs={_brief(sample_inputs)}: give a tensor, a tuple of arguments or a dictionary of "
                "keywords."
            )
        args, kwargs = with_known_mappings(_plain_arguments(sample_inputs, model))
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


def call_arguments(inputs: object, model: nn.Module | None = None) -> CallArguments:
    """The (args, kwargs) that `inputs` stands for.

    Args:
        inputs: a tensor or another single value, a tuple or list of arguments, keyword arguments (a mapping, or a
            dataclass or named tuple whose fields `model` takes), or (args, kwargs) itself.
        model: the model that is called with them.

    >>> call_arguments([1, 2]), call_arguments({"x": 1}), call_arguments(((1,), {"y": 2}))
    (((1, 2), {}), ((), {'x': 1}), ((1,), {'y': 2}))
    """
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs[0], inputs[1]
    return _plain_arguments(inputs, model)


def batch_arguments(model: nn.Module, batch: object) -> CallArguments:
    """The (args, kwargs) of `model` in one batch of a data loader, moved to the device of the model.

    What `forward` does not take is left out: of a tuple or list the last values (labels), of a mapping the keys that
    are no parameters of it. A mapping or dataclass with labels behind it is taken as if it stood alone.
    """
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    if isinstance(batch, tuple | list) and 1 <= len(batch) <= 2 and keyword_arguments(batch[0], model):
        batch = batch[0]
    args, kwargs = _plain_arguments(batch, model)
    taken = inspect.signature(model.forward).parameters
    kinds = [parameter.kind for parameter in taken.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        kwargs = {name: value for name, value in kwargs.items() if name in taken}
    if isinstance(batch, (tuple, list)) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        args = args[: sum(kind in positional for kind in kinds)]

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    return tuple(mapped(value, move) for value in args), {name: mapped(value, move) for name, value in kwargs.items()}


def inputs_and_target(model: nn.Module, batch: object) -> tuple[Any, Any]:
    """(inputs of the model, what its loss gets) in one batch: of a tuple or list the last is the target; all else goes
    to both whole.
    """
    if not isinstance(batch, tuple | list):
        return batch, batch
    if keyword_arguments(batch, model):
        named = named_fields(batch) or {}
        return {name: value for name, value in list(named.items())[:-1]}, batch[-1]
    return (batch[0] if len(batch) <= 2 else tuple(batch[:-1])), batch[-1]


def keyword_arguments(value: object, model: nn.Module | None) -> dict[str, Any]:
    """The keyword arguments in a mapping, dataclass or named tuple; empty where it is none, or `model` takes none.

    Args:
        value: a batch.
        model: whose forward is called; None: all fields of a dataclass are taken, none of a tuple.
    """
    named = named_fields(value) or {}
    if model is None:
        return {} if isinstance(value, tuple) else {name: item for name, item in named.items() if item is not None}
    parameters = inspect.signature(model.forward).parameters.values()
    named_kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    taken = {parameter.name: parameter.default for parameter in parameters if parameter.kind in named_kinds}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters) and not isinstance(
        value, tuple
    ):
        # A wrapper's forward(*args, **kwargs): what it hands on is not known.
        taken = {**(dict.fromkeys(named) if not taken or set(taken) & set(named) else {}), **taken}
    # A field without a value leaves the parameter at its default.
    return {
        name: item
        for name, item in named.items()
        if name in taken and (item is not None or taken[name] is inspect.Parameter.empty)
    }


def _plain_arguments(inputs: object, model: nn.Module | None) -> CallArguments:
    if isinstance(inputs, Mapping):
        return (), {str(name): value for name, value in inputs.items()}
    named = keyword_arguments(inputs, model)
    if named:
        return (), named
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
    named = named_fields(value)
    if named is None:
        if not isinstance(value, (tuple, list)):
            if value is not None:
                yield path, value
            return
        named = {str(i): item for i, item in enumerate(value)}
    for key, item in named.items():
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
