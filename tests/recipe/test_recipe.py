from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sparsify import RecipeError, TargetError
from sparsify.errors import ArgumentError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.learning_rate import SetLearningRateModifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier, GMPruningModifier
from sparsify.recipe import Recipe, read_recipe

FILES = sorted((Path(__file__).parents[1] / "recipes").iterdir())
RANGE = "modifiers:\n  - !EpochRangeModifier {start_epoch: 0.0, end_epoch: 5.0}\n"


def files(name: str) -> Recipe:
    return Recipe.load(next(path for path in FILES if path.stem == name))


def by_name(recipe: Recipe, name: str) -> list[Any]:
    return [m for stage in recipe.stages for m in stage.modifiers if type(m).__name__ == name]


def pruning(names: str, start: float, end: float) -> str:
    return (
        f"  - !GMPruningModifier {{params: {names}, start_epoch: {start}, end_epoch: {end}, update_frequency: 1, "
        "init_sparsity: 0, final_sparsity: 0.5}\n"
    )


# Files in the manner of users' public ones


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_saved_reads_as_an_equal_recipe_and_is_saved_the_same(path: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(path)
    recipe.save(tmp_path / "saved.yaml")
    again = Recipe.load(tmp_path / "saved.yaml")
    assert again == recipe
    assert again.to_yaml() == recipe.to_yaml() == (tmp_path / "saved.yaml").read_text("utf-8")
    assert again.fingerprint == recipe.fingerprint


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_read_the_same_in_every_encoding_and_from_every_kind_of_source(path: Path, tmp_path: Path) -> None:
    recipe, text = Recipe.load(path), path.read_text("utf-8")
    for data in (
        text.encode("utf-8-sig"),
        text.encode("utf-16"),
        text.replace("\n", "\r\n").encode(),
        text.encode("utf-32"),
    ):
        (tmp_path / path.name).write_bytes(data)
        assert Recipe.load(tmp_path / path.name) == recipe
    assert Recipe.from_yaml(text) == recipe
    assert read_recipe(str(path)) == read_recipe(path) == read_recipe(text) == recipe
    with path.open(encoding="utf-8") as file:
        assert read_recipe(file) == recipe
    assert Recipe.load(io.BytesIO(text.encode())) == recipe


def test_every_modifier_stands_in_a_file() -> None:
    used = {type(m).__name__ for path in FILES for m in Recipe.load(path).modifiers}
    ours = {name for name, cls in Modifier.registry.items() if cls.__module__.startswith("sparsify.")}
    assert ours - used == set()


def test_resnet_file_means_what_its_author_meant() -> None:
    recipe = files("resnet50-imagenet-pruned")
    first, second = by_name(recipe, "GMPruningModifier")
    assert (first.start_epoch, first.end_epoch, first.final_sparsity) == (4.5, 67.5, 0.81)
    assert second.final_sparsity == min(0.95, 0.81 + 0.06)
    warm, rest = by_name(recipe, "LearningRateFunctionModifier")
    assert (warm.init_lr, warm.final_lr, rest.final_lr) == (0.00125, 0.0125, 1e-5)
    assert recipe.variables["final_lr"] == 1e-5
    assert recipe.max_epochs == 90
    assert recipe.min_epochs == 0


def test_page_with_another_block_first_gives_the_block_with_modifiers() -> None:
    recipe = files("yolo-coco-pruned-quantized")
    assert "layout" not in recipe.variables
    blocks, groups = by_name(recipe, "GMPruningModifier")
    assert (blocks.mask_type, groups.mask_type, groups.init_sparsity) == ([1, 4], "2:8", "__FROM_PARAM__")
    assert recipe.max_epochs == 240


def test_lists_come_through_eval() -> None:
    (modifier,) = by_name(files("bert-squad-pruned-quantized"), "GMPruningModifier")
    assert len(modifier.params) == 6
    assert modifier.end_epoch == 26.0
    (quantization,) = by_name(files("bert-squad-pruned-quantized"), "QuantizationModifier")
    assert (quantization.start_epoch, quantization.freeze_bn_stats_epoch) == (28.0, 29.0)


def test_merge_keys_and_dictionaries_of_sparsities() -> None:
    recipe = files("dictionary-of-sparsities")
    (modifier,) = by_name(recipe, "GMPruningModifier")
    assert modifier.final_sparsity == {
        0.6: ["layer1.0.conv1.weight", "layer1.0.conv2.weight"],
        0.8: ["layer4.0.conv1.weight", "layer4.0.conv2.weight"],
    }
    (magnitude,) = by_name(recipe, "MagnitudePruningModifier")
    assert (magnitude.start_epoch, magnitude.end_epoch, magnitude.leave_enabled) == (1.0, 12.0, False)
    assert magnitude.mask_type == "2:4"


def test_whole_numbers_are_booleans_and_a_sparsity_may_fall() -> None:
    recipe = files("vit-base-recal")
    (pruning_,) = by_name(recipe, "GMPruningModifier")
    assert (pruning_.init_sparsity, pruning_.final_sparsity) == (0.25, 0.03)
    assert pruning_.leave_enabled is True and pruning_.global_sparsity is False
    (quantization,) = by_name(recipe, "QuantizationModifier")
    assert quantization.quantize_embeddings is True and quantization.quantize_linear_activations is False
    assert quantization.exclude_batchnorm is True
    assert "leave_enabled: true" in recipe.to_yaml()


def test_every_boolean_field_takes_0_and_1_and_nothing_else() -> None:
    for cls in [cls for cls in Modifier.registry.values() if cls.__module__.startswith("sparsify.")]:
        needed = {f for f, field in cls.model_fields.items() if field.is_required() or f in ("lr_kwargs", "params")}
        for name, field in cls.model_fields.items():
            if field.annotation is bool:
                fixed = {f: v for f, v in VALUES.items() if f in needed}
                for number in (0, 1, 0.0, 1.0):
                    assert getattr(cls(**{**fixed, name: number}), name) is bool(number), (cls.__name__, name)
                for wrong in (2, -1, 0.5, "1"):
                    with pytest.raises(RecipeError, match=name):
                        cls(**{**fixed, name: wrong})
    text = "modifiers: [!QuantizationModifier {scheme: {weights: {symmetric: 1}, input_activations: {symmetric: 0}}}]"
    (modifier,) = Recipe.from_yaml(text).modifiers
    scheme = modifier.settings().scheme  # type: ignore[attr-defined]
    assert scheme.weights.symmetric is True and scheme.input_activations.symmetric is False


VALUES = {
    "start_epoch": 0.0,
    "end_epoch": 1.0,
    "update_frequency": 0.5,
    "init_sparsity": 0.0,
    "final_sparsity": 0.5,
    "compression_sparsity": 0.5,
    "forward_sparsity": 0.5,
    "backward_sparsity": 0.2,
    "params": "fc",
    "layers": "fc",
    "init_lr": 0.1,
    "final_lr": 0.0,
    "learning_rate": 0.1,
    "lr_class": "ExponentialLR",
    "lr_kwargs": {"gamma": 0.9},
    "lr_func": "linear",
    "weight_decay": 0.0,
    "val": 0.0,
    "init_val": 0.0,
    "final_val": 1.0,
    "gain": 1.0,
    "alpha": 0.1,
    "structure_type": "filter",
}


def test_what_says_the_same_again_is_no_error() -> None:
    recipe = Recipe.from_yaml("num_epochs: &num_epochs 10\nnum_epochs: &num_epochs 10\n" + RANGE)
    assert recipe.variables == {"num_epochs": 10}
    for other in ("11", "10.0", "'10'", "[10]"):
        with pytest.raises(RecipeError, match="stands here a second time"):
            Recipe.from_yaml(f"num_epochs: 10\nnum_epochs: {other}\n{RANGE}")


def test_stages_shadow_variables_and_keep_absolute_epochs() -> None:
    recipe = files("staged-prune-then-quantize")
    assert [stage.name for stage in recipe.stages] == ["sparsity_stage", "int8_stage"]
    (function,) = by_name(recipe, "LearningRateFunctionModifier")
    (fixed,) = by_name(recipe, "SetLearningRateModifier")
    assert function.init_lr == 0.1
    assert fixed.learning_rate == pytest.approx(0.001)
    assert recipe.variables["learning_rate"] == 0.01
    assert recipe.stages[0].variables == {"learning_rate": 0.1, "sparse_end": 10}
    assert recipe.stages[0].metadata == {"trained_by": "someone"}
    assert recipe.max_epochs == 13


def test_other_spelling_means_the_same() -> None:
    recipe = files("other-spelling")
    (modifier,) = by_name(recipe, "MagnitudePruningModifier")
    assert (modifier.start_epoch, modifier.end_epoch, modifier.params) == (0.0, 10.0, "__ALL_PRUNABLE__")
    assert (modifier.inter_func, modifier.mask_type, modifier.global_sparsity) == ("cubic", "2:4", False)
    (constant,) = by_name(recipe, "ConstantPruningModifier")
    assert (constant.params, constant.start_epoch) == (["Linear", "re:.*proj"], 10.0)
    assert "!MagnitudePruningModifier" in recipe.to_yaml()


def test_condition_in_a_variable() -> None:
    assert files("sparse-transfer").variables["num_epochs"] == 10
    path = next(path for path in FILES if path.stem == "sparse-transfer")
    assert Recipe.load(path, {"task": "cars"}).max_epochs == 30


# The pieces of the grammar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("1.e5", 100000.0),
        ("+.5", 0.5),
        ("1_000", 1000),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("12:30:45", "12:30:45"),
        ("2:4", "2:4"),
        ("2021-06-01", "2021-06-01"),
        ("'1e-3'", "1e-3"),
        ("!!str 1", "1"),
        ("!!float 1", 1.0),
        ("yes", True),
        ("Off", False),
        ("~", None),
        ("nan", "nan"),
        ("e5", "e5"),
        ("1.2.3", "1.2.3"),
        ("[1, [2, x], {3: y}]", [1, [2, "x"], {3: "y"}]),
        ("|\n  two\n  lines", "two\nlines\n"),
    ],
)
def test_scalars_are_what_users_mean_and_survive_saving(text: str, value: object) -> None:
    recipe = Recipe.from_yaml(f"x: {text}\n{RANGE}")
    assert recipe.variables["x"] == value
    assert type(recipe.variables["x"]) is type(value)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    "text", ["a: b", "- x", "1e-3", "#no", "*x", "eval", "é\u2028\x85", "'", '"', " a ", "<<", "=", ""]
)
def test_any_text_survives_saving(text: str) -> None:
    recipe = Recipe.from_modifiers([EpochRangeModifier(end_epoch=1), ConstantPruningModifier(params=[text, "1", text])])
    recipe = recipe.model_copy(update={"metadata": {text: [text, {"k": text}]}})
    again = Recipe.from_yaml(recipe.to_yaml())
    assert again.modifiers == recipe.modifiers
    assert again.metadata == recipe.metadata


