"""Tries channel groups on a copy of the model, and drops those whose removal changes its outputs."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError, DataError
from sparsify.model.batches import mapped, tensors_in
from sparsify.model.preserved import preserved, preserved_rng
from sparsify.model.signature import named_outputs
from sparsify.model.targets import is_finite
from sparsify.pruning.group_masks import deletion_masks
from sparsify.pruning.groups import ChannelGroups, find_unchecked_groups
from sparsify.pruning.removal import PrunedChannels, numbers_in_code, plan_removal, remove, tensors

__all__: list[str] = []

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]

_DOUBLE, _SINGLE = 1e-6, 1e-3
"""Largest difference between two computations of one model, relative to the largest output: in float64, where code may
compute a part in float32, and where a model takes float32 only. Far above rounding, far below a wrong removal."""


def find_groups(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> ChannelGroups:
    """Finds the channel groups of `model` and keeps those that a dry run on these inputs shows to be exact.

    The model, its modes and the random state stay as they were.

    Raises:
        ArgumentError: the model cannot be traced, fails on these inputs, or cannot be copied.
        DataError: its outputs on these inputs are not finite.
    """
    return dry_run(model, find_unchecked_groups(model, args, kwargs), args, kwargs)


def dry_run(
    model: nn.Module,
    channel_groups: ChannelGroups,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    fraction: float = 0.5,
) -> ChannelGroups:
    """Keeps the channel groups of which `fraction` can be masked and then removed on a copy, with equal outputs.

    The weights of the others are in `whole`, with the reason. The copy is in float64, and its norms and zero weights
    have random values, so that nothing is equal by chance; the model itself, its modes and the random state are not
    touched. Costs two copies and three forward passes of two samples; where something is wrong, two more passes for
    each kind of channel group and for each channel group of a wrong kind.

    Raises:
        DataError: the model's outputs on these inputs are not finite.
    """
    if not channel_groups.groups:
        return channel_groups
    generator = torch.Generator().manual_seed(0)
    pruned: dict[str, Collection[int]] = {}
    for name, group in channel_groups.groups.items():
        number = min(max(round(group.size * fraction), 1), group.size - 1)
        pruned[name] = tuple(sorted(torch.randperm(group.size, generator=generator)[:number].tolist()))
    check = RemovalCheck(model, args, kwargs or {}, randomized=True)
    channel_groups = check.with_constants(channel_groups, pruned)
    exact, reasons = check.exact_part(channel_groups, pruned)
    if not reasons:
        return channel_groups
    whole = dict(channel_groups.whole)
    for name, why in reasons.items():
        for row in channel_groups.groups[name].rows:
            whole.setdefault(row, why)
    kept = {name: group for name, group in channel_groups.groups.items() if name in exact}
    return replace(channel_groups, groups=kept, whole=whole)


class RemovalCheck:
    """Compares the outputs of a model before and after channels are removed, on copies.

    Args:
        model: stays as it was.
        args: positional inputs of the model.
        kwargs: inputs of the model by name.
        randomized: the copy has random values for norms and zeros, and the channels are masked before they are removed;
            otherwise it has the weights as they are.

    Raises:
        ArgumentError: the model cannot be copied.
        DataError: its outputs on these inputs are not finite.
    """

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, randomized: bool) -> None:
        self.randomized = randomized
        small = _first_two((args, kwargs))
        # In float32 where a part of the model is fixed to it, by a cast in its code; with the whole batch where code
        # counts on its size.
        ways = [(small, torch.float64), ((args, kwargs), torch.float64), (small, torch.float32)]
        for inputs, dtype in ways:
            try:
                self._begin(model, inputs, dtype)
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

    def _begin(self, model: nn.Module, inputs: _Inputs, dtype: torch.dtype) -> None:
        self.tolerance = _DOUBLE if dtype == torch.float64 else _SINGLE
        self.args, self.kwargs = _cast(inputs, dtype)
        self.model = _copy(model).to(dtype).eval()
        if self.randomized:
            _randomize_constants_(self.model)
        self.expected = self._outputs(self.model)

    def _outputs(self, model: nn.Module) -> dict[str, Tensor]:
        with preserved_rng(model), torch.no_grad():
            outputs, _ = named_outputs(model(*self.args, **self.kwargs))
        return {name: value for name, value in outputs.items() if value.is_floating_point()}

    def mismatch(self, channel_groups: ChannelGroups, pruned: PrunedChannels) -> str | None:
        """The reason why a model without these channels is not the same model, or None where it is."""
        expected = self.expected
        tried = _copy(self.model)
        if self.randomized:
            masks = deletion_masks(tried, channel_groups, pruned)
            here = tensors(tried)
            with torch.no_grad():
                for name, mask in masks.items():
                    here[name].mul_(mask)
            expected = self._outputs(tried)
        try:
            remove(tried, plan_removal(tried, channel_groups, pruned))
            outputs = self._outputs(tried)
        # Any code of a user may stand in forward, and fail on other shapes in any way.
        except Exception as error:
            text = str(error).strip().splitlines()
            first = text[0][:160] if text else ""
            return f"the smaller model fails: {type(error).__name__}: {first}"
        if outputs.keys() != expected.keys():
            return "the smaller model gives other outputs"
        for name, output in expected.items():
            if outputs[name].shape != output.shape:
                return f"the smaller model's {name} has shape {tuple(outputs[name].shape)}, not {tuple(output.shape)}"
            difference = (outputs[name] - output).abs().max().item() if output.numel() else 0.0
            # Not `difference > ...`: NaN is wrong.
            if not difference <= self.tolerance * max(output.abs().max().item() if output.numel() else 0.0, 1e-30):
                return f"the smaller model computes something else: its {name} is {difference:.1e} off"
        return None

    def with_constants(self, channel_groups: ChannelGroups, pruned: PrunedChannels) -> ChannelGroups:
        """Adds to `constants` the numbers in a user's code that equal a size by chance and do not follow it.

        Each name is tried alone, in the kinds of channel groups that are wrong otherwise: T5 has 32 buckets of
        positions, and may have 32 channels of attention.
        """
        for alike in _by_kind(channel_groups, pruned):
            if self.mismatch(channel_groups, alike) is None:
                continue
            numbers = numbers_in_code(self.model, channel_groups, alike)
            for name in dict.fromkeys(name for values in numbers.values() for name in values):
                tried = replace(channel_groups, constants=channel_groups.constants | {name})
                if self.mismatch(tried, alike) is None:
                    channel_groups = tried
                    break
        return channel_groups

    def exact_part(
        self, channel_groups: ChannelGroups, pruned: PrunedChannels
    ) -> tuple[dict[str, Collection[int]], dict[str, str]]:
        """The part of `pruned` that can be removed together, and {channel group: reason} for the rest."""
        pruned = {name: channels for name, channels in pruned.items() if channels}
        if not pruned or self.mismatch(channel_groups, pruned) is None:
            return dict(pruned), {}
        wrong: dict[str, str] = {}
        for alike in _by_kind(channel_groups, pruned):
            if self.mismatch(channel_groups, alike) is None:
                continue
            for name, channels in alike.items():
                why = self.mismatch(channel_groups, {name: channels})
                if why is not None:
                    wrong[name] = why
        left = {name: channels for name, channels in pruned.items() if name not in wrong}
        together = self.mismatch(channel_groups, left) if left else None
        if together is not None:
            wrong |= dict.fromkeys(left, f"cut together with the others, {together}")
            left = {}
        return left, wrong


def _by_kind(channel_groups: ChannelGroups, pruned: PrunedChannels) -> list[dict[str, Collection[int]]]:
    """`pruned` in parts, one for each kind of channel group."""
    parts: dict[str, dict[str, Collection[int]]] = {}
    for name, channels in pruned.items():
        parts.setdefault(channel_groups.groups[name].kind, {})[name] = channels
    return list(parts.values())


def _copy(model: nn.Module) -> nn.Module:
    # Gradients are not copied, and hold no memory twice.
    with preserved(model, modes=False, buffers=False, requires_grad=False, rng=False):
        try:
            return copy.deepcopy(model)
        # Any code of a user may stand in __deepcopy__; torch refuses outputs of a graph with RuntimeError
        # (https://github.com/pytorch/pytorch/issues/54580), pickle's way of copying with TypeError.
        except Exception as error:
            raise ArgumentError(
                f"{type(model).__name__} cannot be copied, and removing channels is tried on a copy first: {error} "
                "Take out of its modules what a forward pass left there, such as outputs that are kept."
            ) from error


def _randomize_constants_(model: nn.Module) -> None:
    """Gives random values to tensors that are constant by construction: norms, layer scales, what begins with zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in {id(t): t for t in tensors(model).values()}.values():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            # A number of its own hides no channel unless it is 0, and may be an exponent: of any base 2 can be one.
            if tensor.numel() == 1 and bool(tensor.any()):
                continue
            # One value everywhere, or few of them: a bias, a norm, a table that begins with zeros.
            if tensor.dim() <= 1 or bool((tensor == tensor.flatten()[0]).all()):
                # On the CPU: the same on every device. Positive, for variances.
                values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 0.8 + 0.6
                tensor.copy_(values)


def _cast(inputs: _Inputs, dtype: torch.dtype) -> _Inputs:
    made: _Inputs = mapped(inputs, lambda x: x.detach().to(dtype) if x.is_floating_point() else x)
    return made


def _first_two(inputs: _Inputs) -> _Inputs:
    """The first two samples of a batch, where all tensors begin with one size: enough to compare, at a fraction."""
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors_in(inputs)}
    if len(sizes) != 1 or min(sizes) <= 2:
        return inputs
    made: _Inputs = mapped(inputs, lambda tensor: tensor[:2])
    return made
