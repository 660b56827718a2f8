"""Masked channels -> a really smaller model that computes the same.

What is masked is the whole deletion set of a channel: its rows, biases, norms and tables, and the columns of all who
read it. Then a channel that goes meets only zero columns, and removing it changes nothing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError, DataError
from sparsify.model.preserved import preserved, preserved_rng
from sparsify.model.signature import SampleInputs, check_module, named_outputs
from sparsify.model.targets import is_finite
from sparsify.model.wrappers import is_distributed, unwrapped
from sparsify.pruning.groups import ChannelGroup, ChannelGroups, GroupMember, find
from sparsify.pruning.removal import PrunedChannels as Gone
from sparsify.pruning.removal import Removal as Removal
from sparsify.pruning.removal import numbers_in_code, parameter_count, tensors
from sparsify.pruning.removal import plan_removal as plan_removal
from sparsify.pruning.removal import remove as remove

__all__ = ["Shrunk", "shrink"]

log = logging.getLogger("sparsify")

_DOUBLE, _SINGLE = 1e-6, 1e-3
"""What two computations of one model may differ, relative to the largest output. Far above rounding, far below what a
wrong removal does: in float64 (code may compute a part in float32), and where a model takes float32 only."""


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` did. `str()` is a table.

    Attributes:
        parameters_before, parameters_after: the number of weights.
        widths: {channel group: (channels before, after)} of those that became smaller.
        whole: {weight or channel group: why nothing of it was removed, or not all whose weights are zero}.
        removal: what was done, to be applied to a copy (`apply_to`).
    """

    parameters_before: int
    parameters_after: int
    widths: Mapping[str, tuple[int, int]]
    whole: Mapping[str, str]
    removal: Removal

    def apply_to(self, model: nn.Module, optimizer: Any = None) -> None:
        """Does the same to another model of the same shapes: an EMA copy, or a fresh one that a checkpoint goes into.

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
    """Removes for good the channels whose weights are zero, in place; the outputs stay what they are.

    A channel is dead where all columns that read it are zero, as structured pruning leaves them, or where its rows,
    biases and norms are and nothing that follows makes something of zero. What is removed was tried on a copy in
    float64 before. Parameters stay the same objects, so an optimizer goes on with them. At least one channel of each
    channel group stays.

    Args:
        model: where it is wrapped by torch.compile, the module inside is shrunk. Not under a live
            DistributedDataParallel.
        sample_inputs: a tensor, a tuple of arguments or a dictionary of keywords, as the model is called with.
        optimizer: what it remembers of the weights is cut along. Call between its steps.

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
    channel_groups = dry_run(model, find(model, args, kwargs), args, kwargs)
    whole = dict(channel_groups.whole)
    sure, likely = _dead(model, channel_groups, wide=False), _dead(model, channel_groups, wide=True)
    judge = _Judge(model, args, kwargs, shaken=False)
    pruned: Gone = likely
    if any(likely.values()) and judge.why_wrong(channel_groups, likely) is not None:
        pruned, wrong = judge.right(channel_groups, sure)
        whole |= wrong
        for name in likely:
            if set(likely[name]) - set(pruned.get(name, ())) and name not in wrong:
                one = {**pruned, name: likely[name]}
                why = judge.why_wrong(channel_groups, one)
                if why is None:
                    pruned = one
                else:
                    stay = len(set(likely[name]) - set(pruned.get(name, ())))
                    whole[name] = f"weights of {stay} channels are zero, yet they are at work: {why}"
    pruned = {name: channels for name, channels in pruned.items() if channels}
    before = parameter_count(model)
    removal = plan_removal(model, channel_groups, pruned)
    remove(model, removal, optimizer)
    widths = {
        name: (channel_groups.groups[name].size, channel_groups.groups[name].size - len(c))
        for name, c in pruned.items()
    }
    return Shrunk(before, parameter_count(model), widths, whole, removal)


# ---------------------------------------------------------------------- masks and zeros


def deletion_masks(model: nn.Module, channel_groups: ChannelGroups, pruned: Gone) -> dict[str, Tensor]:
    """The deletion set of channels as masks of parameters, True where kept; all that `pruned` names have a part in.

    A tensor that belongs to two channel groups has the zeros of both.
    """
    here = {name: t for name, t in tensors(model).items() if isinstance(t, nn.Parameter)}
    masks: dict[str, Tensor] = {}
    for name, channels in pruned.items():
        lost = set(channels)
        for place in channel_groups.groups[name].places:
            parameter = here.get(place.tensor)
            if parameter is None:
                continue
            if place.tensor not in masks:
                masks[place.tensor] = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
            index = [i for i, channel in enumerate(place.channels) if channel in lost]
            if index:
                masks[place.tensor].index_fill_(place.dim, torch.tensor(index, device=parameter.device), False)
    return masks


def dead(model: nn.Module, channel_groups: ChannelGroups) -> dict[str, tuple[int, ...]]:
    """The channels of each channel group that can go by their zeros: all that read them are zero, or the whole deletion
    set.

    At least one channel of each channel group is left out.
    """
    return _dead(model, channel_groups, wide=False)


