"""A finished model as a folder: built again to the bit, in another process, and nothing believed that does not fit."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify import (
    QuantizationModifier,
    ScheduledModifierManager,
    export_onnx,
    floating_layers,
    load_model,
    quantize_model,
    save_model,
    shrink,
)
from sparsify.errors import ArgumentError, DataError, DataFileError, StateError
from sparsify.quantization.plan import is_quantized
from sparsify.training.checkpoint import checksum
from tests.loops import quantized, quantized_and_trained, train
from tests.zoo import prunable
from tests.zoo.quantizable import ZOO
from tests.zoo.small import Tied, perceptron

ROOT = Path(__file__).parents[2]

CUT_PRUNE_QUANTIZE = """
modifiers:
  - !StructuredPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.25
    final_sparsity: 0.5
    start_epoch: 0.0
    end_epoch: 1.0
    update_frequency: 0.5
    multiple: 1
    shrink: true
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.25
    final_sparsity: 0.5
    start_epoch: 1.0
    end_epoch: 2.0
    update_frequency: 0.5
  - !QuantizationModifier
    start_epoch: 3.0
    disable_quantization_observer_epoch: 4.0
"""


def through_a_folder(model: nn.Module, fresh: nn.Module, tmp_path: Path) -> nn.Module:
    return load_model(save_model(model, tmp_path / "saved"), fresh)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Everything that a model holds, caches too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_model(one: nn.Module, two: nn.Module, *, order: bool = True) -> None:
    mine, theirs = state_of(one), state_of(two)
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        other = theirs[name]
        assert (tensor.dtype, tensor.stride(), tensor.requires_grad) == (
            other.dtype,
            other.stride(),
            other.requires_grad,
        ), name
        assert torch.equal(tensor, other), name
    modes = [(name, module.training, type(module).__name__) for name, module in one.named_modules()]
    assert modes == [(name, module.training, type(module).__name__) for name, module in two.named_modules()]
    names, others = list(one.state_dict()), list(two.state_dict())
    assert names == others if order else sorted(names) == sorted(others)


def assert_computes_the_same(one: nn.Module, two: nn.Module, inputs: Any, *, order: bool = True) -> None:
    """In eval mode, and over further training."""
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(one).eval()(inputs), copy.deepcopy(two).eval()(inputs))
    torch.manual_seed(5)
    losses = train(one.train(), inputs, 3)
    torch.manual_seed(5)
    assert train(two.train(), inputs, 3) == losses
    assert_same_model(one, two, order=order)


@pytest.mark.parametrize(
    "name",
    [name if name in ("gated", "attention", "up") else pytest.param(name, marks=pytest.mark.slow) for name in ZOO],
)
def test_a_quantized_model_is_built_again_to_the_bit(name: str, tmp_path: Path) -> None:
    model, inputs = quantized_and_trained(name)
    torch.manual_seed(99)
    loaded = through_a_folder(model, ZOO[name][0](), tmp_path)
    assert_same_model(model, loaded)
    assert_computes_the_same(model, loaded, inputs)


@pytest.mark.parametrize("kind", [prunable.Residual, pytest.param(prunable.Encoder, marks=pytest.mark.slow)])
def test_a_smaller_sparse_quantized_model_is_built_again_to_the_bit(kind: type[nn.Module], tmp_path: Path) -> None:
    model = prunable.made(kind)
    manager = ScheduledModifierManager.from_yaml(CUT_PRUNE_QUANTIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=prunable.batch(kind, 0)[0])
    for number in range(10):
        prunable.step(model, optimizer, number)
    manager.finalize(model)
    smaller = sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in kind().parameters())
    assert smaller and is_quantized(model)
    loaded = through_a_folder(model, kind(), tmp_path)
    assert_same_model(model, loaded)
    x = prunable.batch(kind, 0)[0]
    for which, one in enumerate((model, loaded)):
        export_onnx(copy.deepcopy(one).eval(), x, tmp_path / f"{which}.onnx")
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "1.onnx").read_bytes()
    assert_computes_the_same(model, loaded, x)
    # What was loaded can be saved again, to the same bytes.
    again = save_model(loaded.train(model.training), tmp_path / "again")
    other = save_model(model, tmp_path / "other")
    for file in ("model.safetensors", "sparsify.json"):
        assert (again / file).read_bytes() == (other / file).read_bytes(), file


FRESH = """
import sys
sys.path[:0] = [{root!r}]
import torch
from sparsify import load_model
from tests.zoo.prunable import Residual

