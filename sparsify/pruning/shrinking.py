"""Removes masked channels: a smaller model that computes the same.

All of a channel is masked: its rows, biases, norms and tables, and the columns of all layers that read it. A channel
that is removed then meets only zero columns, and removing it changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsify.model.signature import SampleInputs, check_module
from sparsify.model.wrappers import is_distributed, unwrapped
from sparsify.output.tables import DisplayedText
from sparsify.pruning.dry_run import RemovalCheck, find_groups
from sparsify.pruning.group_masks import dead_channels
from sparsify.pruning.removal import PrunedChannels, Removal, parameter_count, plan_removal, remove

__all__ = ["Shrunk", "shrink"]


@dataclass(frozen=True)
class Shrunk(DisplayedText):
    """The result of `shrink`. `str()` is a table.

    Attributes:
        parameters_before, parameters_after: the number of weights.
        widths: {channel group: (channels before, after)} of those that became smaller.
        whole: {weight or channel group: why nothing of it was removed, or not all whose weights are zero}.
        removal: the indices that stay in each tensor, to be applied to a copy (`apply_to`).
    """

    parameters_before: int
    parameters_after: int
    widths: Mapping[str, tuple[int, int]]
    whole: Mapping[str, str]
    removal: Removal

    def apply_to(self, model: nn.Module, optimizer: Any = None) -> None:
        """Removes the same channels from another model of the same shapes, such as an EMA copy or one to load into.

        Args:
            model: of the shapes that the shrunk model had before.
            optimizer: its state of the weights is cut along.

        Raises:
            StateError: it has other shapes; it was not changed.
        """
        remove(unwrapped(model), self.removal, optimizer)

    def __str__(self) -> str:
        kept = self.parameters_after / max(self.parameters_before, 1)
        lines = [f"{self.parameters_before:,} -> {self.parameters_after:,} weights ({kept:.1%} kept)"]
        if not self.widths:
            lines.append("No channel was dead: nothing was removed.")
        widest = max((len(name) for name in self.widths), default=0)
        lines += [f"  {name:<{widest}}  {before:>6} -> {after}" for name, (before, after) in self.widths.items()]
        reasons: dict[str, list[str]] = {}
        for name, why in self.whole.items():
            reasons.setdefault(why, []).append(name)
        if reasons:
            lines.append("Kept whole:")
        lines += [f"  {_some(names)}: {why}" for why, names in reasons.items()]
        return "\n".join(lines)


def shrink(model: nn.Module, sample_inputs: Any, optimizer: Any = None) -> Shrunk:
    """Removes the channels whose weights are zero, in place; the outputs stay the same.

    A channel is dead where all columns that read it are zero, as structured pruning leaves them, or where its rows,
    biases and norms are and nothing that follows makes something of zero. What is removed was tried on a copy in
    float64 before. Parameters stay the same objects, so an optimizer goes on with them. At least one channel of each
    channel group stays.

    Args:
        model: where it is wrapped by torch.compile, the module inside is shrunk. Not under a live
            DistributedDataParallel.
        sample_inputs: a tensor, a tuple of arguments or a dictionary of keywords, as the model is called with.
        optimizer: its state of the weights is cut along. Call between its steps.

    Raises:
        ArgumentError: the model cannot be copied, or not traced on these inputs; the message says where.
        StateError: it is wrapped by DistributedDataParallel.
        DataError: its outputs on these inputs are not finite. Nothing was changed.
    """
    check_module(model)
    if is_distributed(model):
        remove(model, Removal({}))  # says what to do
    model = unwrapped(model)
    call = SampleInputs.of(model, sample_inputs)
    args, kwargs = call.arguments(list(call.inputs.values()))
    channel_groups = find_groups(model, args, kwargs)
    whole = dict(channel_groups.whole)
    sure, likely = dead_channels(model, channel_groups), dead_channels(model, channel_groups, by_rows=True)
    check = RemovalCheck(model, args, kwargs, randomized=False)
    pruned: PrunedChannels = likely
    if any(likely.values()) and check.mismatch(channel_groups, likely) is not None:
        pruned, wrong = check.exact_part(channel_groups, sure)
        whole |= wrong
        for name in likely:
            if set(likely[name]) - set(pruned.get(name, ())) and name not in wrong:
                more = {**pruned, name: likely[name]}
                why = check.mismatch(channel_groups, more)
                if why is None:
                    pruned = more
                else:
                    stay = len(set(likely[name]) - set(pruned.get(name, ())))
                    whole[name] = f"weights of {stay} channels are zero, yet they are at work: {why}"
    pruned = {name: channels for name, channels in pruned.items() if channels}
    before = parameter_count(model)
    removal = plan_removal(model, channel_groups, pruned)
    remove(model, removal, optimizer)
    sizes = {name: channel_groups.groups[name].size for name in pruned}
    widths = {name: (sizes[name], sizes[name] - len(set(channels))) for name, channels in pruned.items()}
    return Shrunk(before, parameter_count(model), widths, whole, removal)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
