"""Ways of training in which no recipe can work, refused before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from sparsify.errors import StateError
from sparsify.modifiers.base import Modifier

__all__: list[str] = []


def refuse_foreign_weights(who: str) -> NoReturn:
    """Raises a StateError, since `who` (DeepSpeed, Megatron-LM) steps on weights that are not the model's."""
    raise StateError(
        f"{who} steps on weights of its own and overwrites the model's, so masks cannot hold. Train with torchrun "
        "(DDP) or FSDP2."
    )


def refuse_cuts(modifiers: Iterable[Modifier], processes: int) -> None:
    """Raises a StateError where `modifiers` remove channels and several `processes` hold gradients of the model."""
    if processes > 1 and any(modifier.cuts() for modifier in modifiers):
        raise StateError(
            f"channels cannot be removed while {processes} processes hold gradients of the model "
            "(DistributedDataParallel). Mask them in training (shrink: false, no LayerThinningModifier), and call "
            "sparsify.shrink(model, sample_inputs) afterwards."
        )
