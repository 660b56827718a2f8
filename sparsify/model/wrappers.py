"""The user's model inside the wrappers of torch and of training frameworks, and its names without theirs.

A wrapper is a module that holds the model as its child and calls it: DistributedDataParallel and DataParallel, the
OptimizedModule of torch.compile, FullyShardedDataParallel, the module that Lightning's Fabric gives, the wrappers of
activation checkpointing, the GradSampleModule of opacus, DeepSpeed's engine, and others that are called as these are.
`model.compile()` and FSDP2's `fully_shard` wrap nothing: they change the model in place. An AveragedModel is a copy,
and a model of peft holds more than the user's: neither is a wrapper.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import nn

__all__: list[str] = []

T = TypeVar("T")

# The children under which wrappers hold what they wrap, in the order in which they are looked for. Each but "module" is
# private to one wrapper, and tells it without an import of its package.
COMPILED = "_orig_mod"
FABRIC = "_forward_module"
FABRIC_ORIGINAL = "_original_module"
FSDP = "_fsdp_wrapped_module"
CHECKPOINTED = "_checkpoint_wrapped_module"
FLATTENED = "_fpw_module"
PARALLEL = "module"
SAMPLED = "_module"

WRAPPER_PARTS = frozenset({PARALLEL, COMPILED, FSDP, CHECKPOINTED, FLATTENED, FABRIC, FABRIC_ORIGINAL, SAMPLED})
"""What wrappers put into the path of a parameter."""

# Wrappers whose child has a name that a user may give too: known by their class, or by one above it, of any library.
_BY_CLASS = {
    "DistributedDataParallel": PARALLEL,  # torch, apex
    "DataParallel": PARALLEL,
    "ShardedDataParallel": PARALLEL,  # fairscale
    "DifferentiallyPrivateDistributedDataParallel": PARALLEL,  # opacus
    "DeepSpeedEngine": PARALLEL,
    "AbstractGradSampleModule": SAMPLED,  # opacus
    "GradSampleModule": SAMPLED,
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside any number of wrappers in any order; `model` itself where there is none."""
    return list(unwrapping(model))[-1]


def unwrapping(model: nn.Module) -> Iterator[nn.Module]:
    """`model`, what it wraps, and so on inward; the user's module comes last."""
    yield model
    inside = model._modules
    part = next((part for name, part in _BY_CLASS.items() if _is_a(model, name)), None)
    inner: nn.Module | None = None
    if part is not None:
        inner = inside.get(part)
    elif FABRIC in inside and FABRIC_ORIGINAL in inside:
        # The module that the strategy calls (DistributedDataParallel) comes first, to be seen; not every strategy's
        # wrapper is one that we know (DeepSpeed), and what it wraps is then known by the other name.
        layers = list(unwrapping(inside[FABRIC]))  # type: ignore[arg-type]
        original = list(unwrapping(inside[FABRIC_ORIGINAL]))  # type: ignore[arg-type]
        yield from layers
        yield from original if original[-1] is not layers[-1] else ()
        return
    else:
        # No `or`: an empty Sequential is false.
        inner = next((inside[part] for part in (COMPILED, FSDP, CHECKPOINTED, FLATTENED) if part in inside), None)
    if inner is not None:
        yield from unwrapping(inner)


def is_distributed(model: nn.Module) -> bool:
    """True if DistributedDataParallel holds buffers for the gradients of `model`."""
    return data_parallel(model) is not None


def data_parallel(model: nn.Module) -> nn.Module | None:
    """The DistributedDataParallel around the user's module; None: there is none."""
    return next((layer for layer in unwrapping(model) if _is_a(layer, "DistributedDataParallel")), None)


def joins_uneven_inputs(parallel: nn.Module) -> bool:
    """True inside `parallel.join()`, where ranks may have different numbers of batches.

    Not where all of them stop with the first. Seen in torch 2.13.0: `Join` keeps its settings in `_join_config`.
    """
    config = getattr(parallel, "_join_config", None)
    return bool(getattr(config, "enable", False)) and not config.throw_on_early_termination  # type: ignore[union-attr]


def is_compiled(model: nn.Module) -> bool:
    """True if calls of `model` run compiled code, in which hooks are not called."""
    return any(COMPILED in layer._modules or layer._compiled_call_impl is not None for layer in unwrapping(model))


def clean_name(name: str) -> str:
    """`name` without the path components that wrappers add.

    >>> clean_name("module._orig_mod.fc.weight"), clean_name("modules.fc.weight")
    ('fc.weight', 'modules.fc.weight')
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS)


def by_clean_name(pairs: Iterable[tuple[str, T]]) -> dict[str, T]:
    """The values by clean name. Where a model calls its own layer "module", two may become one: the later stays raw."""
    named: dict[str, T] = {}
    for raw, value in pairs:
        clean = clean_name(raw)
        if clean in named and named[clean] is value:
            continue
        # The outermost comes first, and a wrapper and what it wraps have one name: the innermost is the user's module.
        if clean in named and isinstance(value, nn.Module) and raw != clean and raw.rpartition(".")[2] in WRAPPER_PARTS:
            named[clean] = value
        else:
            named[clean if clean not in named else raw] = value
    return named


def _is_a(model: nn.Module, name: str) -> bool:
    """True if a class of that name, torch's or another library's (apex), is the class of `model` or one above it."""
    return any(cls.__name__ == name for cls in type(model).__mro__)
