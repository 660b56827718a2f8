"""Questions to a LightningModule and its Trainer: how it is called, its averages, what cannot work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparsify.errors import ArgumentError, StateError, TargetError, did_you_mean
from sparsify.model.wrappers import is_distributed
from sparsify.training.manager import ScheduledModifierManager

__all__: list[str] = []

FLATTENING = {
    "FSDPStrategy": "it flattens parameters, so that none has its name and shape",
    "DeepSpeedStrategy": "the optimizer steps inside its engine, on flat copies of the weights",
}
"""Strategies under which no mask can be held."""


def submodule(pl_module: nn.Module, name: str | None) -> nn.Module:
    """The model that the recipe is about: the submodule of that name, or all of it.

    Raises:
        TargetError: there is none of that name.
    """
    if not name:
        return pl_module
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        children = [child for child, _ in pl_module.named_children()]
        raise TargetError(
            f"model: {type(pl_module).__name__} has no submodule {name!r}.{did_you_mean(name, children)} It has "
            f"{', '.join(children) or 'none'}."
        ) from None


def fits_state(module: nn.Module, weights: Mapping[str, Tensor]) -> bool:
    """True if a state_dict has the module's keys and shapes."""
    here = module.state_dict()
    return here.keys() == weights.keys() and all(
        getattr(value, "shape", None) == getattr(weights[name], "shape", None) for name, value in here.items()
    )


def says_forward(pl_module: nn.Module) -> bool:
    """True if the module's class, below Lightning's own, says how it is called."""
    written = getattr(type(pl_module).forward, "__qualname__", "")
    return "forward" in vars(pl_module) or not written.startswith(("LightningModule.", "_forward_unimplemented"))


def averages_beside(trainer: Any) -> list[tuple[Any, nn.Module]]:
    """Callbacks that keep an average of the weights (StochasticWeightAveraging, WeightAveraging), each with the module
    in which it keeps it; seen in lightning 2.6.6, which shows it nowhere else."""
    found = []
    for callback in callbacks_of(trainer):
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            inside: Any = average.module if type(average).__name__ == "AveragedModel" else average
            found.append((callback, inside))
    return found


def callbacks_of(trainer: Any) -> list[Any]:
    """The Trainer's callbacks, for type checkers: its class does not declare them."""
    found: list[Any] = trainer.callbacks
    return found


def is_trial(trainer: Any) -> bool:
    """True for a `fast_dev_run`, which is to show that code runs, and no training."""
    return bool(trainer.fast_dev_run)


def refuse_strategy(trainer: Any) -> None:
    """Refuses strategies under which no mask can be held, before anything else happens.

    Raises:
        StateError: it is one of `FLATTENING`.
    """
    strategy = type(trainer.strategy).__name__
    if strategy in FLATTENING:
        raise StateError(
            f"{strategy} cannot train by a recipe: {FLATTENING[strategy]}. Train with strategy='ddp', or with "
            "ModelParallelStrategy (FSDP2), which shards each parameter by itself."
        )


def refuse_what_cannot_work(manager: ScheduledModifierManager, trainer: Any, name: str) -> None:
    """Refuses what this recipe cannot do on this module, before anything is changed.

    Args:
        manager: of the recipe.
        trainer: its module, its strategy and its other callbacks are looked at.
        name: the submodule that the recipe is about; empty: all of it.

    Raises:
        StateError: channels under DDP, averages of what changes its tensors.
        ArgumentError: the module cannot be called, and the recipe has to see how it is.
    """
    pl_module, wrapped = trainer.lightning_module, trainer.strategy.model
    cuts = any(modifier.cuts() for modifier in manager.modifiers)
    if cuts and wrapped is not None and is_distributed(wrapped):
        raise StateError(
            "channels cannot be removed while DistributedDataParallel holds their gradients. Mask them in training "
            "(shrink: false, no LayerThinningModifier), and call sparsify.shrink(model, sample_inputs) afterwards."
        )
    quantizes = any(modifier.kind == "quantization" for modifier in manager.modifiers)
    for callback, _ in averages_beside(trainer):
        if cuts or (quantizes and getattr(callback, "_use_buffers", False)):
            raise StateError(
                f"{type(callback).__name__} pairs the module's tensors with those of a copy by their order, and this "
                f"recipe {'removes channels' if cuts else 'adds quantizers'} in between. Leave the callback out, or "
                "average in a run of its own that only prunes."
            )
    asks = [type(m).__name__ for m in manager.modifiers if m.traces or m.kind == "distillation"]
    if asks and not name and not says_forward(pl_module):
        children = [child for child, inside in pl_module.named_children() if any(True for _ in inside.parameters())]
        raise ArgumentError(
            f"{asks[0]} looks at calls of the model, and {type(pl_module).__name__} has no forward(): name the "
            f"submodule that training_step calls, SparsifyCallback(..., model={next(iter(children), 'net')!r}). It has "
            f"{', '.join(children) or 'none'}."
        )
