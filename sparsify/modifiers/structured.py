"""Gradual pruning of whole channels, with all members of their channel group, and their removal at the end."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from sparsify.errors import SparsifyWarning, StateError, TargetError
from sparsify.model import distributed, targets
from sparsify.modifiers.base import Active, Run
from sparsify.modifiers.doubts import rounding_doubts
from sparsify.modifiers.gradual import GradualPruning
from sparsify.modifiers.schedule import Clock, UpdateGrid, between
from sparsify.output.field_errors import FieldProblem
from sparsify.pruning import group_scores

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.pruning.groups import ChannelGroup, ChannelGroups
    from sparsify.pruning.removal import Removal

__all__ = ["StructuredPruningModifier"]

_CONVOLUTION_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class StructuredPruningModifier(GradualPruning):
    """Gradual pruning of whole channels, with all that hangs together with them, so that they can be removed.

    Channels that must go together are one channel group, found in the traced model: the rows of all layers that give
    them, their biases, norms and tables, and the columns of all layers that read them. All of that is masked, so
    removing it changes nothing. A head of attention is one channel. A sparsity is a fraction of a channel group's
    channels: exactly round(n * sparsity) of n are masked at every update, those of least importance first. The
    importance of a channel is the L2 norm of its rows and columns in all weights of the group; with `global_sparsity`
    it is in units of the group's mean, in one ranking.

    How many channels stay at the end is rounded to `multiple`, and the ramp leads there; with `global_sparsity` every
    update is rounded. Only channel groups that a dry run found to be exact are masked. What else `params` names is
    reported with the reason. Inputs of the model are needed: `sample_inputs` of modify(), or the first forward, which
    then sets the masks that are due at the very start before it computes. The rest is as GMPruningModifier.
    """

    sharded: ClassVar[bool] = False
    traces: ClassVar[bool] = True
    whole_channels: ClassVar[bool] = True

    mask_type: Literal["filter", "channel"] = Field(
        default="filter",
        description="What `params` names: weights that give the channels (filter), or that read them (channel). The "
        "same is masked either way.",
    )
    param_groups: list[list[str]] | None = Field(
        default=None,
        description="Legacy: names of parameters whose channels must go together. Checked against the channel groups "
        "that are found, which go together in any case; null: nothing to check.",
    )
    multiple: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="The number of channels that stay is rounded to the nearest multiple of this. null: what is fast "
        "to compute, for channel groups with convolutions 16, 8 from 16 to 31 channels, 4 below; 1: exact.",
    )
    limits: dict[str, float] = Field(
        default_factory=dict,
        description="Name or pattern of weights or layers -> the highest fraction of its channels that may be removed.",
    )
    shrink: bool = Field(
        default=False, description="Whether masked channels are removed for good at end_epoch: the model gets smaller."
    )

    @field_validator("limits")
    @classmethod
    def _limits(cls, value: dict[str, float]) -> dict[str, float]:
        for name, limit in value.items():
            if not 0.0 <= limit <= 1.0:
                hint = f"; did you mean {limit / 100:g}?" if 1.0 < limit <= 100.0 else ""
                raise FieldProblem("limits", f"{limit} for {name!r} is not a fraction in [0, 1]{hint}")
        return value

    @model_validator(mode="after")
    def _for_good(self) -> StructuredPruningModifier:
        if self.shrink and not self.leave_enabled:
            raise FieldProblem("shrink", "true removes at end_epoch what leave_enabled: false lets grow back; drop one")
        return self

    def cuts(self) -> tuple[float, ...]:
        """The end, where it shrinks the model."""
        return (self.window.end,) if self.shrink else ()

    def last(self, name: str, module: nn.Module, units: int, final: float) -> float:
        """The fraction of channels that go, as `multiple` and `limits` round it.

        By the shape of the weight alone: where channels hang together in heads or groups, only the traced model tells.
        """
        if self.global_sparsity:
            return final
        bounds = group_scores.Bounds.of(units, self._multiple(module, units), self._limit(name))
        return (units - bounds.nearest(units - round(units * final))) / units

    def _multiple(self, module: nn.Module, units: int) -> int:
        if self.multiple is not None:
            return self.multiple
        return group_scores.fast_width(units) if isinstance(module, _CONVOLUTION_LAYERS) else 1

    def _limit(self, name: str) -> float:
        # A pattern or a type may mean it too: then the traced model tells.
        return min((self.limits[n] for n in (name, name.rpartition(".")[0]) if n in self.limits), default=1.0)

    def doubts(self, model: nn.Module | None) -> list[str]:
        """Those of every gradual pruning; and that released channels do not learn."""
        said = self._released()
        if model is None or self.global_sparsity:
            return said
        shares = []
        for name, module, final, units in self._units(model):
            count = round(units * self.last(name, module, units, final))
            shares.append((share_of_channels(name, final, units, self._multiple(module, units)), final, count, units))
        return [*said, *rounding_doubts(type(self).__name__, shares)]

    def _released(self) -> list[str]:
        return [
            *super().doubts(None),
            *(
                f"{type(self).__name__}: a channel that is released has zeros in all its weights, so it gets no "
                "gradient and stays as it is. GMPruningModifier with mask_type: filter releases rows that learn."
                for _ in self.falling()[:1]
            ),
        ]

    def attach(self, run: Run) -> Active:
        """Checks names, and channel groups too where inputs are known.

        Raises:
            TargetError: nothing that is named can be cut, or not as it says.
            RecipeError: another modifier is at work on the same weights.
        """
        return _Structured(self, run)


def share_of_channels(name: str, final: float, size: int, multiple: int) -> str:
    """A share of the channels of a weight, in words, with the number that those that stay are rounded to."""
    grain = f", those that stay in multiples of {multiple}" if 1 < multiple <= size else ""
    return f"{name!r} ({final:g} of {size} channels{grain})"


class _Structured(Active):
    """Masks channels by the schedule.

    Checkpoint: the point of the grid in force, if masks were released, and by channel group the channels that are
    masked, the numbers of channels at the start and removed since, and the sparsity at the start. The removal itself is
    in the session's state.
    """

    def __init__(self, modifier: StructuredPruningModifier, run: Run) -> None:
        self.modifier, self.run = modifier, run
        self.who = type(modifier).__name__
        self.grid = UpdateGrid(modifier.window, modifier.update_frequency)
        self.named = self._named()
        self.limits = self._limits()
        self.point: float | None = None
        self.released = False
        self.pruned: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[str, int] = {}
        self.removed: dict[str, int] = {}
        self.initials: dict[str, float] = {}
        self.clock: Clock | None = None
        self.asked = False
        self.traced: ChannelGroups | None = None
        self.channel_groups: dict[str, ChannelGroup] = {}
        self.finals: dict[str, float] = {}
        self.frozen: dict[str, str] = {}
        self.partly = False
        if run.inputs.given is not None and not run.goes_on:
            # What cannot be is found before anything is changed; the channel groups are asked for again when they are
            # needed.
            self._claim(run.channels.groups(*run.inputs.given))
            doubts = [*modifier.doubts(None), *self._rounding()]
            self.traced, self.channel_groups = None, {}
        else:
            doubts = modifier.doubts(run.model)
        for text in doubts:
            warnings.warn(text, SparsifyWarning, stacklevel=2)

    def _rounding(self) -> list[str]:
        """Shares that come to no channel or to all of a channel group."""
        if self.modifier.global_sparsity:
            return []
        shares = []
        for name, group in self.channel_groups.items():
            bounds, final, size = self._bounds(group, group.size), self.finals[name], group.size
            count = size - bounds.nearest(size - round(size * final))
            shares.append((share_of_channels(name, final, size, bounds.multiple), final, count, size))
        return rounding_doubts(self.who, shares)

    def _bounds(self, group: ChannelGroup, size: int) -> group_scores.Bounds:
        """The numbers of channels that may stay of the `size` that were there at the start."""
        limit = min((self.limits[w] for w in (*group.rows, *group.columns) if w in self.limits), default=1.0)
        return group_scores.Bounds.of(size, group_scores.multiple_of(group, self.modifier.multiple), limit)

    def _named(self) -> dict[str, float]:
        """The final sparsity by weight."""
        modifier, model = self.modifier, self.run.model
        where = f"{self.who}.{'params' if modifier.params else 'final_sparsity'}"
        named: dict[str, float] = {}
        for final, names in modifier.final_by_names().items():
            parameters = targets.resolve_parameters(model, names, where=where, strict=modifier.strict, to_mask=True)
            targets.refuse_unusable(parameters, where=where)
            for name in parameters:
                if name in named:
                    raise TargetError(f"{where}: {name!r} has two sparsities, {named[name]} and {final}. Name it once.")
                named[name] = final
        return named

    def _limits(self) -> dict[str, float]:
        """The highest fraction that may be removed, by weight; of several the lowest."""
        found: dict[str, float] = {}
        for name, limit in self.modifier.limits.items():
            where = f"{self.who}.limits"
            for weight in targets.resolve_parameters(self.run.model, [name], where=where, strict=self.modifier.strict):
                found[weight] = min(limit, found.get(weight, 1.0))
        return found

    # ------------------------------------------------------------------ what is cut

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds the channel groups on the inputs of one call of the model."""
        if self.traced is None and not self._over():
            self._claim(self.run.channels.groups(args, kwargs))
            self._report()
        self._advance()

    def _claim(self, traced: ChannelGroups) -> None:
        """Claims the channel groups that are named."""
        self._check_groups(traced)
        parameters = targets.named_parameters(self.run.model)
        meant: dict[str, ChannelGroup] = {}
        for name, group in traced.groups.items():
            finals = {self.named[weight] for weight in self._side(group) if weight in self.named}
            if len(finals) > 1:
                raise TargetError(
                    f"{self.who}.final_sparsity: channels of {', '.join(map(repr, self._side(group)))} "
                    f"go together, but have {len(finals)} sparsities, {', '.join(map(str, sorted(finals)))}. "
                    "Give them one."
                )
            if finals and group.size > 1:
                meant[name], self.finals[name] = group, finals.pop()
        if not meant:
            raise TargetError(
                f"{self.who}.params: nothing that is named can be cut in {type(self.run.model).__name__}: "
                f"{self._reasons(traced, meant)}. It can cut the channels of "
                f"{', '.join(map(repr, list(traced.groups)[:8])) or 'no layer'}."
            )
        frozen = {
            name: member.tensor
            for name, group in meant.items()
            for member in group.members
            if member.tensor in parameters and not parameters[member.tensor].requires_grad
        }
        self.frozen = {name: tensor for name, tensor in frozen.items() if name not in self.pruned}
        meant = {name: group for name, group in meant.items() if name not in self.frozen}
        for name, size in self.sizes.items():
            now = meant[name].size + self.removed.get(name, 0) if name in meant else None
            if now != size and self.partly:
                continue
            if now != size and self.pruned.get(name):
                raise StateError(
                    f"{self.who}: the state has {size} channels for {name!r}, and this model {now or 'none to cut'}. "
                    "Load the state of this model."
                )
        self.run.channels.claim(self.modifier, {name: group.tensors for name, group in meant.items()})
        self.traced, self.channel_groups = traced, meant
        if self.partly:
            self._keep_what_fits(traced)

    def _keep_what_fits(self, traced: ChannelGroups) -> None:
        """Keeps, of the state of another recipe, the channel groups that are here, and begins with the others."""
        here = {name: group.size + self.removed.get(name, 0) for name, group in self.channel_groups.items()}
        fits = {name for name, size in here.items() if self.sizes.get(name) == size}
        self.partly = False
        if self.point is None:
            return
        before = (self.sizes, self.removed, self.pruned, self.initials)
        self._start(traced)
        for mine, saved in zip((self.sizes, self.removed, self.pruned, self.initials), before, strict=True):
            mine.update({name: value for name, value in saved.items() if name in fits})  # type: ignore[attr-defined]

    def _side(self, group: ChannelGroup) -> tuple[str, ...]:
        """The weights of a channel group by which it is named."""
        return group.rows if self.modifier.mask_type == "filter" else group.columns

    def _check_groups(self, traced: ChannelGroups) -> None:
        for written in self.modifier.param_groups or ():
            where = f"{self.who}.param_groups"
            names = set(targets.resolve_parameters(self.run.model, written, where=where, strict=self.modifier.strict))
            roles = ("row" if self.modifier.mask_type == "filter" else "column", "other")
            if not any(names <= {m.tensor for m in g.members if m.role in roles} for g in traced.groups.values()):
                found = sorted({self._side(g) for g in traced.groups.values() if names & set(self._side(g))})
                raise TargetError(
                    f"{where}: {', '.join(sorted(names))} are not one channel group in the traced model. Found were "
                    f"{'; '.join(', '.join(one) for one in found) or 'none of them'}. Write those, or leave it out."
                )

    def _reasons(self, traced: ChannelGroups, meant: Mapping[str, ChannelGroup]) -> str:
        sides = {weight for group in meant.values() for weight in self._side(group)}
        whole = {name: traced.whole.get(name, "its channels cannot go") for name in self.named if name not in sides}
        kept = [f"{name!r}: {reason}" for name, reason in whole.items()]
        return "; ".join(kept[:5]) + (f"; and {len(kept) - 5} more" if len(kept) > 5 else "")

    def _report(self) -> None:
        """Logs once which channels go together, and which weights stay whole."""
        assert self.traced is not None
        if self.point is not None:
            return
        for name, group in self.channel_groups.items():
            self.run.log.text("structure", f"{name}: {group.size} channels of {', '.join(group.rows)}")
        reasons = self._reasons(self.traced, self.channel_groups)
        written = {n for n in self.modifier.names() if not n.startswith(("re:", "__"))}
        exact = {name for name in self.named if name in written or name.removesuffix(".weight") in written}
        sides = {weight for group in self.channel_groups.values() for weight in self._side(group)}
        if reasons:
            self.run.log.text("structure", f"{self.who} leaves whole: {reasons}")
        if self.frozen:
            reasons = "; ".join(f"{name!r}: {tensor!r} is frozen" for name, tensor in self.frozen.items())
        # A pattern means whatever can be cut; a name means itself.
        if self.frozen or exact - sides:
            warnings.warn(f"{self.who} leaves whole: {reasons}.", SparsifyWarning, stacklevel=2)

    # ------------------------------------------------------------------ at work

    def update(self, clock: Clock) -> None:
        self.clock = clock
        if self.traced is None and not self.asked and not self._over():
            # At the start of training, not of the ramp: what cannot be cut is said now.
            self.asked = True
            self.run.inputs.when_known(self._begin)
        else:
            self._advance()

    def _over(self) -> bool:
        """True if no mask will change any more."""
        return self.released or (self.point is not None and self.point >= self.modifier.window.end)

    def _advance(self) -> None:
        """Sets the masks that are due."""
        point = None if self.clock is None else self.grid.latest(self.clock)
        if point is None or point == self.point or self.traced is None or self.clock is None or self._over():
            return
        from sparsify.pruning.group_masks import deletion_masks

        self.run.masker.refresh()
        if self.point is None:
            self._start(self.traced)
        before, self.pruned = self.pruned, self._choose(point)
        own = deletion_masks(self.run.model, self.traced, self.pruned)
        held = self.run.masker.masks
        if any(set(channels) - set(self.pruned.get(name, ())) for name, channels in before.items()):
            # Channels that are released: what this modifier held so far holds no more.
            for name, mask in deletion_masks(self.run.model, self.traced, before).items():
                if name in held:
                    held[name] = held[name] | ~mask.to(held[name].device)
        masks = {name: mask & held[name].to(mask.device) if name in held else mask for name, mask in own.items()}
        distributed.check_same(masks)
        for name, mask in masks.items():
            self.run.masker.set(name, mask, fresh=bool(self.modifier.falling()))
        for name, size in self.sizes.items():
            done = (len(self.pruned.get(name, ())) + self.removed[name]) / size
            self.run.log.scalar(f"sparsity/{name}", done, self.clock.step)
        self.point = point
        if self._over():
            self._end(self.traced, own)

    def _end(self, traced: ChannelGroups, own: Mapping[str, Tensor]) -> None:
        """Removes the masked channels, or releases the masks, as the modifier says."""
        from sparsify.pruning.removal import plan_removal

        pruned, self.pruned, self.traced, self.channel_groups = self.pruned, {}, None, {}
        if self.modifier.shrink and any(pruned.values()):
            self.run.channels.remove(plan_removal(self.run.model, traced, pruned))
        if not self.modifier.leave_enabled:
            masker = self.run.masker
            for name, mask in own.items():
                # Another modifier may hold others of the same weights.
                rest = masker.masks[name] | ~mask.to(masker.masks[name].device)
                if bool(rest.all()):
                    masker.remove(name)
                else:
                    masker.set(name, rest)
            self.released = True

    def _start(self, traced: ChannelGroups) -> None:
        """Fixes the number of channels, and the sparsity at the start."""
        from sparsify.pruning.group_masks import dead_channels

        self.sizes = {name: group.size for name, group in self.channel_groups.items()}
        self.removed = dict.fromkeys(self.sizes, 0)
        self.pruned = dict.fromkeys(self.sizes, ())
        initial = self.modifier.init_sparsity
        if isinstance(initial, str):
            zero = {
                name: len(found) for name, found in dead_channels(self.run.model, traced).items() if name in self.sizes
            }
            overall = sum(zero.values()) / sum(self.sizes.values())
            each = {name: zero.get(name, 0) / size for name, size in self.sizes.items()}
            self.initials = dict.fromkeys(self.sizes, overall) if self.modifier.global_sparsity else each
        else:
            self.initials = dict.fromkeys(self.sizes, initial)

    def _choose(self, point: float) -> dict[str, tuple[int, ...]]:
        """The channels that are masked from the point on."""
        modifier, channel_groups = (
            self.modifier,
            {name: self.channel_groups[name] for name in self.sizes if name in self.channel_groups},
        )
        progress = modifier.window.progress(point)
        # Where the sparsity falls, those masked so far are among the lowest: all their weights are zero.
        given = not isinstance(modifier.init_sparsity, str)
        falling = {name for name in channel_groups if given and self.initials[name] > self.finals[name]}
        pruned = {name: () if name in falling else channels for name, channels in self.pruned.items()}
        bounds, counts = {}, {}
        for name, group in channel_groups.items():
            size = self.sizes[name]
            bounds[name] = self._bounds(group, size)
            last = (size - bounds[name].nearest(size - round(size * self.finals[name]))) / size
            first = self.initials[name] if name in falling else min(self.initials[name], last)
            share = between(modifier.inter_func, first, last, progress)
            counts[name] = max(round(size * share) - self.removed[name], len(pruned[name]))
        scores = group_scores.norms(self.run.model, channel_groups)
        if modifier.global_sparsity and channel_groups:
            name = next(iter(channel_groups))
            share = between(modifier.inter_func, self.initials[name], self.finals[name], progress)
            total = round(sum(self.sizes.values()) * share) - sum(self.removed.values())
            there = {
                name: group_scores.Bounds(group.size, bounds[name].multiple, bounds[name].least)
                for name, group in channel_groups.items()
            }
            counts = group_scores.shares(scores, max(total, 0), there, pruned)
        return group_scores.lowest(scores, counts, pruned)

    # ------------------------------------------------------------------ another size, another time

    def resized(self, removal: Removal) -> None:
        for name, group in self.channel_groups.items():
            left = _left(group, removal)
            now = {channel: index for index, channel in enumerate(left)}
            self.pruned[name] = tuple(now[channel] for channel in self.pruned.get(name, ()) if channel in now)
            if name in self.removed:
                self.removed[name] += group.size - len(left)
        self.traced, self.channel_groups, self.asked = None, {}, False

    def state_dict(self) -> dict[str, Any]:
        return {
            "point": -1.0 if self.point is None else self.point,
            "released": self.released,
            "gone": {name: list(pruned) for name, pruned in self.pruned.items()},
            "sizes": dict(self.sizes),
            "taken": dict(self.removed),
            "initials": dict(self.initials),
            "shapes": self._shapes(),
        }

    def _shapes(self) -> dict[str, list[int]]:
        """The shapes of the weights that are named, as they are now."""
        parameters = targets.named_parameters(self.run.model)
        return {name: list(parameters[name].shape) for name in self.named if name in parameters}

    def take_over(self, state: Mapping[str, Any]) -> str | None:
        """Channels of the same weights; where these have other shapes, it starts anew."""
        here = self._shapes()
        for name, shape in state.get("shapes", {}).items():
            if here.get(name, shape) != shape:
                return f"channels of {name!r}, which had shape {shape} and has {here[name]}; they are chosen anew"
        self.partly = True
        self.load_state_dict(state)
        return None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.point = None if state["point"] < 0 else float(state["point"])
        self.released = bool(state["released"])
        self.pruned = {name: tuple(map(int, pruned)) for name, pruned in state["gone"].items()}
        self.sizes = {name: int(size) for name, size in state["sizes"].items()}
        self.removed = {name: int(count) for name, count in state["taken"].items()}
        self.initials = {name: float(value) for name, value in state["initials"].items()}
        # Looked for again: what is there now may not be what modify() saw.
        self.traced, self.channel_groups, self.asked = None, {}, False


def _left(group: ChannelGroup, removal: Removal) -> list[int]:
    """The channels of `group` that a removal left."""
    for member in group.members:
        kept = removal.keep.get(member.tensor, {}).get(member.dim)
        if kept is not None:
            return sorted({member.channels[index] for index in kept.tolist()} - {-1})
    return list(range(group.size))
