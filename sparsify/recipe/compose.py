"""One recipe after another: the stages of both, the later one's epochs shifted behind the earlier one's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsify.errors import RecipeError
from sparsify.modifiers.base import Modifier
from sparsify.recipe.stage import Stage
from sparsify.recipe.writer import fields

__all__: list[str] = []

# Fields that say a moment of training. Others in epochs are lengths (update_frequency, cycle_epochs, step_size).
_MOMENTS = ("start_epoch", "end_epoch", "disable_quantization_observer_epoch", "freeze_bn_stats_epoch")
_LISTS_OF_MOMENTS = ("update_epochs",)


def whole(stages: Sequence[Stage], variables: Mapping[str, Any], metadata: Any) -> list[Stage]:
    """`stages` with their recipe's variables and metadata in each: another recipe may give the same names other
    values."""
    return [
        stage.model_copy(
            update={
                "variables": {**variables, **stage.variables},
                "metadata": stage.metadata if stage.metadata is not None else metadata,
            }
        )
        for stage in stages
    ]


def joined(earlier: Sequence[Stage], later: Sequence[Stage], offset: int | None) -> tuple[Stage, ...]:
    """The stages of one recipe and then of another; one without a name gets a name.

    Args:
        earlier: whole stages of the first recipe.
        later: whole stages of the second recipe.
        offset: the epoch at which the first recipe ends and the second begins; None: epochs stay as they are.

    Raises:
        RecipeError: two stages have one name.
    """
    before = _with_stage_names(earlier, "stage_0" if later[0].name is None else f"pre_{later[0].name}")
    after = _with_stage_names(later, "stage_1" if earlier[0].name is None else f"stage_{len(earlier) + 1}")
    names = [str(stage.name) for stage in before]
    for stage in after:
        if stage.name in names:
            raise RecipeError(
                f"both recipes have a stage {stage.name!r}. Give it another name in one of them: {', '.join(names)}."
            )
    if offset is not None:
        before = [_changed(stage, lambda modifier: ended(modifier, offset)) for stage in before]
        after = [_changed(stage, lambda modifier: shifted(modifier, offset)) for stage in after]
    return (*before, *after)


def shifted(modifier: Modifier, offset: float) -> Modifier:
    """`modifier` with its moments `offset` epochs later: a start at once is then, an open end stays open."""
    changes: dict[str, Any] = {}
    for name in _MOMENTS:
        value = getattr(modifier, name, None)
        if value is None or (name == "end_epoch" and value == -1):
            continue
        changes[name] = max(value, 0.0) + offset
    for name in _LISTS_OF_MOMENTS:
        if value := getattr(modifier, name, None):
            changes[name] = [epoch + offset for epoch in value]
    lr_kwargs = getattr(modifier, "lr_kwargs", {})
    if isinstance(lr_kwargs.get("milestones"), list):
        changes["lr_kwargs"] = lr_kwargs | {"milestones": [epoch + offset for epoch in lr_kwargs["milestones"]]}
    return _replaced(modifier, changes)


def ended(modifier: Modifier, epoch: float) -> Modifier:
    """`modifier` with an end that never comes put at `epoch`."""
    return modifier if modifier.end_epoch != -1 else _replaced(modifier, {"end_epoch": float(epoch)})


def _replaced(modifier: Modifier, changes: dict[str, Any]) -> Modifier:
    return type(modifier)(**(fields(modifier) | changes))


def _changed(stage: Stage, change: Callable[[Modifier], Modifier]) -> Stage:
    groups = {key: tuple(change(modifier) for modifier in group) for key, group in stage.groups.items()}
    return stage.model_copy(update={"groups": groups})


def _with_stage_names(stages: Sequence[Stage], name: str) -> list[Stage]:
    return [stage if stage.name is not None else stage.model_copy(update={"name": name}) for stage in stages]
