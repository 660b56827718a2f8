"""The argument `optimizer` of `modify`: one, or several in a list or a dict, of which one counts the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsify.errors import ArgumentError, did_you_mean
from sparsify.model.optimizer_hooks import SteppableOptimizer, innermost_optimizer

__all__: list[str] = []

OneOrMoreOptimizers = SteppableOptimizer | Sequence[SteppableOptimizer] | Mapping[str, SteppableOptimizer]


@dataclass(frozen=True)
class GivenOptimizers:
    """The optimizers of one run, in the user's order.

    Attributes:
        optimizers: as they were given, wrappers included.
        form: what they came in: a list, a tuple, a mapping, or the optimizer itself.
        counting: the position of the one whose steps are counted.
    """

    optimizers: tuple[Any, ...]
    form: Any
    counting: int = 0

    def returned(self, goes_on: Sequence[Any]) -> Any:
        """The optimizers to go on with, in the form in which they were given."""
        if isinstance(self.form, Mapping):
            return dict(zip(self.form, goes_on, strict=True))
        if isinstance(self.form, list | tuple):
            return tuple(goes_on) if isinstance(self.form, tuple) else list(goes_on)
        return goes_on[0]


def given_optimizers(optimizer: object, counting: object = None) -> GivenOptimizers:
    """The optimizers in `optimizer`: itself, or those in a list, a tuple or a dict.

    Args:
        optimizer: what the user gave.
        counting: the index or the key of the one whose steps count; None: the first.

    Raises:
        ArgumentError: one of them is no optimizer, one is there twice, or `counting` names none of them.
    """
    several = isinstance(optimizer, list | tuple | Mapping) and bool(optimizer)
    if not several:
        innermost_optimizer(optimizer)
        if counting is not None and (isinstance(counting, bool) or counting != 0):
            raise ArgumentError(f"counting_optimizer: {counting!r} chooses among several optimizers; there is one.")
        return GivenOptimizers((optimizer,), optimizer)
    pairs = list(optimizer.items() if isinstance(optimizer, Mapping) else enumerate(optimizer))  # type: ignore[arg-type]
    seen: dict[int, Any] = {}
    for key, one in pairs:
        inner = innermost_optimizer(one, where=f"optimizer[{key!r}]")
        if id(inner) in seen:
            raise ArgumentError(
                f"optimizer: {seen[id(inner)]!r} and {key!r} are the same {type(inner).__name__}; give each once."
            )
        seen[id(inner)] = key
    keys = [key for key, _ in pairs]
    if counting is None:
        chosen = 0
    elif not isinstance(counting, bool) and counting in keys:
        chosen = keys.index(counting)
    else:
        hint = did_you_mean(counting, keys) if isinstance(counting, str) and isinstance(optimizer, Mapping) else ""
        raise ArgumentError(
            f"counting_optimizer: {counting!r} names none of the {len(keys)} optimizers; give one of "
            f"{', '.join(map(repr, keys))}, the one that steps once in every round.{hint}"
        )
    return GivenOptimizers(tuple(one for _, one in pairs), optimizer, chosen)
