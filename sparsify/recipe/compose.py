"""One recipe after another: the stages of both, the later one's epochs shifted behind the earlier one's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsify.errors import RecipeError
from sparsify.modifiers.base import Modifier
from sparsify.recipe.writer import fields

if TYPE_CHECKING:
    from sparsify.recipe.recipe import Recipe

__all__: list[str] = []

# Fields that say a moment of training. Others in epochs are lengths (update_frequency, cycle_epochs, step_size).
_MOMENTS = ("start_epoch", "end_epoch", "disable_quantization_observer_epoch", "freeze_bn_stats_epoch")
_LISTS_OF_MOMENTS = ("update_epochs",)


def staged(base: Recipe, additional: Recipe, *, keep_original_epochs: bool) -> list[dict[str, Any]]:
    """The stages of both, as fields of a Stage."""
    flat_base = f"pre_{additional.stages[0].name}" if additional.staged else "stage_0"
    flat_additional = f"stage_{len(base.stages) + 1}" if base.staged else "stage_1"
    earlier = _stages(base, flat_base)
    later = _stages(additional, flat_additional)
    names = [stage["name"] for stage in earlier]
    for stage in later:
        if stage["name"] in names:
            raise RecipeError(
                f"both recipes have a stage {stage['name']!r}. Give it another name in one of them: {', '.join(names)}."
            )
    if not keep_original_epochs:
        offset = base.max_epochs
        _change(earlier, lambda modifier: ended(modifier, offset))
        _change(later, lambda modifier: shifted(modifier, offset))
    return earlier + later


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


def _change(stages: list[dict[str, Any]], change: Any) -> None:
    for stage in stages:
        stage["groups"] = {key: tuple(change(m) for m in group) for key, group in stage["groups"].items()}


def _stages(recipe: Recipe, flat_name: str) -> list[dict[str, Any]]:
    """With the recipe's own variables in each of them: another recipe may give the same names other values."""
    return [
        {
            "name": stage.name if stage.name is not None else flat_name,
            "variables": recipe.variables | stage.variables,
            "metadata": stage.metadata if stage.metadata is not None else recipe.metadata,
            "groups": stage.groups,
        }
        for stage in recipe.stages
    ]