def _dead(model: nn.Module, channel_groups: ChannelGroups, *, wide: bool) -> dict[str, tuple[int, ...]]:
    """`wide`: also those whose rows, biases and norms are zero, though what reads them is not."""
    here = {name: t.detach() for name, t in tensors(model).items() if isinstance(t, nn.Parameter)}
    found = {}
    for name, channel_group in channel_groups.groups.items():
        columns = _all_zero(channel_group, here, lambda place: place.role == "column")
        # By position: a row is among the zeros of the whole set as well.
        made = _all_zero(channel_group, here, lambda place: place.role != "column")
        rows = _all_zero(channel_group, here, lambda place: place.role == "row")
        channels = [
            c
            for c in range(channel_group.size)
            if (columns is not None and columns[c])
            or (wide and made is not None and rows is not None and made[c])
            or (columns is None and made is not None and made[c])
        ]
        found[name] = tuple(channels[: channel_group.size - 1])
    return found


def _all_zero(
    channel_group: ChannelGroup, here: Mapping[str, Tensor], which: Callable[[GroupMember], bool]
) -> list[bool] | None:
    """For each channel, whether all its slices in these places are zero; None where there is no such place."""
    zero: Tensor | None = None
    for place in channel_group.places:
        tensor = here.get(place.tensor)
        if tensor is None or not which(place):
            continue
        alive = tensor.movedim(place.dim, 0).reshape(tensor.shape[place.dim], -1).ne(0).any(dim=1).cpu()
        channel_of = torch.tensor(place.channels)
        mine = channel_of >= 0
        used = torch.zeros(channel_group.size, dtype=torch.int64).index_add_(0, channel_of[mine], alive[mine].long())
        zero = used == 0 if zero is None else zero & (used == 0)
    return None if zero is None else list(zero.tolist())


# ---------------------------------------------------------------------- the dry run


def dry_run(
    model: nn.Module,
    channel_groups: ChannelGroups,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    fraction: float = 0.5,
) -> ChannelGroups:
    """The channel groups of which `fraction` was masked and removed on a copy, with equal outputs; the others become
    whole.

    On a copy in float64 whose norms and zero weights have random values, so that nothing is equal by chance; the model
    itself, its modes and the random state are not touched. Costs two copies and three forward passes of two samples;
    where something is wrong two more passes for each kind of channel group and each channel group of a wrong kind.

    Raises:
        DataError: the model's outputs on these inputs are not finite.
    """
    if not channel_groups.groups:
        return channel_groups
    generator = torch.Generator().manual_seed(0)
    pruned = {}
    for name, channel_group in channel_groups.groups.items():
        number = min(max(round(channel_group.size * fraction), 1), channel_group.size - 1)
        pruned[name] = tuple(sorted(torch.randperm(channel_group.size, generator=generator)[:number].tolist()))
    judge = _Judge(model, args, kwargs or {}, shaken=True)
    channel_groups = judge.with_constants(channel_groups, pruned)
    right, wrong = judge.right(channel_groups, pruned)
    if not wrong:
        return channel_groups
    whole = dict(channel_groups.whole)
    for name, why in wrong.items():
        for row in channel_groups.groups[name].rows:
            whole.setdefault(row, why)
    return replace(channel_groups, groups={n: f for n, f in channel_groups.groups.items() if n in right}, whole=whole)


