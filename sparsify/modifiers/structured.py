"""Whole channels go to zero on a schedule, with everything that hangs together with them, and then for good."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sparsify.errors import SparsifyWarning, StateError, TargetError
from sparsify.model import distributed, targets
from sparsify.modifiers.base import Active, FieldProblem, Run
from sparsify.modifiers.magnitude_pruning import GradualPruning
from sparsify.modifiers.schedule import Clock, Grid, between
from sparsify.pruning import group_scores

if TYPE_CHECKING:
    from torch import Tensor

    from sparsify.pruning.groups import Families, Family
    from sparsify.pruning.removal import Removal

__all__ = ["StructuredPruningModifier"]


class StructuredPruningModifier(GradualPruning):
    """Gradual pruning of whole channels, with all that hangs together with them, so that they can be removed.

    Channels that must go together are one family, found in the traced model: the rows of all layers that give them,
    their biases, norms and tables, and the columns of all layers that read them. All of that is masked, so removing it
    changes nothing. A head of attention is one channel. A sparsity is a fraction of a family's channels: exactly
    round(n * sparsity) of n are masked at every update, those worth least first. A channel is worth the L2 norm of its
    rows and columns in all weights of the family; with `global_sparsity` in units of the family's mean, in one ranking.

    How many channels stay at the end is rounded to `multiple`, and the ramp leads there; with `global_sparsity` every
    update is rounded. Only families that a dry run found to be exact are masked. What else `params` names is reported
    with the reason. Inputs of the model are needed: `sample_inputs` of modify(), or the first forward, which then sets
    the masks that are due at the very start before it computes. The rest is as GMPruningModifier.
    """

    traces: ClassVar[bool] = True
    whole_channels: ClassVar[bool] = True

    mask_type: Literal["filter", "channel"] = Field(
        default="filter",
        description="What `params` names: weights that give the channels (filter), or that read them (channel). The "
        "same is masked either way.",
    )
    param_groups: list[list[str]] | None = Field(
        default=None,
        description="Legacy: names of parameters whose channels must go together. Checked against the families that "
        "are found, which go together in any case; null: nothing to check.",
    )
    multiple: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="The number of channels that stay is rounded to the nearest multiple of this. null: what is fast "
        "to compute, for families with convolutions 16, 8 from 16 to 31 channels, 4 below; 1: exact.",
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

    def attach(self, run: Run) -> Active:
        """Checks names, and families too where inputs are known.

        Raises:
            TargetError: nothing that is named can be cut, or not as it says.
            RecipeError: another modifier is at work on the same weights.
        """
        return _Structured(self, run)


class _Structured(Active):
    """Channels on their way out.

    Checkpoint: the point of the grid in force, whether masks were released, and by family the channels that are masked,
    how many there were and are removed, and the sparsity at the start. What was removed is in the session's state.
    """

    def __init__(self, modifier: StructuredPruningModifier, run: Run) -> None:
        self.modifier, self.run = modifier, run
        self.who = type(modifier).__name__
        self.grid = Grid(modifier.window, modifier.update_frequency)
        self.named = self._named()
        self.limits = self._limits()
        self.point: float | None = None
        self.released = False
        self.gone: dict[str, tuple[int, ...]] = {}
        self.sizes: dict[str, int] = {}
        self.taken: dict[str, int] = {}
        self.initials: dict[str, float] = {}
        self.clock: Clock | None = None
        self.asked = False
        self.traced: Families | None = None
        self.families: dict[str, Family] = {}
        self.finals: dict[str, float] = {}
        self.frozen: dict[str, str] = {}
        if run.sample_inputs is not None:
            # What cannot be is found before anything is changed; the families are asked for again when they are needed.
            self._take(run.families(*run.sample_inputs))
            self.traced, self.families = None, {}

    def _named(self) -> dict[str, float]:
        """The final sparsity by weight."""
        modifier, model = self.modifier, self.run.model
        where = f"{self.who}.{'params' if modifier.params else 'final_sparsity'}"
        named: dict[str, float] = {}
        for final, names in modifier.final_by_names().items():
            parameters = targets.resolve_parameters(model, names, where=where, strict=modifier.strict)
            targets.refuse_unusable(parameters, where=where)
            for name in parameters:
                if name in named:
                    raise TargetError(f"{where}: {name!r} has two sparsities, {named[name]} and {final}. Name it once.")
                named[name] = final
        return named

    def _limits(self) -> dict[str, float]:
        """The highest fraction that may go, by weight; of several the lowest."""
        found: dict[str, float] = {}
        for name, limit in self.modifier.limits.items():
            where = f"{self.who}.limits"
            for weight in targets.resolve_parameters(self.run.model, [name], where=where, strict=self.modifier.strict):
                found[weight] = min(limit, found.get(weight, 1.0))
        return found

    # ------------------------------------------------------------------ what is cut

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """On the inputs of one call of the model."""
        if self.traced is None and not self._over():
            self._take(self.run.families(args, kwargs))
            self._report()
        self._advance()

    def _take(self, traced: Families) -> None:
        """Takes the families that are meant."""
        self._check_groups(traced)
        parameters = targets.named_parameters(self.run.model)
        meant: dict[str, Family] = {}
        for name, family in traced.families.items():
            finals = {self.named[weight] for weight in self._side(family) if weight in self.named}
            if len(finals) > 1:
                raise TargetError(
                    f"{self.who}.final_sparsity: channels of {', '.join(map(repr, self._side(family)))} go together, "
                    f"but have {len(finals)} sparsities, {', '.join(map(str, sorted(finals)))}. Give them one."
                )
            if finals and family.size > 1:
                meant[name], self.finals[name] = family, finals.pop()
        if not meant:
            raise TargetError(
                f"{self.who}.params: nothing that is named can be cut in {type(self.run.model).__name__}: "
                f"{self._reasons(traced, meant)}. It can cut the channels of "
                f"{', '.join(map(repr, list(traced.families)[:8])) or 'no layer'}."
            )
        frozen = {
            name: place.tensor
            for name, family in meant.items()
            for place in family.places
            if place.tensor in parameters and not parameters[place.tensor].requires_grad
        }
        self.frozen = {name: tensor for name, tensor in frozen.items() if name not in self.gone}
        meant = {name: family for name, family in meant.items() if name not in self.frozen}
        for name, size in self.sizes.items():
            now = meant[name].size + self.taken.get(name, 0) if name in meant else None
            if now != size and self.gone.get(name):
                raise StateError(
                    f"{self.who}: the state has {size} channels for {name!r}, and this model {now or 'none to cut'}. "
                    "Load the state of this model."
                )
        self.run.claim(self.modifier, {name: [p.tensor for p in family.places] for name, family in meant.items()})
        self.traced, self.families = traced, meant

    def _side(self, family: Family) -> tuple[str, ...]:
        """The weights of a family by which it is named."""
        return family.rows if self.modifier.mask_type == "filter" else family.columns

    def _check_groups(self, traced: Families) -> None:
        for group in self.modifier.param_groups or ():
            where = f"{self.who}.param_groups"
            names = set(targets.resolve_parameters(self.run.model, group, where=where, strict=self.modifier.strict))
            roles = ("row" if self.modifier.mask_type == "filter" else "column", "other")
            if not any(names <= {p.tensor for p in f.places if p.role in roles} for f in traced.families.values()):
                found = sorted({self._side(f) for f in traced.families.values() if names & set(self._side(f))})
                raise TargetError(
                    f"{where}: {', '.join(sorted(names))} are not one family in the traced model. Found were "
                    f"{'; '.join(', '.join(one) for one in found) or 'none of them'}. Write those, or leave it out."
                )

    def _reasons(self, traced: Families, meant: Mapping[str, Family]) -> str:
        sides = {weight for family in meant.values() for weight in self._side(family)}
        whole = {name: traced.whole.get(name, "its channels cannot go") for name in self.named if name not in sides}
        kept = [f"{name!r}: {reason}" for name, reason in whole.items()]
        return "; ".join(kept[:5]) + (f"; and {len(kept) - 5} more" if len(kept) > 5 else "")

    def _report(self) -> None:
        """Says once which channels go together, and what stays whole."""
        assert self.traced is not None
        if self.point is not None:
            return
        for name, family in self.families.items():
            self.run.log.text("structure", f"{name}: {family.size} channels of {', '.join(family.rows)}")
        reasons = self._reasons(self.traced, self.families)
        written = {n for n in self.modifier.names() if not n.startswith(("re:", "__"))}
        exact = {name for name in self.named if name in written or name.removesuffix(".weight") in written}
        sides = {weight for family in self.families.values() for weight in self._side(family)}
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
            self.run.on_inputs(self._begin)
        else:
            self._advance()

    def _over(self) -> bool:
        """Whether no mask will change any more."""
        return self.released or (self.point is not None and self.point >= self.modifier.window.end)

    def _advance(self) -> None:
        """Puts in force what is due."""
        point = None if self.clock is None else self.grid.latest(self.clock)
        if point is None or point == self.point or self.traced is None or self.clock is None or self._over():
            return
        from sparsify.pruning.shrinking import deletion_masks

        self.run.masker.refresh()
        if self.point is None:
            self._start(self.traced)
        self.gone = self._choose(point)
        own = deletion_masks(self.run.model, self.traced, self.gone)
        held = self.run.masker.masks
        masks = {name: mask & held[name].to(mask.device) if name in held else mask for name, mask in own.items()}
        distributed.check_same(masks)
        for name, mask in masks.items():
            self.run.masker.set(name, mask)
        for name, size in self.sizes.items():
            done = (len(self.gone.get(name, ())) + self.taken[name]) / size
            self.run.log.scalar(f"sparsity/{name}", done, self.clock.step)
        self.point = point
        if self._over():
            self._end(self.traced, own)

    def _end(self, traced: Families, own: Mapping[str, Tensor]) -> None:
        """What masks leave behind at the end."""
        from sparsify.pruning.removal import plan_removal

        gone, self.gone, self.traced, self.families = self.gone, {}, None, {}
        if self.modifier.shrink and any(gone.values()):
            self.run.shrink(plan_removal(self.run.model, traced, gone))
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

    def _start(self, traced: Families) -> None:
        """Fixes how many channels there are, and from which sparsity on."""
        from sparsify.pruning.shrinking import dead

        self.sizes = {name: family.size for name, family in self.families.items()}
        self.taken = dict.fromkeys(self.sizes, 0)
        self.gone = dict.fromkeys(self.sizes, ())
        initial = self.modifier.init_sparsity
        if isinstance(initial, str):
            zero = {name: len(found) for name, found in dead(self.run.model, traced).items() if name in self.sizes}
            overall = sum(zero.values()) / sum(self.sizes.values())
            each = {name: zero.get(name, 0) / size for name, size in self.sizes.items()}
            self.initials = dict.fromkeys(self.sizes, overall) if self.modifier.global_sparsity else each
        else:
            self.initials = dict.fromkeys(self.sizes, initial)

    def _choose(self, point: float) -> dict[str, tuple[int, ...]]:
        """The channels that are gone from the point on, of those that are there."""
        modifier, families = self.modifier, {name: self.families[name] for name in self.sizes if name in self.families}
        progress = modifier.window.progress(point)
        bounds, counts = {}, {}
        for name, family in families.items():
            size = self.sizes[name]
            limit = min((self.limits[w] for w in (*family.rows, *family.columns) if w in self.limits), default=1.0)
            bounds[name] = group_scores.Bounds.of(size, group_scores.multiple_of(family, modifier.multiple), limit)
            last = (size - bounds[name].nearest(size - round(size * self.finals[name]))) / size
            share = between(modifier.inter_func, min(self.initials[name], last), last, progress)
            counts[name] = max(round(size * share) - self.taken[name], len(self.gone[name]))
        scores = group_scores.norms(self.run.model, families)
        if modifier.global_sparsity and families:
            name = next(iter(families))
            share = between(modifier.inter_func, self.initials[name], self.finals[name], progress)
            total = round(sum(self.sizes.values()) * share) - sum(self.taken.values())
            there = {n: group_scores.Bounds(f.size, bounds[n].multiple, bounds[n].least) for n, f in families.items()}
            counts = group_scores.shares(scores, max(total, 0), there, self.gone)
        return group_scores.lowest(scores, counts, self.gone)

    # ------------------------------------------------------------------ another size, another time

    def resized(self, removal: Removal) -> None:
        for name, family in self.families.items():
            left = _left(family, removal)
            now = {channel: index for index, channel in enumerate(left)}
            self.gone[name] = tuple(now[channel] for channel in self.gone.get(name, ()) if channel in now)
            if name in self.taken:
                self.taken[name] += family.size - len(left)
        self.traced, self.families, self.asked = None, {}, False

    def state_dict(self) -> dict[str, Any]:
        return {
            "point": -1.0 if self.point is None else self.point,
            "released": self.released,
            "gone": {name: list(gone) for name, gone in self.gone.items()},
            "sizes": dict(self.sizes),
            "taken": dict(self.taken),
            "initials": dict(self.initials),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.point = None if state["point"] < 0 else float(state["point"])
        self.released = bool(state["released"])
        self.gone = {name: tuple(map(int, gone)) for name, gone in state["gone"].items()}
        self.sizes = {name: int(size) for name, size in state["sizes"].items()}
        self.taken = {name: int(count) for name, count in state["taken"].items()}
        self.initials = {name: float(value) for name, value in state["initials"].items()}
        # Looked for again: what is there now may not be what modify() saw.
        self.traced, self.families, self.asked = None, {}, False


def _left(family: Family, removal: Removal) -> list[int]:
    """The channels of `family` that a removal left."""
    for place in family.places:
        kept = removal.keep.get(place.tensor, {}).get(place.dim)
        if kept is not None:
            return sorted({place.channels[index] for index in kept.tolist()} - {-1})
    return list(range(family.size))
