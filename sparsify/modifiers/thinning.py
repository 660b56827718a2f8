"""Removal of masked channels: layers become smaller, and the optimizer's state with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator
from torch import nn

from sparsify.errors import SparsifyWarning, TargetError
from sparsify.model import targets
from sparsify.modifiers.base import Active, Epoch, Modifier, ModifierKind, Run
from sparsify.modifiers.schedule import Clock
from sparsify.output.field_errors import FieldProblem

if TYPE_CHECKING:
    from sparsify.pruning.groups import ChannelGroups

__all__ = ["LayerThinningModifier"]


class LayerThinningModifier(Modifier):
    """Removes channels that are zero, at its start and at `update_epochs`, so that the model computes the same.

    A channel is zero where all that hangs together with it is, or all that reads it: StructuredPruningModifier masks
    it so. Parameters keep their identity, the optimizer's state is sliced along. Inputs of the model are needed, as for
    StructuredPruningModifier, which can do the same at its own end (`shrink`). `-1` is at once, for a model that comes
    with zero channels. Under DistributedDataParallel nothing can be removed.

    Checkpoint: the number of its epochs that are done, and if any channel was removed; the removal itself is in the
    manager's own state.
    """

    sharded: ClassVar[bool] = False
    kind: ClassVar[ModifierKind] = "structure"
    traces: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    param_group_dependency_map: dict[str, list[str]] | str | None = Field(
        default=None,
        description="Names of pruned parameters, joined by commas -> the parameters that lose the same channels, or "
        "that as JSON text. Checked against the channel groups that are found, and only these are thinned; null: all.",
    )
    structure_type: Literal["filter", "channel"] = Field(
        description="Which channels were masked: filter (what a layer gives) or channel (what it reads)."
    )
    update_epochs: list[Epoch] = Field(
        default_factory=list, description="Further epochs, after start_epoch, at which channels are sliced away."
    )
    strict: bool = Field(
        default=True,
        description="Whether a name of the map that is not in the model, or names that do not go together there, are "
        "an error; otherwise they are left out and reported.",
    )

    @field_validator("update_epochs")
    @classmethod
    def _epochs(cls, value: list[float]) -> list[float]:
        for epoch in value:
            if epoch < 0:
                raise FieldProblem("update_epochs", f"{epoch} is not an epoch; give epochs of 0 or more")
        return value

    @field_validator("param_group_dependency_map")
    @classmethod
    def _readable(cls, value: dict[str, list[str]] | str | None) -> dict[str, list[str]] | str | None:
        if isinstance(value, str):
            _parsed(value)
        return value

    def cuts(self) -> tuple[float, ...]:
        """Its start and `update_epochs`."""
        return tuple(sorted({self.window.start, *self.update_epochs}))

    def groups(self) -> dict[tuple[str, ...], tuple[str, ...]]:
        """The names in the map: those that were pruned, and those that lose the same channels."""
        given = self.param_group_dependency_map
        found = _parsed(given) if isinstance(given, str) else given or {}
        return {tuple(n.strip() for n in key.split(",")): tuple(names) for key, names in found.items()}

    def names(self) -> list[str]:
        """All names in the map."""
        return list(dict.fromkeys(name for key, names in self.groups().items() for name in (*key, *names)))

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter]:
        """The parameters that the map names."""
        where = f"{type(self).__name__}.param_group_dependency_map"
        return targets.resolve_parameters(model, self.names(), where=where, strict=self.strict)

    def attach(self, run: Run) -> Active:
        """Checks the map, against the traced model too where inputs are known."""
        return _Thinning(self, run)


def _parsed(text: str) -> dict[str, list[str]]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise FieldProblem("param_group_dependency_map", f"is no JSON text: {error}; give a mapping, or null") from None
    if not isinstance(found, dict) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in found.values()
    ):
        raise FieldProblem("param_group_dependency_map", 'must be like {"conv1.weight": ["bn1.weight"]}, or null')
    return found


class _Thinning(Active):
    """Removes dead channels at its epochs.

    Checkpoint: the number of epochs that are done, and if any channel was removed.
    """

    def __init__(self, modifier: LayerThinningModifier, run: Run) -> None:
        self.modifier, self.run = modifier, run
        self.who = type(modifier).__name__
        self.done = self.due = 0
        self.removed = False
        self.asked = False
        modifier.targets(run.model)
        if run.inputs.given is not None and not run.goes_on and modifier.groups():
            self._meant(run.channels.groups(*run.inputs.given))

    def update(self, clock: Clock) -> None:
        self.due = sum(clock.reached(epoch) for epoch in self.modifier.cuts())
        if self.due > self.done and not self.asked:
            self.asked = True
            self.run.inputs.when_known(self._thin)

    def _thin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from sparsify.pruning.group_masks import dead_channels
        from sparsify.pruning.removal import plan_removal

        if self.due <= self.done:
            return
        traced = self.run.channels.groups(args, kwargs)
        meant = self._meant(traced)
        dead = dead_channels(self.run.model, traced)
        pruned = {name: channels for name, channels in dead.items() if channels and name in meant}
        self.done, self.asked = self.due, False
        if pruned:
            self.removed = True
            self.run.channels.remove(plan_removal(self.run.model, traced, pruned))
        elif not self.removed:
            warnings.warn(
                f"{self.who}: no channel is zero with all that hangs together with it, so nothing was removed. "
                "StructuredPruningModifier masks channels so that they can be.",
                SparsifyWarning,
                stacklevel=2,
            )

    def _meant(self, traced: ChannelGroups) -> set[str]:
        """The channel groups that are thinned: those of the map, or all."""
        groups = self.modifier.groups()
        if not groups:
            return set(traced.groups)
        found: set[str] = set()
        where = f"{self.who}.param_group_dependency_map"
        for pruned, others in groups.items():
            model, strict = self.run.model, self.modifier.strict
            mine = set(targets.resolve_parameters(model, pruned, where=where, strict=strict))
            all_of = mine | set(targets.resolve_parameters(model, others, where=where, strict=strict))
            for name, group in traced.groups.items():
                side = group.rows if self.modifier.structure_type == "filter" else group.columns
                if mine and mine <= set(side) and all_of <= set(group.tensors):
                    found.add(name)
                    break
            else:
                known = "; ".join(
                    f"{', '.join(group.rows)} -> {', '.join(group.tensors)}"
                    for group in traced.groups.values()
                    if mine & set(group.tensors)
                )
                text = (
                    f"{where}: {', '.join(pruned)} and {', '.join(others) or 'nothing'} do not lose channels together "
                    f"in the traced model. Found: {known or 'no channel group with these weights'}. Write that, "
                    "or null."
                )
                if strict:
                    raise TargetError(text)
                warnings.warn(f"{text} Left out.", SparsifyWarning, stacklevel=2)
        return found

    def detach(self) -> None:
        if self.due > self.done:
            self.due = self.done
            warnings.warn(
                f"{self.who}: channels were due to be removed, but inputs of the model were never seen. Pass "
                "sample_inputs, or call sparsify.shrink(model, sample_inputs).",
                SparsifyWarning,
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "removed": self.removed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done, self.removed, self.asked = int(state["done"]), bool(state["removed"]), False
