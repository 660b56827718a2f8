"""Sentences and tests on pruning that is not as its writer may expect: shares that round to nothing, zeros only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from sparsify.model import sharding

__all__: list[str] = []


def rounding_doubts(who: str, shares: Sequence[tuple[str, float, int, int]]) -> list[str]:
    """Sentences on shares that come to none or to all of a tensor's units.

    Args:
        who: the modifier.
        shares: of each tensor its name with the share in words, the share, and how many go of how many units.
    """
    said = []
    nothing = [text for text, share, count, _ in shares if share > 0.0 and not count]
    if nothing:
        said.append(
            f"{who}: final_sparsity rounds to nothing in {first_of(nothing)}: nothing is pruned there. Give a higher "
            "one, or smaller units (mask_type, multiple)."
        )
    everything = [text for text, share, count, units in shares if share < 1.0 and count == units]
    if everything:
        said.append(
            f"{who}: final_sparsity rounds to all of {first_of(everything)}: nothing is left there. Give a lower one, "
            "or leave them out."
        )
    return said


def only_zeros(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """The parameters that hold nothing but zeros, as many do before training: `lora_B`, the last norm of a residual
    block, a new head. Collective where they are sharded."""
    there = {name: p for name, p in parameters.items() if p.numel() and not p.is_meta}
    return [name for name, count in sharding.zeros(there).items() if count == there[name].numel()]


def first_of(texts: Sequence[str]) -> str:
    """The first few, and how many there are."""
    more = f" and {len(texts) - 5} more" if len(texts) > 5 else ""
    return f"{', '.join(texts[:5])}{more}"
