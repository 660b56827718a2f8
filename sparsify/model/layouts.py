"""Where the input channels of each weight lie, as the layers of a model say it or its user does."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sparsify.errors import TargetError
from sparsify.model.experts import INPUTS_BEFORE_LAST, INPUTS_LAST, is_stack, stack_inputs
from sparsify.model.recomputed import recomputed_weights
from sparsify.model.targets import input_dim, named_modules, owners, resolve_parameters

__all__: list[str] = []


def input_dims(model: nn.Module, said: Mapping[str, int] | None = None, *, where: str = "") -> dict[str, int | None]:
    """The dimension along which the input channels of each parameter lie, by name.

    Of a stack of matrices it is negative, -1 or -2, and its first dimension tells the matrices apart; None: nothing
    says it.

    Args:
        model: the model whose parameters they are.
        said: dimensions by name, as in a recipe, counted from 0 or from the end.
        where: the modifier that they were written in, for errors.

    Raises:
        TargetError: a name in `said` matches nothing, or has no such dimension.
    """
    layers = {"": model, **named_modules(model)}
    directions = {made.direction: made.layer for made in recomputed_weights(model).values()}
    found: dict[str, int | None] = {}
    stacks = set()
    for name, module, own in owners(model):
        parameter = module._parameters[own]
        if parameter is not None and is_stack(module, own) and name not in directions:
            stacks.add(name)
            found[name] = stack_inputs(module, parameter)
        else:
            found[name] = input_dim(layers.get(directions.get(name, ""), module) if name in directions else module)
    for written, dim in (said or {}).items():
        for name, parameter in resolve_parameters(model, [written], where=f"{where}.input_dims").items():
            stack = name in stacks
            real = dim + parameter.dim() if dim < 0 else dim
            allowed = (1, 2) if stack else (0, 1)
            if real not in allowed or real >= parameter.dim():
                raise TargetError(
                    f"{where}.input_dims: {name!r} has shape {tuple(parameter.shape)}, so that its input channels lie "
                    f"along dimension {allowed[0]} or {allowed[1]}, not {dim}."
                )
            found[name] = (INPUTS_LAST if real == 2 else INPUTS_BEFORE_LAST) if stack else real
    return found
