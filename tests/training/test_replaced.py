"""Parameters that are replaced, merged or without values: named at modify or at the next step, not passed over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparsify.errors import SparsifyWarning, StateError, TargetError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier, GMPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.sparse_training import MovementPruningModifier, RigLPruningModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import train_step


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.body(x))
        return out


def another_head(model: Net) -> None:
    model.fc = nn.Linear(8, 10)


def another_body(model: Net) -> None:
    model.body = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 8))
    model.body[0] = nn.Identity()
    model.body[1] = nn.Linear(6, 8)


def another_weight(model: Net) -> None:
    model.fc.weight, model.fc.bias = nn.Parameter(torch.randn(10, 8)), nn.Parameter(torch.zeros(10))


def no_head(model: Net) -> None:
    model.fc = nn.Identity()  # type: ignore[assignment]


def a_norm(model: Net) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.fc)


MODIFIERS: dict[str, Modifier] = {
    "gradual": GMPruningModifier(
        params="__ALL_PRUNABLE__", start_epoch=0.0, end_epoch=5.0, update_frequency=0.5, init_sparsity=0.2,
        final_sparsity=0.5,
    ),
    "constant": ConstantPruningModifier(params="__ALL_PRUNABLE__", start_epoch=0.0),
    "movement": MovementPruningModifier(
        params="__ALL_PRUNABLE__", start_epoch=0.0, end_epoch=5.0, update_frequency=0.5, init_sparsity=0.2,
        final_sparsity=0.5,
    ),
    "rigl": RigLPruningModifier(
        params="__ALL_PRUNABLE__", start_epoch=0.0, end_epoch=5.0, update_frequency=0.5, final_sparsity=0.5
    ),
}  # fmt: skip


def at_work(modifier: Modifier) -> tuple[Net, torch.optim.Optimizer, ScheduledModifierManager]:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for layer in (model.body[0], model.fc):
            layer.weight[:, :2] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager([modifier])
    manager.modify(model, optimizer, steps_per_epoch=2)
    train_step(model, optimizer, torch.randn(3, 6))
    return model, optimizer, manager


@pytest.mark.parametrize("kind", MODIFIERS)
@pytest.mark.parametrize(
    ("replace", "name"),
    [
        (another_head, "fc.weight"),
        (another_weight, "fc.weight"),
        (another_body, "body.0.weight"),
        (no_head, "fc.weight"),
        (a_norm, "fc.weight"),
    ],
)
def test_a_masked_parameter_that_was_replaced_is_named_at_the_next_step(
    kind: str, replace: Callable[[Net], None], name: str
) -> None:
    model, optimizer, manager = at_work(MODIFIERS[kind])
    replace(model)
    with pytest.raises(StateError, match=rf"'{name}' .*was replaced\. Call finalize\(\) before"):
        train_step(model, optimizer, torch.randn(3, 6))
    other = model.fc.weight.detach().clone() if isinstance(model.fc, nn.Linear) else None
    with pytest.warns(SparsifyWarning, match=rf"1 mask fits no parameter any longer.*'{name}'"):
        manager.finalize()
    manager.finalize()
    if other is not None:
        assert torch.equal(model.fc.weight, other) or name != "fc.weight", "what stands there now is left as it is"
    train_step(model, optimizer, torch.randn(3, 6))


def test_a_head_of_the_same_shape_takes_the_mask_over_at_the_next_step() -> None:
    model, optimizer, manager = at_work(MODIFIERS["constant"])
    model.fc = nn.Linear(8, 4)
    train_step(model, optimizer, torch.randn(3, 6))
    assert (model.fc.weight[:, :2] == 0).all() and (model.fc.weight[:, 2:] != 0).all()
    manager.finalize()


def test_a_layer_that_goes_before_its_pruning_starts_is_named_then() -> None:
    late = GMPruningModifier(
        params="fc", start_epoch=1.0, end_epoch=5.0, update_frequency=0.5, init_sparsity=0.2, final_sparsity=0.5
    )
    model, optimizer, manager = at_work(late)
    no_head(model)
    with pytest.raises(TargetError, match=r"'fc.weight' is no longer a parameter of the model"):
        train_step(model, optimizer, torch.randn(3, 6))
    manager.finalize()


@pytest.mark.parametrize("modifier", [*MODIFIERS.values(), QuantizationModifier(start_epoch=0.0)])
def test_a_model_on_the_meta_device_is_refused_at_modify(modifier: Modifier) -> None:
    model = Net().to("meta")
    manager = ScheduledModifierManager([modifier])
    with pytest.raises(TargetError, match=r"'body.0.weight' is on the meta device and holds no values"):
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=2)
    assert not manager.attached
    # What is not meant may be there.
    model.fc = nn.Linear(8, 4)
    if isinstance(modifier, ConstantPruningModifier):
        ScheduledModifierManager([modifier.model_copy(update={"params": "fc"})]).initialize(model)


def test_adapters_that_are_merged_under_a_manager_are_said() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["fc"]))
    weight = model.base_model.model.fc.base_layer.weight.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager([MODIFIERS["gradual"].model_copy(update={"params": "fc"})])
    manager.modify(model, optimizer, steps_per_epoch=2)
    train_step(model, optimizer, torch.randn(3, 6))
    merged = model.merge_and_unload()
    values = merged.fc.weight.detach().clone()
    with (
        pytest.warns(SparsifyWarning, match="9 of 9 masked weights are not zero"),
        pytest.warns(SparsifyWarning, match=r"'base_model.model.fc.base_layer.weight' is masked, and no longer"),
    ):
        manager.finalize()
    assert merged.fc.weight is weight and torch.equal(values, weight), "merged weights are not masked behind one's back"
