"""`prepare` of accelerate with a recipe: steps are counted, and `load_state` finds the structure in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from sparsify.errors import ArgumentError, SparsifyWarning, StateError, TargetError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.learning_rate import LearningRateFunctionModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.quantization.plan import is_quantized
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import assert_same_state, channel_pruning, gradual_pruning, train_step
from tests.zoo.small import perceptron

pytest.importorskip("accelerate")

import accelerate
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin

from sparsify.integrations.accelerate import prepare

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::sparsify.errors.SparsifyWarning"),
]

EPOCHS, GROUP = 4, 3
STEPS = [epoch * 7 + batch for epoch in range(EPOCHS) for batch in (3, 6, 7)][:-1]
"""Batches after which the optimizer has just stepped: gradients of half a group are in no checkpoint of accelerate."""


@pytest.fixture(autouse=True)
def fresh_states() -> None:
    # Settings of a process that accelerate keeps from the first Accelerator on.
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(32, 2),
    )


def loader(rows: int = 26, batch: int = 4, **given: Any) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(rows, 1, 6, 6, generator=draw)
    # Its own generator: an iterator draws a number when it begins, which dropout would miss after a resume.
    own = torch.Generator().manual_seed(3)
    return DataLoader(TensorDataset(x, (x.mean((1, 2, 3)) > 0).long()), batch, shuffle=True, generator=own, **given)


def accelerator(groups: int = GROUP, **given: Any) -> Any:
    return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=groups, **given)


LENGTH = EpochRangeModifier(end_epoch=float(EPOCHS))
INT8 = QuantizationModifier(start_epoch=2.7, disable_quantization_observer_epoch=3.3)
REMOVED = channel_pruning(params=["0.weight", "3.weight"], start_epoch=0.0, end_epoch=1.3, shrink=True)
RECIPES: dict[str, list[Modifier]] = {
    "pruned": [LENGTH, gradual_pruning(0.0, 3.0, 0.3)],
    "int8": [LENGTH, QuantizationModifier(start_epoch=1.3, disable_quantization_observer_epoch=3.0)],
    "channels removed": [LENGTH, REMOVED],
    "all together": [
        LENGTH,
        REMOVED,
        gradual_pruning(1.4, 2.5, 0.3, params=["7.weight"]),
        INT8,
        LearningRateFunctionModifier(lr_func="cosine", init_lr=0.02, final_lr=0.001, start_epoch=1.0, end_epoch=3.5),
        DistillationModifier(hardness=0.4, start_epoch=0.5, end_epoch=3.0),
    ],
}


def run(
    modifiers: list[Modifier], seed: int, folder: Path, *, start: int = 0, stop: int | None = None, **options: Any
) -> tuple[Any, Any, list[float]]:
    """Trains from batch `start` of the whole run, saving before each; gives model, manager and losses."""
    # The order of the batches depends on the epoch alone, as for every exact resume with accelerate.
    order = accelerate.DataLoaderConfiguration(use_seedable_sampler=True, data_seed=1)
    at = accelerator(dataloader_config=order)
    manager = ScheduledModifierManager(modifiers)
    model: Any = network(seed)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer, batches = prepare(at, manager, model, optimizer, loader(), **options)
    if start:
        at.load_state(str(folder / f"at-{start}"))
    losses: list[float] = []
    count = 0
    for epoch in range(EPOCHS):
        count = epoch * len(batches)
        if count + len(batches) <= start:
            continue
        batches.set_epoch(epoch)
        left = at.skip_first_batches(batches, start - count) if start > count else batches
        count = max(count, start)
        model.train()
        for x, y in left:
            with at.accumulate(model):
                loss = manager.update_loss(F.cross_entropy(model(x), y))
                at.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(loss.detach()))
            count += 1
            if not start:
                at.save_state(str(folder / f"at-{count}"))
            if count == stop:
                break
    return model, manager, losses


def resumed_equals(name: str, folder: Path, starts: list[int]) -> None:
    options = {"distillation_teacher": "self"} if name == "all together" else {}
    model, manager, losses = run(RECIPES[name], 0, folder, **options)
    # 7 batches in groups of three are three steps: the last group is smaller.
    assert manager.step == EPOCHS * 3 and manager.epoch == EPOCHS
    wanted = {"model": model.state_dict(), "manager": manager.state_dict()}
    for start in starts:
        again, other, tail = run(RECIPES[name], start, folder, start=start, **options)
        found = {"model": again.state_dict(), "manager": other.state_dict()}
        assert_same_state(found, wanted, f"{name}, resumed before batch {start}")
        assert tail == losses[start:]


def test_one_line_counts_groups_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    resumed_equals("all together", tmp_path, [13])


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_resumed_at_any_batch_it_is_the_run_that_never_stopped(name: str, tmp_path: Path) -> None:
    resumed_equals(name, tmp_path, STEPS)


def prepared(at: Any, *objects: Any, modifiers: Any = None, **options: Any) -> tuple[Any, ...]:
    manager = ScheduledModifierManager(modifiers or [gradual_pruning(0.0, 2.0)])
    return (manager, *prepare(at, manager, *objects, **options))


def test_everything_comes_back_in_the_order_given() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    manager, first, second, third, fourth = prepared(accelerator(), loader(), schedule, optimizer, model)
    assert isinstance(first, DataLoader) and fourth is model
    assert type(second).__name__ == "AcceleratedScheduler" and third.optimizer is optimizer
    assert manager.attached


@pytest.mark.parametrize(
    ("rows", "given", "groups", "steps"),
    [(26, {}, 3, 3), (24, {}, 3, 2), (26, {"drop_last": True}, 3, 2), (26, {}, 1, 7), (3, {}, 8, 1)],
)
def test_an_epoch_has_as_many_steps_as_accumulate_takes(
    rows: int, given: dict[str, Any], groups: int, steps: int
) -> None:
    at = accelerator(groups)
    model: Any = network()
    manager, model, optimizer, batches = prepared(
        at, model, torch.optim.SGD(model.parameters(), lr=0.1), loader(rows, **given)
    )
    for _ in range(2):
        for x, y in batches:
            with at.accumulate(model):
                at.backward(F.cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()
    assert (manager.step, manager.epoch) == (2 * steps, 2.0)


def test_groups_that_go_on_over_the_end_of_an_epoch_are_said() -> None:
    at = accelerate.Accelerator(
        cpu=True, gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=3, sync_with_dataloader=False)
    )
    model = network()
    with pytest.warns(SparsifyWarning, match=r"7 batches are no whole number of groups of 3, .* reckons with 2"):
        prepared(at, model, torch.optim.SGD(model.parameters(), lr=0.1), loader())


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([torch.randn(36) for _ in range(8)])


def test_without_a_length_the_manager_marks_the_epochs() -> None:
    at, model = accelerator(1), perceptron(36, 8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager, ready, optimizer, batches = prepared(at, model, optimizer, DataLoader(Stream(), 2))
    with pytest.warns(SparsifyWarning, match="steps_per_epoch was not given"):
        for _ in manager.epochs():
            for x in batches:
                train_step(ready, optimizer, x)
    assert manager.epoch == 2.0
    other = perceptron(36, 8, 2)
    manager, *_ = prepared(
        accelerator(1), other, torch.optim.SGD(other.parameters(), lr=0.1), DataLoader(Stream(), 2), steps_per_epoch=4
    )
    assert manager.state_dict()["steps_per_epoch"] == 4


def test_of_several_models_the_first_is_meant() -> None:
    student, other = network(), network(1)
    mine, theirs = torch.optim.SGD(student.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    manager, *ready = prepared(accelerator(1), student, theirs, other, mine, loader())
    for x, y in ready[-1]:
        F.cross_entropy(ready[0](x), y).backward()
        ready[3].step()
        ready[3].zero_grad()
    assert manager.step == 7 and manager.attached
    ready[1].step()
    assert manager.step == 7


def test_what_cannot_work_is_refused_before_anything_is_prepared() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    at = accelerator(1)
    with pytest.raises(ArgumentError, match=r"no torch\.nn\.Module among the objects"):
        prepared(at, loader(), optimizer)
    with pytest.raises(ArgumentError, match="none of the objects is an optimizer of Sequential's parameters"):
        prepared(at, model, torch.optim.SGD(network().parameters(), lr=0.1))
    with pytest.raises(TargetError, match="nosuch"):
        prepared(at, model, optimizer, modifiers=[gradual_pruning(params=["nosuch.weight"])])
    assert not at._models


def test_a_folder_without_the_managers_state_is_refused(tmp_path: Path) -> None:
    at, model = accelerator(1), network()
    prepared(at, model, torch.optim.SGD(model.parameters(), lr=0.1), loader())
    at.save_state(str(tmp_path))
    (tmp_path / "sparsify.pt").unlink()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match=r"was written without sparsify\.integrations\.accelerate\.prepare"):
        at.load_state(str(tmp_path))
    assert_same_state(model.state_dict(), before, "nothing was loaded")


def test_going_back_in_one_process_undoes_quantization(tmp_path: Path) -> None:
    at, model = accelerator(1), network()
    manager, ready, optimizer, batches = prepared(
        at,
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loader(),
        modifiers=[QuantizationModifier(start_epoch=1.0)],
    )

    def epoch() -> None:
        for x, y in batches:
            at.backward(F.cross_entropy(ready(x), y))
            optimizer.step()
            optimizer.zero_grad()

    at.save_state(str(tmp_path))
    before = copy.deepcopy(ready.state_dict())
    epoch()
    epoch()
    assert is_quantized(ready)
    at.load_state(str(tmp_path))
    assert not is_quantized(ready) and manager.step == 0
    assert_same_state(ready.state_dict(), before, "as it was")


def mixed(at: Any, scale: Callable[[int], None] | None = None) -> tuple[Any, int]:
    model: Any = network()
    manager, model, optimizer, batches = prepared(at, model, torch.optim.SGD(model.parameters(), lr=0.1), loader())
    skipped = 0
    for step, (x, y) in enumerate(batches):
        loss = F.cross_entropy(model(x), y)
        at.backward(loss * float("inf") if scale and step in (1, 4) else loss)
        optimizer.step()
        skipped += optimizer.step_was_skipped
        optimizer.zero_grad()
    return manager, skipped


def test_steps_that_a_scaler_skips_are_no_steps() -> None:
    at = accelerator(1)
    # On a CPU accelerate makes none by itself; this is torch's own, as for float16 on a GPU.
    at.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    manager, skipped = mixed(at, scale=lambda _: None)
    assert skipped == 2 and manager.step == 5


def test_bfloat16_counts_every_step() -> None:
    manager, _ = mixed(accelerator(1, mixed_precision="bf16"))
    assert manager.step == 7