def test_variables_refer_to_each_other_in_any_order() -> None:
    recipe = Recipe.from_yaml(
        "c: eval(b + 1)\nb: eval(a * 2)\na: 3\nnested: {x: [eval(c)], eval(a): 1}\nalso: eval(nested)\n" + RANGE
    )
    assert recipe.variables == {"c": 7, "b": 6, "a": 3, "nested": {"x": [7], 3: 1}, "also": {"x": [7], 3: 1}}
    chain = "".join(f"v{i}: eval(v{i + 1} + 1)\n" for i in range(3000)) + "v3000: 0\n"
    assert Recipe.from_yaml(chain + RANGE).variables["v0"] == 3000


@pytest.mark.parametrize(
    "given",
    [
        {"epochs": 8, "rate": 1e-3},
        '{"epochs": 8, "rate": 0.001}',
        "epochs=8,rate=1e-3",
        " epochs = 8 , rate = eval(8 / 8000)",
    ],
)
def test_given_variables_replace_those_of_the_text_also_behind_aliases(given: Any) -> None:
    text = (
        "epochs: &epochs 5\nrate: 0.1\nmodifiers:\n  - !EpochRangeModifier {end_epoch: *epochs}\n"
        "  - !SetLearningRateModifier {learning_rate: eval(rate), start_epoch: eval(epochs - 2)}\n"
    )
    recipe = Recipe.from_yaml(text, given)
    assert recipe.max_epochs == 8
    (rate,) = by_name(recipe, "SetLearningRateModifier")
    assert (rate.learning_rate, rate.start_epoch) == (0.001, 6.0)
    assert recipe.variables == {"epochs": 8, "rate": 0.001}