class _Judge:
    """Whether removing channels leaves the outputs what they are, tried on copies.

    Args:
        shaken: with random values for norms and zeros, and masked before; otherwise with the weights as they are.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, shaken: bool) -> None:
        self.shaken = shaken
        small = _first_two((args, kwargs))
        # In float32 where a part of the model is fixed to it, by a cast in its code; with the whole batch where code
        # counts on its size.
        ways = [(small, torch.float64), ((args, kwargs), torch.float64), (small, torch.float32)]
        for given, dtype in ways:
            try:
                self._begin(model, given, dtype)
                break
            except (RuntimeError, TypeError, ValueError):
                continue
        else:
            self._begin(model, (args, kwargs), torch.float32)
        for name, output in self.expected.items():
            if not is_finite(output):
                raise DataError(
                    f"the model's output {name!r} is not finite on these inputs, so nothing can be compared. Check the "
                    "inputs and the weights."
                )

    def _begin(self, model: nn.Module, given: Any, dtype: torch.dtype) -> None:
        self.tolerance = _DOUBLE if dtype == torch.float64 else _SINGLE
        self.args, self.kwargs = _cast(given, dtype)
        self.model = _copy(model).to(dtype).eval()
        if self.shaken:
            _shake(self.model)
        self.expected = self._outputs(self.model)

    def _outputs(self, model: nn.Module) -> dict[str, Tensor]:
        with preserved_rng(model), torch.no_grad():
            given, _ = named_outputs(model(*self.args, **self.kwargs))
        return {name: value for name, value in given.items() if value.is_floating_point()}

    def why_wrong(self, channel_groups: ChannelGroups, pruned: Gone) -> str | None:
        """Why these channels cannot go, or None where they can."""
        expected = self.expected
        tried = _copy(self.model)
        if self.shaken:
            masks = deletion_masks(tried, channel_groups, pruned)
            here = tensors(tried)
            with torch.no_grad():
                for name, mask in masks.items():
                    here[name].mul_(mask)
            expected = self._outputs(tried)
        try:
            remove(tried, plan_removal(tried, channel_groups, pruned))
            given = self._outputs(tried)
        # Any code of a user may stand in forward, and fail on other shapes in any way.
        except Exception as error:
            text = str(error).strip().splitlines()
            first = text[0][:160] if text else ""
            return f"the smaller model fails: {type(error).__name__}: {first}"
        if given.keys() != expected.keys():
            return "the smaller model gives other outputs"
        for name, output in expected.items():
            if given[name].shape != output.shape:
                return f"the smaller model's {name} has shape {tuple(given[name].shape)}, not {tuple(output.shape)}"
            difference = (given[name] - output).abs().max().item() if output.numel() else 0.0
            # Not `difference > ...`: NaN is wrong.
            if not difference <= self.tolerance * max(output.abs().max().item() if output.numel() else 0.0, 1e-30):
                return f"the smaller model computes something else: its {name} is {difference:.1e} off"
        return None

    def with_constants(self, channel_groups: ChannelGroups, pruned: Gone) -> ChannelGroups:
        """With the numbers in user's code that are equal to a size by chance told from those that follow it.

        Each name alone, in the kinds of channel groups that are wrong otherwise: T5 has 32 buckets of positions, and
        may have 32 channels of attention.
        """
        for kind in dict.fromkeys(channel_groups.groups[name].kind for name in pruned):
            alike = {name: channels for name, channels in pruned.items() if channel_groups.groups[name].kind == kind}
            if self.why_wrong(channel_groups, alike) is None:
                continue
            numbers = numbers_in_code(self.model, channel_groups, alike)
            for name in dict.fromkeys(name for values in numbers.values() for name in values):
                tried = replace(channel_groups, constants=channel_groups.constants | {name})
                if self.why_wrong(tried, alike) is None:
                    channel_groups = tried
                    break
        return channel_groups

    def right(self, channel_groups: ChannelGroups, pruned: Gone) -> tuple[dict[str, Collection[int]], dict[str, str]]:
        """Of `pruned` what can go together, and {channel group: why not} of the rest."""
        pruned = {name: channels for name, channels in pruned.items() if channels}
        if not pruned or self.why_wrong(channel_groups, pruned) is None:
            return dict(pruned), {}
        wrong: dict[str, str] = {}
        for kind in dict.fromkeys(channel_groups.groups[name].kind for name in pruned):
            alike = {name: channels for name, channels in pruned.items() if channel_groups.groups[name].kind == kind}
            if self.why_wrong(channel_groups, alike) is None:
                continue
            for name, channels in alike.items():
                why = self.why_wrong(channel_groups, {name: channels})
                if why is not None:
                    wrong[name] = why
        left = {name: channels for name, channels in pruned.items() if name not in wrong}
        together = self.why_wrong(channel_groups, left) if left else None
        if together is not None:
            wrong |= dict.fromkeys(left, f"cut together with the others, {together}")
            left = {}
        return left, wrong


def _copy(model: nn.Module) -> nn.Module:
    # Gradients are not copied, and hold no memory twice.
    with preserved(model, modes=False, buffers=False, requires_grad=False, rng=False):
        try:
            return copy.deepcopy(model)
        # Any code of a user may stand in __deepcopy__; torch refuses outputs of a graph with RuntimeError, pickle's way
        # of copying with TypeError.
        except Exception as error:
            raise ArgumentError(
                f"{type(model).__name__} cannot be copied, and removing channels is tried on a copy first: {error} "
                "Take out of its modules what a forward pass left there, such as outputs that are kept."
            ) from error


def _shake(model: nn.Module) -> None:
    """Random values where weights are equal by construction: norms, layer scales, what begins with zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in {id(t): t for t in tensors(model).values()}.values():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            # One value everywhere, or few of them: a bias, a norm, a table that begins with zeros.
            if tensor.dim() <= 1 or bool((tensor == tensor.flatten()[0]).all()):
                # On the CPU: the same on every device. Positive, for variances.
                values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.6
                tensor.copy_(values)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.detach().to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return torch.utils._pytree.tree_map(cast, value)


def _first_two(given: Any) -> Any:
    """The first two samples of a batch, where all tensors begin with one size: enough to compare, at a fraction."""
    leaves, structure = torch.utils._pytree.tree_flatten(given)
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or min(sizes) <= 2:
        return given
    return torch.utils._pytree.tree_unflatten([x[:2] if isinstance(x, Tensor) else x for x in leaves], structure)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