model = load_model({folder!r}, Residual())
torch.save(model.eval()(torch.load({inputs!r})), {outputs!r})
assert not [name for name in sys.modules if name in ("transformers", "lightning", "onnxruntime")]
"""


def test_a_fresh_process_needs_the_class_alone(tmp_path: Path) -> None:
    model = prunable.made(prunable.Residual)
    x = prunable.batch(prunable.Residual, 0)[0]
    quantized(model, x)
    prunable.step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    folder = save_model(model, tmp_path / "saved")
    torch.save(x, tmp_path / "x.pt")
    code = FRESH.format(
        root=str(ROOT), folder=str(folder), inputs=str(tmp_path / "x.pt"), outputs=str(tmp_path / "y.pt")
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), model.eval()(x))


SCHEMES: dict[str, dict[str, Any]] = {
    "learned steps": {"scheme": {"input_activations": {"observer": "lsq"}, "weights": {"observer": "lsq"}}},
    "histograms": {"scheme": {"input_activations": {"observer": "percentile", "kwargs": {"percentile": 99.0}}}},
    "affine blocks of four bits": {
        "scheme": {
            "input_activations": None,
            "weights": {"num_bits": 4, "symmetric": False, "strategy": "block", "block_size": 16},
        }
    },
    "weights alone": {"scheme": {"input_activations": None}},
    "in part": {"ignore": ["0", "re:.*1"]},
}


# `train` steps with an optimizer of its own, which is told.
@pytest.mark.filterwarnings("ignore:the weights moved, but no step", "ignore:no step of the optimizer was seen")
@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_is_built_again(name: str, tmp_path: Path) -> None:
    modifier = QuantizationModifier(start_epoch=0.0, **SCHEMES[name])
    model = perceptron(6, 12, 4, norm=True)
    manager = ScheduledModifierManager([modifier])
    x = torch.randn(16, 6)
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=1, sample_inputs=x)
    train(model, x, 3)
    manager.finalize(model)
    loaded = through_a_folder(model, perceptron(6, 12, 4, norm=True, seed=1), tmp_path)
    assert_same_model(model, loaded)
    assert_computes_the_same(model, loaded, x)


def test_a_model_of_which_a_part_is_quantized(tmp_path: Path) -> None:
    def build(seed: int = 0) -> nn.Module:
        return nn.Sequential(perceptron(6, 12, 4, norm=True, seed=seed), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    model, x = build(), torch.randn(16, 6)
    quantized(model[0], x)
    train(model, x, 2)
    loaded = through_a_folder(model, build(1), tmp_path)
    # Added keys stand behind those of the part there, and behind all others in a model that was built again.
    assert_same_model(model, loaded, order=False)
    assert floating_layers(loaded) == floating_layers(model)
    assert_computes_the_same(model, loaded, x, order=False)
    with pytest.raises(StateError, match="a part of the model that was quantized"):
        save_model(model[0][0], tmp_path / "part")  # type: ignore[index]


def test_without_training_and_without_a_recipe(tmp_path: Path) -> None:
    model = perceptron(6, 12, 4, norm=True).eval()
    x = torch.randn(32, 6)
    found = quantize_model(model, [x], ranges="mse").model
    loaded = through_a_folder(found, perceptron(6, 12, 4, norm=True, seed=1), tmp_path)
    assert_same_model(found, loaded)
    assert_computes_the_same(found, loaded, x)


def test_layers_that_became_the_identity_stay_so(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3))

    model, x = build(), torch.randn(8, 6)
    ScheduledModifierManager.from_yaml(
        "modifiers:\n  - !LayerPruningModifier\n    layers: ['1']\n    start_epoch: 0.0\n"
        "  - !QuantizationModifier\n    start_epoch: 1.0"
    ).apply(model, sample_inputs=x)
    train(model, x, 2)
    loaded = through_a_folder(model, build(), tmp_path)
    assert_same_model(model, loaded)
    assert_computes_the_same(model, loaded, x)


def test_shrunk_by_hand_and_its_numbers_in_code(tmp_path: Path) -> None:
    model = prunable.made(prunable.Encoder)
    with torch.no_grad():
        model.up.weight[::2] = 0.0
        model.up.bias[::2] = 0.0
        model.down.weight[:, ::2] = 0.0
        for layer in (model.attention.query, model.attention.key, model.attention.value):
            layer.weight[:16] = 0.0
            layer.bias[:16] = 0.0
        model.attention.out.weight[:, :16] = 0.0
    x = prunable.batch(prunable.Encoder, 0)[0]
    shrink(model, x)
    assert model.attention.heads == 2 and model.up.out_features == 12
    loaded: Any = through_a_folder(model, prunable.Encoder(), tmp_path)
    assert loaded.attention.heads == 2 and loaded.up.out_features == 12
    assert_same_model(model, loaded)
    assert_computes_the_same(model, loaded, x)
    # A part of it knows what it was, too.
    part = load_model(save_model(model.attention, tmp_path / "part"), prunable.HeadsByHand(32, 4))
    assert torch.equal(part(x @ torch.ones(6, 32)), model.attention(x @ torch.ones(6, 32)))


class Odd(nn.Module):
    """Buffers, types, layouts and ties of all kinds."""

    def __init__(self, *, seed: int = 0, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.narrow = nn.Linear(4, 4).to(dtype)
        self.scale = nn.Parameter(torch.rand(()))
        self.register_buffer("table", torch.randn(3, 2).t())
        self.register_buffer("hidden", torch.rand(2), persistent=False)
        self.register_buffer("later", None)
        self.register_buffer("wave", torch.randn(3, dtype=torch.complex128))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("flags", torch.rand(7) > 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) * self.scale
        x = self.narrow(x.to(self.narrow.weight.dtype)).float()
        x = self.conv(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize("fresh_tied", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_types_layouts_ties_and_caches_are_as_they_were(tied: bool, fresh_tied: bool, tmp_path: Path) -> None:
    model = Odd(tied=tied)
    model.later = torch.arange(3)
    model.register_buffer("cache", torch.rand(2), persistent=False)
    model.scale.requires_grad_(False)
    model.train()
    model.conv.eval()
    with torch.no_grad():
        model.embed.weight[1] = 0.0
    fresh = Odd(seed=1, tied=fresh_tied, dtype=torch.float32)
    parameters = dict(fresh.named_parameters())
    loaded: Any = through_a_folder(model, fresh, tmp_path)
    assert loaded is fresh and (loaded.head.weight is loaded.embed.weight) == tied
    assert_same_model(model, loaded)
    assert all(parameter is parameters[name] for name, parameter in loaded.named_parameters() if name in parameters)
    assert_computes_the_same(model, loaded, torch.randint(0, 5, (2, 3)))


def test_a_model_on_the_meta_device_gets_its_values(tmp_path: Path) -> None:
    model = Tied(5, 3, 1)
    with torch.device("meta"):
        fresh = Tied(5, 3, 1)
    assert_same_model(model, through_a_folder(model, fresh, tmp_path))


def test_a_wrapped_model_is_looked_through(tmp_path: Path) -> None:
    model = perceptron(6, 8, 3)
    fresh = perceptron(6, 8, 3, seed=1)
    folder = save_model(torch.compile(model, backend="eager"), tmp_path / "a")
    assert load_model(folder, wrapper := torch.compile(fresh, backend="eager")) is wrapper
    assert_same_model(model, fresh)


# `train` steps with an optimizer of its own, which is told.
@pytest.mark.filterwarnings("ignore:the weights moved, but no step", "ignore:no step of the optimizer was seen")
def test_the_recipes_are_kept_and_the_next_one_can_follow(tmp_path: Path) -> None:
    recipe = "modifiers:\n  - !ConstantPruningModifier\n    params: __ALL_PRUNABLE__\n    start_epoch: 0.0"
    model = perceptron(6, 8, 3)
    ScheduledModifierManager.from_yaml(recipe).apply(model)
    loaded = through_a_folder(model, perceptron(6, 8, 3, seed=1), tmp_path)
    x = torch.randn(8, 6)
    manager = ScheduledModifierManager.from_yaml("modifiers:\n  - !QuantizationModifier\n    start_epoch: 0.0")
    manager.modify(loaded, torch.optim.SGD(loaded.parameters(), lr=0.1), steps_per_epoch=1, sample_inputs=x)
    train(loaded, x, 2)
    manager.finalize(loaded)
    saved = json.loads((save_model(loaded, tmp_path / "next") / "sparsify.json").read_text())
    assert [text.partition("!")[2].split()[0] for text in saved["recipes"]] == [
        "ConstantPruningModifier",
        "QuantizationModifier",
    ]
    assert_same_model(loaded, load_model(tmp_path / "next", perceptron(6, 8, 3)))


# ---------------------------------------------------------------------- refused


def changed(model: nn.Module) -> Callable[[], bool]:
    """Tells later if anything of a model is not what it is now."""
    kept = copy.deepcopy(state_of(model))
    modules = [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]

    def is_changed() -> bool:
        now = state_of(model)
        same = kept.keys() == now.keys() and all(torch.equal(kept[name], now[name]) for name in kept)
        return not same or modules != [(n, type(m), sorted(vars(m))) for n, m in model.named_modules()]

    return is_changed


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = prunable.made(prunable.Residual)
    x = prunable.batch(prunable.Residual, 0)[0]
    with torch.no_grad():
        model.conv2.weight[:5] = 0.0
        model.conv3.weight[:, :5] = 0.0
    shrink(model, x)
    quantized(model, x)
    prunable.step(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    return save_model(model, tmp_path_factory.mktemp("once") / "saved")


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A smaller quantized model in a folder."""
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