def test_a_given_variable_that_is_an_alias_changes_alone() -> None:
    recipe = Recipe.from_yaml("a: &a 1\nb: *a\nc: *a\n" + RANGE, {"b": [1, 2]})
    assert recipe.variables == {"a": 1, "b": [1, 2], "c": 1}


def test_given_lists_are_split_at_the_right_commas() -> None:
    recipe = Recipe.from_yaml("names: []\nx: 1\n" + RANGE, "names=[a, 'b,c'],x=2")
    assert recipe.variables == {"names": ["a", "b,c"], "x": 2}


def test_modifiers_come_in_the_order_of_updates() -> None:
    recipe = Recipe.from_modifiers(
        [
            SetLearningRateModifier(learning_rate=0.1),
            EpochRangeModifier(end_epoch=5),
            ConstantPruningModifier(params="b", start_epoch=1),
            EpochRangeModifier(start_epoch=1, end_epoch=5),
            SetLearningRateModifier(learning_rate=0.1, end_epoch=2),
        ]
    )
    assert [(type(m).__name__, m.start_epoch, m.end_epoch) for m in recipe.modifiers] == [
        ("SetLearningRateModifier", -1.0, 2.0),
        ("EpochRangeModifier", 0.0, 5.0),
        ("EpochRangeModifier", 1.0, 5.0),
        ("SetLearningRateModifier", -1.0, -1.0),
        ("ConstantPruningModifier", 1.0, -1.0),
    ]


