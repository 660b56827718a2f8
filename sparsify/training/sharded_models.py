"""Refusals of what cannot work on a model whose parameters are sharded over ranks, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from sparsify.errors import StateError
from sparsify.model.sharding import first_sharded, is_flattened
from sparsify.model.targets import named_parameters
from sparsify.modifiers.base import Modifier

__all__: list[str] = []


def refuse_unshardable(
    model: nn.Module,
    modifiers: Sequence[Modifier],
    teacher: nn.Module | Literal["self"] | None,
    *,
    has_inputs: bool,
) -> None:
    """Checks that a recipe can work on `model` as it is sharded; on one that is not there is nothing to check.

    Args:
        model: the user's module, without wrappers.
        modifiers: the recipe's.
        teacher: of distillation.
        has_inputs: whether inputs to trace the model on were given.

    Raises:
        StateError: a modifier, the teacher or the way of sharding; the message says the way out.
    """
    working = [m for m in modifiers if m.kind in _ON_WEIGHTS]
    flattened = next((name for name, module in model.named_modules() if is_flattened(module)), None)
    if flattened is not None and working:
        raise StateError(
            f"{type(working[0]).__name__}: FullyShardedDataParallel (FSDP1) around {flattened or 'the model'!r} joins "
            "parameters, so that weights have neither shapes nor names of their own. Use torch.distributed.fsdp."
            "fully_shard instead (FSDP2; fsdp_version: 2 in accelerate)."
        )
    sharded = first_sharded(model)
    if sharded is None:
        return
    for modifier in modifiers:
        if not modifier.sharded:
            found = [name for name in modifier.targets(model) if name in named_parameters(model)]
            kind = "structure" if modifier.whole_channels else modifier.kind
            raise StateError(
                f"{type(modifier).__name__} cannot work on parameters that are sharded over ranks (fully_shard), as "
                f"{(found or [sharded])[0]!r} is: {_WAY_OUT.get(kind, _ELSE)}"
            )
        if modifier.traces and not has_inputs:
            raise StateError(
                f"{type(modifier).__name__} traces the model, and under fully_shard that cannot be done within its "
                "first forward: pass sample_inputs to modify()."
            )
    if teacher == "self":
        raise StateError(
            'distillation_teacher="self" copies the model, and one under fully_shard cannot be copied. Make the '
            "teacher with copy.deepcopy(model) before fully_shard, and pass it."
        )


def changes_weights(modifiers: Sequence[Modifier]) -> bool:
    """True if a recipe does something to weights or layers that has to be the same on every rank."""
    return any(m.kind in _ON_WEIGHTS and m.kind != "regularization" for m in modifiers)


_ON_WEIGHTS = ("pruning", "quantization", "palettization", "structure", "regularization")
_ELSE = "train with DistributedDataParallel, or leave it out."
_WAY_OUT = {
    "structure": "remove channels or layers on one process before fully_shard, from a checkpoint, or train with "
    "DistributedDataParallel.",
    "pruning": "use GMPruningModifier, GlobalMagnitudePruningModifier or ConstantPruningModifier, which rank what each "
    "rank has, or train with DistributedDataParallel.",
}