def described(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the description as somebody would who knows how its checksum is made."""
    file = folder / "sparsify.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    change(content)
    file.write_text(json.dumps({**content, "checksum": checksum(content)}))


def plan_in(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["structure"]["quantized"]["plan"]
    return found


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (lambda c: c.update(format="x"), "its format is not"),
    "a later version": (lambda c: c.update(version=2), "its version is 2"),
    "a part from later": (lambda c: c["structure"].update(palettized={}), "palettized is unknown"),
    "a part is missing": (lambda c: c["structure"].pop("sizes"), "sizes is missing"),
    "a shape": (lambda c: c["structure"]["tensors"]["fc.weight"].update(shape=[4, 13]), "fc.weight"),
    "a huge shape": (lambda c: c["structure"]["tensors"]["fc.weight"].update(shape=[2**40, 2**40]), "fc.weight"),
    "a type": (lambda c: c["structure"]["tensors"]["fc.weight"].update(dtype="object"), "no type of tensors"),
    "strides": (lambda c: c["structure"]["tensors"]["fc.weight"].update(strides=[2**40, 1]), "strides"),
    "a tie to nothing": (lambda c: c["structure"]["tensors"].update(
        x={"kind": "parameter", "dtype": "float32", "shape": [1], "same_as": "y"}), "same as 'y'"),
    "256 bits": (lambda c: plan_in(c)["sites"][0].update(bits=2**20), "no plan"),
    "text for a number": (lambda c: plan_in(c)["layers"][0].update(largest="127"), "no plan"),
    "a quantizer in a layer's place": (lambda c: plan_in(c)["sites"][0].update(child="conv1"), "no plan"),
    "a source that is not there": (lambda c: plan_in(c)["layers"][0].update(source="x_quantizer"), "cannot be put"),
    "an unknown layer": (lambda c: plan_in(c)["norms"].append("nowhere"), "nowhere"),
    "a layer that is none": (lambda c: plan_in(c)["layers"].append({**plan_in(c)["layers"][0], "name": "bn1"}), "bn1"),
    "a norm that is none": (lambda c: plan_in(c)["slow"].append("conv1"), "cannot be put"),
    "an axis": (lambda c: plan_in(c)["layers"][0].update(axis=7), "no plan"),
    "a method": (lambda c: c["structure"]["sizes"].update(attributes={"": {"forward": 1}}), "forward"),
    "a flag": (lambda c: c["structure"]["sizes"].update(attributes={"fc": {"training": 1}}), "training"),
    "a range of integers": (lambda c: c["structure"]["tensors"]["conv1.input_quantizer.low"].update(
        dtype="int32"), "conv1.input_quantizer.low"),
    "a cache in a layer that is not there": (lambda c: c["structure"]["tensors"].update(
        {"conv1.input_quantizer.a.b": {"kind": "cache", "dtype": "float32", "shape": [], "same_as": "x"}}), "same as"),
    "many quantizers": (lambda c: plan_in(c)["sites"].extend(
        {**plan_in(c)["sites"][0], "child": f"a{i}_quantizer", "observer": "mse"} for i in range(2000)), "missing"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_description_that_lies_changes_nothing(name: str, saved: Path) -> None:
    change, message = HOSTILE[name]
    described(saved, change)
    model = prunable.Residual()
    is_changed = changed(model)
    with pytest.raises((DataError, StateError), match=message) as caught:
        load_model(saved, model)
    assert "saved" in str(caught.value) and not is_changed()


def test_a_flipped_bit_or_a_cut_anywhere_is_found(saved: Path) -> None:
    model = prunable.Residual()
    is_changed = changed(model)
    for file in ("sparsify.json", "model.safetensors"):
        whole = (saved / file).read_bytes()
        places = [0, 3, 8, 9, len(whole) // 3, len(whole) // 2, len(whole) - 2]
        for place in places:
            flipped = bytearray(whole)
            flipped[place] ^= 4
            for damaged in (bytes(flipped), whole[:place]):
                (saved / file).write_bytes(damaged)
                with pytest.raises(DataError, match=file):
                    load_model(saved, model)
        (saved / file).write_bytes(whole)
    deep = "[" * 100_000
    for text in (
        deep,
        "[]",
        "{}",
        '{"format": "sparsify model", "version": 1, "x": NaN}',
        "\xff",
        '{"a":' + "9" * 5000 + "}",
    ):
        (saved / "sparsify.json").write_text(text, encoding="latin-1")
        with pytest.raises(DataError, match=r"sparsify\.json"):
            load_model(saved, model)
    assert not is_changed()


def test_what_is_no_saved_model_says_so(tmp_path: Path) -> None:
    model = perceptron(3, 4, 2)
    with pytest.raises(DataFileError, match="there is no such folder"):
        load_model(tmp_path / "none", model)
    with pytest.raises(DataFileError, match=r"it holds no sparsify\.json"):
        load_model(tmp_path, model)
    folder = save_model(model, tmp_path / "saved")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataFileError, match=r"model\.safetensors"):
        load_model(folder, model)


def test_another_model_is_refused_by_name_and_stays_as_it_was(saved: Path) -> None:
    wide = prunable.Residual(width=16)
    more = prunable.Residual()
    more.extra = nn.Linear(2, 2)
    fewer = prunable.Residual()
    del fewer.bn2
    again = prunable.Residual()
    quantized(again, prunable.batch(prunable.Residual, 0)[0])
    lazy = prunable.Residual()
    lazy.fc = nn.LazyLinear(4)
    for model, message in (
        (wide, r"'conv1\.weight' has shape \(16, 2, 3, 3\) in this Residual, and should have \(12, 2, 3, 3\)"),
        (more, "this Residual has 'extra.weight'"),
        (fewer, "bn2"),
        (again, "no fresh model: it holds quantized layers"),
    ):
        is_changed = changed(model)
        with pytest.raises(StateError, match=message):
            load_model(saved, model)
        assert not is_changed()
    with pytest.raises(StateError, match="lazy"):
        load_model(saved, lazy)


def test_no_class_is_imported_because_a_file_names_it(saved: Path) -> None:
    with pytest.raises(ArgumentError, match=r"Build Residual\(...\) of tests\.zoo\.prunable"):
        load_model(saved)
    with pytest.raises(ArgumentError, match=r"load_model: model is a type: give a torch\.nn\.Module"):
        load_model(saved, prunable.Residual)  # type: ignore[arg-type]


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    sparse = nn.Linear(2, 2)
    sparse.register_buffer("index", torch.eye(2).to_sparse())
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    for model, message in (
        (sparse, "'index' is a torch.sparse_coo"),
        (empty, "'weight' is on the meta device"),
        (nn.LazyLinear(3), "'weight' has no shape yet"),
    ):
        with pytest.raises(StateError, match=message):
            save_model(model, tmp_path / "saved")
    with pytest.raises(ArgumentError, match=r"give a torch\.nn\.Module"):
        save_model(nn.Linear, tmp_path / "saved")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="a str has no save_pretrained"):
        save_model(nn.Linear(2, 2), tmp_path / "saved", extras=["tokenizer"])
    assert not (tmp_path / "saved").exists() and not os.listdir(tmp_path)


class Told(nn.Module):
    """With an extra state of its own."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


def test_an_extra_state_of_plain_values_is_kept(tmp_path: Path) -> None:
    told: Any = through_a_folder(Told({"seen": [1, 2.5, None, "x"]}), Told(None), tmp_path)
    assert told.state == {"seen": [1, 2.5, None, "x"]}
    with pytest.raises(StateError, match="extra state of its own, a set"):
        save_model(Told({1}), tmp_path / "other")


# ---------------------------------------------------------------------- the folder


class Tokenizer:
    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_other_files_are_not_written_over_in_silence(tmp_path: Path) -> None:
    model, fresh = perceptron(3, 4, 2), perceptron(3, 4, 2, seed=1)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ArgumentError, match=r"holds other files \(thesis.txt\)"):
        save_model(model, folder)
    assert os.listdir(folder) == ["thesis.txt"]
    save_model(model, folder, overwrite=True, extras=[Tokenizer()])
    files = {"model.safetensors", "sparsify.json", "thesis.txt", "tokenizer.json"}
    assert set(os.listdir(folder)) == files
    # A saved model is replaced by the next, and what others put beside it stays.
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    save_model(model, folder)
    assert set(os.listdir(folder)) == files - {"tokenizer.json"}
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert_same_model(model, load_model(folder, fresh))
    assert os.listdir(tmp_path) == ["mine"]


def test_without_safetensors_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(nn.Linear(2, 2), tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: save_model(nn.Linear(2, 2), tmp_path / "b"), lambda: load_model(folder, nn.Linear(2, 2))):
        with pytest.raises(ArgumentError, match=r'pip install "sparsify-recipes\[safetensors\]"'):
            call()
    assert os.listdir(tmp_path) == ["saved"]