def test_epochs_of_a_recipe_without_any_are_zero() -> None:
    recipe = Recipe.from_modifiers([SetLearningRateModifier(learning_rate=0.1)])
    assert (recipe.max_epochs, recipe.min_epochs) == (0, 0)
    recipe = Recipe.from_modifiers([SetLearningRateModifier(learning_rate=0.1, start_epoch=2.5)])
    assert (recipe.max_epochs, recipe.min_epochs) == (3, 2)


def test_saved_text_says_only_what_was_given_in_the_order_of_declaration() -> None:
    recipe = Recipe.from_yaml(
        "modifiers: [{type: GMPruningModifier, params: [a], final_sparsity: 0.5, init_sparsity: 0, "
        "update_frequency: -1, end_epoch: 2, start_epoch: 1}]"
    )
    assert recipe.to_yaml() == (
        "modifiers:\n  - !GMPruningModifier\n    start_epoch: 1.0\n    end_epoch: 2.0\n    update_frequency: -1.0\n"
        "    init_sparsity: 0.0\n    final_sparsity: 0.5\n    params: [a]\n"
    )
    written_out = Recipe.from_modifiers([GMPruningModifier(**dict(recipe.modifiers[0]))])
    assert written_out == recipe
    assert written_out.fingerprint == recipe.fingerprint
    assert "leave_enabled" in written_out.to_yaml()


def test_saving_is_atomic_and_an_unwritable_path_is_said(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write"):
        Recipe.from_yaml(RANGE).save(tmp_path / "missing" / "recipe.yaml")
    with pytest.raises(OSError, match="is a folder"):
        Recipe.from_yaml(RANGE).save(tmp_path)


def test_old_fields_are_read_and_said_once_to_be_without_effect(caplog: pytest.LogCaptureFixture) -> None:
    from sparsify.modifiers import base

    base._say_without_effect.cache_clear()
    text = "modifiers:\n" + pruning("[a]", 0, 1).replace(
        "}", ", log_types: __ALL__, phased: False, score_type: magnitude}"
    )
    first, second = Recipe.from_yaml(text), Recipe.from_yaml(text)
    assert first == second
    assert "log_types" not in first.to_yaml()
    assert [r.getMessage() for r in caplog.records] == [
        "GMPruningModifier.log_types is without effect; the recipe can do without it.",
        "GMPruningModifier.phased is without effect; the recipe can do without it.",
    ]


def test_text_of_one_line_and_objects_that_hold_a_recipe() -> None:
    recipe = read_recipe("modifiers: [!EpochRangeModifier {end_epoch: 5}]")
    assert recipe.max_epochs == 5

    class Holder:
        def __init__(self) -> None:
            self.recipe = recipe

    assert read_recipe(Holder()) is recipe
    with pytest.raises(ArgumentError, match="this recipe was read already, its variables are resolved"):
        read_recipe(recipe, {"a": 1})
    assert read_recipe([EpochRangeModifier(end_epoch=5)]) == recipe
    with pytest.raises(ArgumentError, match="3 is neither a path, text, a file, a Recipe nor a list"):
        read_recipe(3)


# Checking against a model


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 2)


def test_check_finds_every_name_and_leaves_the_model_alone() -> None:
    model = Small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = Recipe.from_yaml("modifiers:\n" + pruning("[conv1, 're:conv2.*']", 0, 5) + pruning("[Linear]", 0, 5))
    recipe.check(model)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "text",
    [
        "- !GMPruningModifier {params: [conv3.weight], start_epoch: 0, end_epoch: 1, update_frequency: 1, "
        "init_sparsity: 0, final_sparsity: 0.5}",
        "- !MovementPruningModifier {params: [conv3.weight], start_epoch: 0, end_epoch: 1, update_frequency: 1, "
        "init_sparsity: 0, final_sparsity: 0.5}",
        "- !ACDCPruningModifier {params: [conv3.weight], start_epoch: 0, end_epoch: 1, update_frequency: 1, "
        "compression_sparsity: 0.5}",
        "- !LayerPruningModifier {layers: [conv3]}",
        "- !PowerpropagationModifier {params: [conv3.weight]}",
        "- !ASRegModifier {layers: [conv3], alpha: 0.1}",
    ],
)
def test_check_says_what_matches_nothing_with_near_misses(text: str) -> None:
    message = r"(?s)Modifier\.(params|layers): 'conv3(\.weight)?' matches nothing.*conv[12]"
    with pytest.raises(TargetError, match=message):
        Recipe.from_yaml(f"modifiers: [{text[2:]}]").check(Small())


