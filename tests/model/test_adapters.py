"""Models of peft: names from before it came, pruning of base and adapters, adapters merged at export."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyWarning, TargetError
from sparsify.model.adapters import merged_copy
from sparsify.model.targets import named_parameters, resolve_layers, resolve_parameters
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier, GMPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.onnx.export import export_onnx
from sparsify.onnx.verify import verify_onnx
from sparsify.training.manager import ScheduledModifierManager

peft = pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


UP = "base_model.model.blocks.0.up.base_layer.weight"


def adapted(trained: bool = False, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["up"], "modules_to_save": ["head"], **fields})
    model: nn.Module = peft.get_peft_model(Model(), config)
    if trained:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.1)
    return model


def half(params: str | list[str], **fields: Any) -> GMPruningModifier:
    return GMPruningModifier(
        params=params, start_epoch=0.0, end_epoch=1.0, update_frequency=0.5, init_sparsity=0.1, final_sparsity=0.5,
        **fields,
    )  # fmt: skip


def train(model: nn.Module, modifiers: list[Any], **given: Any) -> ScheduledModifierManager:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    manager = ScheduledModifierManager(modifiers)
    manager.modify(model, optimizer, steps_per_epoch=4, **given)
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(5, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    return manager


@pytest.mark.parametrize(
    "said",
    [
        UP,
        "base_model.model.blocks.0.up",
        "base_model.model.blocks.0.up.weight",
        "blocks.0.up",
        "blocks.0.up.weight",
        "blocks.0.up.base_layer.weight",
        r"re:blocks\.0\.up\.weight",
        r"re:blocks\.0\.up$",
        r"re:.*0\.up\.weight",
    ],
)
def test_a_layer_is_known_by_its_names_with_and_without_peft(said: str) -> None:
    assert list(resolve_parameters(adapted(), said, where="x")) == [UP]
    if "weight" not in said and not said.startswith("re:"):
        assert list(resolve_layers(adapted(), said, where="x")) == ["base_model.model.blocks.0.up"]


def test_adapters_and_copies_that_are_saved_have_names() -> None:
    model = adapted()
    found = list(resolve_parameters(model, "re:.*lora_A.*weight", where="x"))
    assert found == [f"base_model.model.blocks.{i}.up.lora_A.default.weight" for i in (0, 1)]
    assert list(resolve_parameters(model, "head", where="x")) == [
        "base_model.model.head.modules_to_save.default.weight"
    ]
    with pytest.raises(TargetError, match=r"'blocks.0.upp.weight' matches nothing.*\n.*'blocks.0.up.weight'"):
        resolve_parameters(model, "blocks.0.upp.weight", where="x")


def test_adapters_that_were_injected_without_a_wrapper_are_looked_through() -> None:
    model = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up"]), Model())
    assert list(resolve_parameters(model, "blocks.0.up.weight", where="x")) == ["blocks.0.up.base_layer.weight"]
    assert [type(m) for m in merged_copy(model)[0].blocks[0].children()] == [nn.Linear, nn.Linear]


def test_frozen_weights_of_the_base_are_left_alone_and_named() -> None:
    model = adapted()
    with (
        pytest.warns(SparsifyWarning, match="lora_B.default.weight' hold nothing but zeros"),
        pytest.warns(SparsifyWarning, match=r"frozen parameters are left alone: base_model.model.blocks.0.up.base"),
    ):
        manager = train(model, [half("__ALL_PRUNABLE__")])
    assert all("lora" in name or "modules_to_save" in name for name in manager.sparsity())
    manager.finalize()


def test_a_base_is_pruned_while_adapters_are_trained() -> None:
    model = adapted()
    base = named_parameters(model)[UP]
    base.requires_grad_(True)
    manager = train(model, [half(["blocks.0.up", "re:.*lora_A.*"])])
    manager.finalize()
    assert set(manager.sparsity().values()) == {0.5}
    assert int((base == 0).sum()) == base.numel() // 2


def test_adapters_are_merged_at_export_and_the_model_stays(tmp_path: Path) -> None:
    model, x = adapted(trained=True), torch.randn(3, 8)
    before = copy.deepcopy(model.state_dict())
    expected = model.eval()(x)
    export_onnx(model, x, tmp_path / "model.onnx")
    assert verify_onnx(model, tmp_path / "model.onnx", x).ok
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), expected)
    onnx = pytest.importorskip("onnx")
    names = [tensor.name for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert not any("lora" in name or "base_layer" in name for name in names)
    # A wrong merge is seen: the file is compared with the model as it was trained.
    with torch.no_grad():
        named_parameters(model)["base_model.model.blocks.0.up.lora_B.default.weight"].mul_(3.0)
    assert not verify_onnx(model, tmp_path / "model.onnx", x).ok


def test_adapters_that_are_off_are_left_out(tmp_path: Path) -> None:
    model, x = adapted(trained=True, modules_to_save=None), torch.randn(3, 8)
    model.base_model.disable_adapter_layers()
    export_onnx(model, x, tmp_path / "model.onnx")
    assert verify_onnx(model, tmp_path / "model.onnx", x).ok


def test_zeros_that_merging_fills_are_said_with_numbers(tmp_path: Path) -> None:
    model, x = adapted(trained=True), torch.randn(3, 8)
    with torch.no_grad():
        for index in (0, 1):
            weight = named_parameters(model)[f"base_model.model.blocks.{index}.up.base_layer.weight"]
            weight.view(-1)[: weight.numel() * 3 // 4] = 0.0
    message = r"fills zeros of 2 pruned weights, from 75.0% to 0.0% together: 'blocks.0.up.weight' from 75.0% to 0.0%"
    with pytest.warns(SparsifyWarning, match=message):
        export_onnx(model, x, tmp_path / "model.onnx")
    _, filled = merged_copy(model)
    assert filled == {"blocks.0.up.weight": (96, 0), "blocks.1.up.weight": (96, 0)}
    # The way out that is named: merged first, then pruned.
    plain = model.merge_and_unload().requires_grad_(True)
    manager = ScheduledModifierManager([half("re:.*up.weight")])
    manager.apply(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SparsifyWarning)
        export_onnx(plain, x, tmp_path / "model.onnx")


def test_int8_beside_adapters_is_exported_as_it_was_trained(tmp_path: Path) -> None:
    model, x = adapted(), torch.randn(3, 8)
    manager = train(model, [QuantizationModifier(start_epoch=0.0)], sample_inputs=x)
    manager.finalize()
    summary = export_onnx(model, x, tmp_path / "model.onnx")
    assert verify_onnx(model, tmp_path / "model.onnx", x).ok
    onnx = pytest.importorskip("onnx")
    names = [tensor.name for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer]
    assert any("lora_A" in name for name in names) and summary is not None


def test_zeros_of_a_sparse_base_hold_beside_adapters() -> None:
    model = adapted()
    with torch.no_grad():
        base = named_parameters(model)[UP]
        base[:8] = 0.0
    base.requires_grad_(True)
    manager = train(model, [ConstantPruningModifier(params=["blocks.0.up"], start_epoch=0.0)])
    manager.finalize()
    assert manager.sparsity() == {UP: 0.5}
