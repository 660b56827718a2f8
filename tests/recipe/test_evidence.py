"""A recipe that was made from measurements cites them: comments written from its metadata, and from nothing else."""

from __future__ import annotations

import re

import pytest

from sparsify.recipe import Recipe
from sparsify.recipe.evidence import Evidence, Expected, LayerEvidence

RECIPE = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 5.0}
  - !GMPruningModifier
    params: [layer.0.weight, 'a: b']
    init_sparsity: 0.05
    final_sparsity: 0.8
    start_epoch: 1.0
    end_epoch: 4.0
    update_frequency: 0.5
  - !SetLearningRateModifier {start_epoch: 0.0, learning_rate: 0.1}
  - !LearningRateModifier
    lr_class: StepLR
    lr_kwargs: {step_size: 2, gamma: 0.5}
    init_lr: 0.01
    start_epoch: 4.0
"""


def evidence(**fields: object) -> Evidence:
    return Evidence.model_validate(
        {
            "goal": "80 % of the weights",
            "sources": {"loss": "measured on 12 samples"},
            "layers": {
                "layer.0.weight": LayerEvidence(0.8, 1234, 0.0125, 0.25),
                "a: b": LayerEvidence(0.8, 10, None, None),
            },
            "dense": {"conv1": "the first layer"},
            "expected": Expected(
                sparsity=0.8,
                recovery=0.987,
                parameters_before=1300,
                parameters=1300,
                nonzero=300.0,
                size_bytes_before=5200.0,
                size_bytes=5200.0,
            ),
            "stages": {"stabilization": (0.0, 1.0), "pruning": (1.0, 4.0), "fine-tuning": (4.0, 5.0)},
            "because": {
                "GMPruningModifier.update_frequency=0.5": "six updates",
                "LearningRateModifier.lr_kwargs.step_size=2": "two\nlines",
            },
            "notes": ["the average is not met"],
            **fields,
        }
    )


def recipe(text: str = RECIPE, **fields: object) -> Recipe:
    return Recipe.from_yaml(text).extended(metadata={"by": "me", **evidence(**fields).metadata()})


def test_the_text_is_read_as_an_equal_recipe_and_written_as_the_same_text() -> None:
    first = recipe()
    text = first.to_yaml()
    again = Recipe.from_yaml(text)
    assert again == first
    assert again.evidence == first.evidence == evidence()
    assert again.to_yaml() == text
    assert again.fingerprint == first.fingerprint


def test_numbers_cite_what_stands_behind_them() -> None:
    lines = recipe().to_yaml().splitlines()
    assert "      - layer.0.weight  # loss +0.0125, saves 0.25 ms, 1,234 weights" in lines
    assert "      - 'a: b'  # 10 weights" in lines
    assert "    update_frequency: 0.5  # six updates" in lines
    assert "      step_size: 2  # two lines" in lines
    assert "    learning_rate: 0.1" in lines
    assert lines.index("__metadata__:") > lines.index("modifiers:") > lines.index("# 80 % of the weights")


def test_the_head_sums_up_and_lays_out_the_stages() -> None:
    text = recipe().to_yaml()
    head = text[: text.index("modifiers:")]
    for line in (
        "# loss: measured on 12 samples",
        "#   zeros       80.0% of the weights that may go",
        "#   recovery    0.987; 1 is the best for this average",
        "#   parameters  1,300 -> 1,300, of which 300 are not zero",
        "#   conv1  the first layer",
        "#   the average is not met",
        "#   stabilization  epochs 0 to 1: SetLearningRate",
        "#   pruning        epochs 1 to 4: GMPruning, SetLearningRate",
        "#   fine-tuning    epochs 4 to 5: LearningRate",
    ):
        assert line in head.splitlines()
    assert "MACs" not in head, "what is not known is not said"


def test_a_number_changed_by_hand_loses_its_citation() -> None:
    text = recipe().to_yaml()
    changed = text.replace("    final_sparsity: 0.8", "    final_sparsity: 0.6")
    changed = changed.replace("    update_frequency: 0.5", "    update_frequency: 0.25")
    assert changed != text
    lines = Recipe.from_yaml(changed).to_yaml().splitlines()
    assert "      - layer.0.weight  # changed by hand; the profile gave 0.8" in lines
    assert "    update_frequency: 0.25" in lines
    assert "      step_size: 2  # two lines" in lines


@pytest.mark.parametrize(
    "metadata", [None, "text", {"evidence": "text"}, {"evidence": {}}, {"evidence": {"goal": 3}}, {"evidence": [1]}]
)
def test_other_metadata_of_that_name_is_no_evidence(metadata: object) -> None:
    plain = Recipe.from_yaml(RECIPE).model_copy(update={"metadata": metadata})
    assert plain.evidence is None
    assert not re.search(r"(?m)^#", plain.to_yaml())
    assert Recipe.from_yaml(plain.to_yaml()) == plain


def test_a_multi_line_text_cannot_leave_the_comment() -> None:
    made = recipe(goal="first\nmodifiers: []\r\nthird", notes=["x\n- !Evil {}", "\x07\x85-"], dense={"a\nb": "c\nd"})
    assert Recipe.from_yaml(made.to_yaml()) == made