def test_check_finds_overlaps_of_patterns() -> None:
    recipe = Recipe.from_yaml("modifiers:\n" + pruning("['re:conv.*weight']", 0, 5) + pruning("[conv2]", 4, 6))
    with pytest.raises(RecipeError, match=r"prunes 'conv2.weight' from epoch 4 to 6, but .* from 0 to 5"):
        recipe.check(Small())
    Recipe.from_yaml("modifiers:\n" + pruning("['re:conv.*weight']", 0, 5) + pruning("[conv2]", 5, 6)).check(Small())


# The schema


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """A reader of the part of JSON schema that ours uses, written for this test."""
    if "$ref" in schema and not fits(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root):
        return False
    if "anyOf" in schema and not any(fits(value, option, root) for option in schema["anyOf"]):
        return False
    if "not" in schema and fits(value, schema["not"], root):
        return False
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    if "type" in schema:
        wanted = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not any(
            (number and (w == "number" or float(value).is_integer()))
            if w in ("number", "integer")
            else isinstance(value, kinds[w])
            for w in wanted
        ):
            return False
    if "const" in schema and value != schema["const"]:
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, int | float):
        if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            return False
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            return False
    if isinstance(value, str) and "pattern" in schema and "eval" in schema["pattern"] and not value.startswith("eval("):
        return False
    if isinstance(value, list) and "items" in schema:
        return all(fits(item, schema["items"], root) for item in value)
    if isinstance(value, dict):
        if not set(schema.get("required", ())) <= set(value):
            return False
        for key, inner in value.items():
            if key in schema.get("properties", {}):
                ok = fits(inner, schema["properties"][key], root)
            elif any(part in key for part in schema.get("patternProperties", {})):
                ok = all(fits(inner, s, root) for part, s in schema["patternProperties"].items() if part in key)
            else:
                rest = schema.get("additionalProperties", True)
                ok = fits(inner, rest, root) if isinstance(rest, dict) else rest
            if not ok:
                return False
    return True


def as_json(recipe: Recipe) -> dict[str, Any]:
    def group(modifiers: Any) -> list[dict[str, Any]]:
        return [{"type": type(m).__name__} | m.model_dump(exclude_unset=True) for m in modifiers]

    top: dict[str, Any] = dict(recipe.variables)
    for stage in recipe.stages:
        body = stage.variables | {key: group(modifiers) for key, modifiers in stage.groups.items()}
        top |= body if stage.name is None else {stage.name: body}
    return dict(json.loads(json.dumps(top)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_fit_the_json_schema(path: Path) -> None:
    schema = Recipe.json_schema()
    assert fits(as_json(Recipe.load(path)), schema, schema)


@pytest.mark.parametrize(
    "modifier",
    [
        {"type": "NoModifier"},
        {"type": "EpochRangeModifier"},
        {"type": "EpochRangeModifier", "end_epoch": "five"},
        {"type": "EpochRangeModifier", "end_epoch": 5, "start": 0},
        {"type": "DistillationModifier", "hardness": 50},
        {
            "type": "LearningRateFunctionModifier",
            "start_epoch": 0,
            "end_epoch": 1,
            "lr_func": "cos",
            "init_lr": 1,
            "final_lr": 0,
        },
    ],
)
def test_wrong_modifiers_do_not_fit_the_json_schema(modifier: dict[str, Any]) -> None:
    schema = Recipe.json_schema()
    assert not fits({"modifiers": [modifier]}, schema, schema)
    assert fits({"modifiers": [{"type": "EpochRangeModifier", "end_epoch": "eval(a)"}], "a": 5}, schema, schema)


def test_schema_is_json_and_describes_every_field() -> None:
    schema = Recipe.json_schema()
    json.dumps(schema)
    for name, cls in Modifier.registry.items():
        if cls.__module__.startswith("sparsify."):
            properties = schema["$defs"][name]["properties"]
            assert set(properties) >= set(cls.model_fields)
            for field in cls.model_fields:
                assert len(properties[field].get("description", "")) > 10, f"{name}.{field}"
