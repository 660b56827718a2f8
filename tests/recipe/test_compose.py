from __future__ import annotations

from pathlib import Path

import pytest

from sparsify import RecipeError
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.learning_rate import LearningRateModifier, SetLearningRateModifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.thinning import LayerThinningModifier
from sparsify.recipe import Recipe

FILES = sorted((Path(__file__).parents[1] / "recipes").iterdir())


def flat(end: float = 5.0, *, rate: float = 0.1) -> str:
    return (
        f"rate: {rate}\n__metadata__: {{rate: {rate}}}\nmodifiers:\n  - !EpochRangeModifier {{end_epoch: {end}}}\n"
        "  - !SetLearningRateModifier {learning_rate: eval(rate)}\n"
    )


def staged(*names: str) -> str:
    text = "rate: 0.3\n"
    for number, name in enumerate(names):
        start, end = 2 * number, 2 * number + 2
        text += f"{name}:\n  rate_{name}: 1\n  modifiers:\n"
        text += f"    - !EpochRangeModifier {{start_epoch: {start}, end_epoch: {end}}}\n"
    return text


def windows(recipe: Recipe) -> list[tuple[str | None, float, float]]:
    return [(stage.name, m.start_epoch, m.end_epoch) for stage in recipe.stages for m in stage.modifiers]


def test_two_flat_recipes_become_stages_one_after_the_other() -> None:
    recipe = Recipe.compose(flat(4.5), flat(3.0, rate=0.2))
    assert windows(recipe) == [
        ("stage_0", 0.0, 4.5),
        ("stage_0", -1.0, 5.0),
        ("stage_1", 5.0, 8.0),
        ("stage_1", 5.0, -1.0),
    ]
    assert recipe.max_epochs == 8
    assert [stage.variables for stage in recipe.stages] == [{"rate": 0.1}, {"rate": 0.2}]
    assert [stage.metadata for stage in recipe.stages] == [{"rate": 0.1}, {"rate": 0.2}]
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_original_epochs_can_be_kept() -> None:
    recipe = Recipe.compose(flat(4.0), flat(3.0), keep_original_epochs=True)
    assert windows(recipe) == [
        ("stage_0", 0.0, 4.0),
        ("stage_0", -1.0, -1.0),
        ("stage_1", 0.0, 3.0),
        ("stage_1", -1.0, -1.0),
    ]


def test_names_of_stages() -> None:
    assert [s.name for s in Recipe.compose(staged("a", "b"), flat()).stages] == ["a", "b", "stage_3"]
    assert [s.name for s in Recipe.compose(flat(), staged("a", "b")).stages] == ["pre_a", "a", "b"]
    assert [s.name for s in Recipe.compose(staged("a"), staged("b")).stages] == ["a", "b"]
    assert [s.name for s in Recipe.compose(Recipe.compose(flat(), flat()), flat()).stages] == [
        "stage_0",
        "stage_1",
        "stage_3",
    ]


def test_stages_keep_the_variables_that_they_saw() -> None:
    recipe = Recipe.compose(staged("a"), flat(rate=0.2))
    assert [s.variables for s in recipe.stages] == [{"rate": 0.3, "rate_a": 1}, {"rate": 0.2}]


@pytest.mark.parametrize(
    ("base", "additional", "name"),
    [
        (staged("a"), staged("b", "a"), "a"),
        (staged("stage_2"), flat(), "stage_2"),
        (staged("x", "stage_3"), flat(), "stage_3"),
    ],
)
def test_a_clash_of_names_is_an_error(base: str, additional: str, name: str) -> None:
    with pytest.raises(RecipeError, match=f"both recipes have a stage '{name}'"):
        Recipe.compose(base, additional)


def test_every_moment_is_shifted_and_every_length_is_kept() -> None:
    additional = Recipe.from_modifiers(
        [
            LearningRateModifier(
                lr_class="MultiStepLR",
                lr_kwargs={"milestones": [2, 4], "gamma": 0.1},
                init_lr=0.1,
                start_epoch=1.0,
                end_epoch=5.0,
            ),
            LearningRateModifier(
                lr_class="StepLR", lr_kwargs={"step_size": 2, "gamma": 0.1}, init_lr=0.1, start_epoch=6.0
            ),
            QuantizationModifier(start_epoch=2.0, disable_quantization_observer_epoch=3.0, freeze_bn_stats_epoch=4.0),
            LayerThinningModifier(structure_type="filter", start_epoch=1.0, update_epochs=[1.5, 2.0]),
            DistillationModifier(),
            ConstantPruningModifier(params=["a"], start_epoch=0.0),
        ]
    )
    recipe = Recipe.compose(flat(10.0), additional)
    multi, step, quantization, thinning, distillation, constant = recipe.stages[1].modifiers
    assert isinstance(multi, LearningRateModifier) and isinstance(step, LearningRateModifier)
    assert multi.lr_kwargs == {"milestones": [12, 14], "gamma": 0.1}
    assert (multi.start_epoch, multi.end_epoch) == (11.0, 15.0)
    assert (step.start_epoch, step.end_epoch, step.lr_kwargs["step_size"]) == (16.0, -1.0, 2)
    assert isinstance(quantization, QuantizationModifier) and isinstance(thinning, LayerThinningModifier)
    assert quantization.disable_quantization_observer_epoch == 13.0
    assert quantization.freeze_bn_stats_epoch == 14.0
    assert thinning.update_epochs == [11.5, 12.0]
    assert (distillation.start_epoch, distillation.end_epoch) == (10.0, -1.0)
    assert (constant.start_epoch, constant.end_epoch) == (10.0, -1.0)


def test_composing_leaves_its_parts_as_they_are() -> None:
    base = Recipe.from_modifiers([EpochRangeModifier(end_epoch=3), SetLearningRateModifier(learning_rate=0.1)])
    text = base.to_yaml()
    Recipe.compose(base, base)
    assert base.to_yaml() == text


def test_pruning_that_never_ends_hands_over_to_the_next_recipe() -> None:
    pruning = "modifiers:\n  - !EpochRangeModifier {end_epoch: 4}\n  - !ConstantPruningModifier {params: [a]}\n"
    recipe = Recipe.compose(pruning, pruning)
    assert windows(recipe)[1::2] == [("stage_0", -1.0, 4.0), ("stage_1", 4.0, -1.0)]
    with pytest.raises(RecipeError, match="prunes 'a'"):
        Recipe.compose(pruning, pruning, keep_original_epochs=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_compose_and_what_comes_out_survives_saving(path: Path) -> None:
    recipe = Recipe.compose(path, flat(7.0))
    assert recipe.max_epochs == Recipe.load(path).max_epochs + 7
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
