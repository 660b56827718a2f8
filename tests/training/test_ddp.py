"""Two processes over gloo: the same masks on every rank, and a typed error where they differ (promise 6)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparsify.errors import StateError
from sparsify.model import distributed as ranks
from sparsify.training.manager import ScheduledModifierManager
from tests.ranks import on_two_ranks
from tests.zoo.small import perceptron

RECIPE = """
modifiers:
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.1
    final_sparsity: 0.8
    start_epoch: 0.0
    end_epoch: 2.0
    update_frequency: 0.5
"""
QAT = "modifiers:\n  - !QuantizationModifier\n    start_epoch: 0.0\n"
QAT_BY_HISTOGRAM = QAT + "    scheme:\n      input_activations: {num_bits: 4, observer: mse}\n"


def _network() -> nn.Module:
    return perceptron(12, 16, 4, activation=nn.ReLU, seed=3)


def _train(rank: int, folder: str) -> None:
    model = DistributedDataParallel(_network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    optimizer = manager.modify(model, optimizer, steps_per_epoch=4)
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(8):
        optimizer.zero_grad()
        model(torch.randn(5, 12, generator=generator)).square().sum().backward()
        optimizer.step()
    manager.finalize(model)
    torch.save(model.module.state_dict(), Path(folder) / f"{rank}.pt")


def _differ(rank: int, folder: str) -> None:
    model = _network()
    if rank == 1:
        with torch.no_grad():
            model[0].weight.mul_(torch.randn(16, 12))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    try:
        ScheduledModifierManager.from_yaml(RECIPE).modify(model, optimizer, steps_per_epoch=4)
    except StateError as error:
        (Path(folder) / f"{rank}.txt").write_text(str(error))


def _observe_by_histogram(rank: int, folder: str) -> None:
    _observe(rank, folder, QAT_BY_HISTOGRAM)


def _observe(rank: int, folder: str, recipe: str = QAT) -> None:
    model = _network()
    generator = torch.Generator().manual_seed(100 + rank)
    inputs = torch.randn(64, 12, generator=generator) * (1 + 3 * rank)
    manager = ScheduledModifierManager.from_yaml(recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    manager.modify(model, optimizer, steps_per_epoch=4, sample_inputs=(inputs,))
    wrapped = DistributedDataParallel(model)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(inputs).square().sum().backward()
        optimizer.step()
    manager.finalize(model)
    torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")


def test_masks_and_weights_are_the_same_on_both_ranks(tmp_path: Path) -> None:
    on_two_ranks(_train, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == _network().state_dict().keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert int((first["0.weight"] == 0).sum()) == round(0.8 * 16 * 12)


def test_masks_that_differ_between_ranks_are_refused_by_name(tmp_path: Path) -> None:
    on_two_ranks(_differ, tmp_path)
    messages = [path.read_text() for path in tmp_path.glob("*.txt")]
    assert len(messages) == 2 and all("0.weight" in message and "rank" in message for message in messages)


@pytest.mark.parametrize("observe", [_observe, _observe_by_histogram])
def test_ranges_of_activations_are_the_same_on_both_ranks(observe: Callable[[int, str], None], tmp_path: Path) -> None:
    on_two_ranks(observe, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any("scale" in name for name in first)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def _said(rank: int, folder: str, steps: Callable[[], None]) -> None:
    began = time.monotonic()
    try:
        steps()
    except StateError as error:
        (Path(folder) / f"{rank}.txt").write_text(f"{time.monotonic() - began:.1f} s: {error}")


def _loads_on_one(rank: int, folder: str, *, recipe: str, wrapped: bool, first: int) -> None:
    """Trains, loads on rank 0 a state of step 6 after `first` steps, and trains on."""
    given = {"sample_inputs": torch.randn(4, 12)}
    averaged = not wrapped and not first
    generator = torch.Generator().manual_seed(100 + rank if averaged or wrapped else 100)

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, ScheduledModifierManager]:
        model = _network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        manager = ScheduledModifierManager.from_yaml(recipe)
        manager.modify(model, optimizer, steps_per_epoch=4, **given)
        return DistributedDataParallel(model) if wrapped else model, optimizer, manager

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            model(torch.randn(5, 12, generator=generator)).square().sum().backward()
            if averaged:
                ranks.average({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            optimizer.step()

    model, optimizer, manager = begin()
    steps(model, optimizer, 6)
    state = manager.state_dict()
    manager.finalize()
    model, optimizer, manager = begin()
    steps(model, optimizer, first)

    def resumed() -> None:
        if rank == 0:
            manager.load_state_dict(state)
        steps(model, optimizer, 6)

    try:
        _said(rank, folder, resumed)
    finally:
        manager.finalize()


LATE_QAT = "modifiers:\n  - !QuantizationModifier\n    start_epoch: 1.0\n"


@pytest.mark.parametrize(
    ("recipe", "wrapped", "first"),
    [
        (RECIPE, True, 0),
        (LATE_QAT, True, 0),
        (LATE_QAT, False, 0),
        (RECIPE, False, 3),
        (RECIPE, True, 3),
    ],
    ids=["pruned, DDP", "quantized, DDP", "quantized, bare", "in the midst", "in the midst, DDP"],
)
def test_a_state_that_is_loaded_on_one_rank_is_an_error_on_both_at_once(
    recipe: str, wrapped: bool, first: int, tmp_path: Path
) -> None:
    on_two_ranks(partial(_loads_on_one, recipe=recipe, wrapped=wrapped, first=first), tmp_path)
    messages = [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert len(messages) == 2, messages
    for message in messages:
        assert re.search(r"rank 1 is at step \d .*, rank 0 at step 6 .*loaded on some ranks", message), message
        assert float(message.split()[0]) < 20.0


OPTIONS: list[dict[str, bool]] = [
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
    {"gradient_as_bucket_view": True, "static_graph": True},
]


def _train_with(rank: int, folder: str, options: dict[str, bool]) -> None:
    """The same zeros as without those options, on every rank, with accumulation in no_sync() and compiled."""
    found = []
    for given, compiled in (({}, False), (options, False), (options, True)):
        torch.compiler.reset()
        model = DistributedDataParallel(_network(), **given)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        manager = ScheduledModifierManager.from_yaml(RECIPE)
        manager.modify(model, optimizer, steps_per_epoch=4)
        run = torch.compile(model, backend="eager") if compiled else model
        generator = torch.Generator().manual_seed(100 + rank)
        for _ in range(8):
            optimizer.zero_grad()
            # The first backward of a static graph shows it, and has to send.
            with model.no_sync() if not given.get("static_graph") else nullcontext():
                run(torch.randn(5, 12, generator=generator)).square().sum().backward()
            run(torch.randn(5, 12, generator=generator)).square().sum().backward()
            optimizer.step()
        assert manager.step == 8
        manager.finalize(model)
        found.append(model.module[0].weight.detach())
        ranks.check_same({"weight": found[-1] != 0})
        assert int((found[-1] == 0).sum()) == round(0.8 * 16 * 12)
    assert torch.allclose(found[0], found[1], atol=1e-6) and torch.allclose(found[1], found[2], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_masks_are_the_same_with_every_option_of_ddp(options: dict[str, bool], tmp_path: Path) -> None:
    on_two_ranks(partial(_train_with, options=options), tmp_path)


def _join(rank: int, folder: str) -> None:
    model = DistributedDataParallel(_network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = ScheduledModifierManager.from_yaml(RECIPE)
    manager.modify(model, optimizer, steps_per_epoch=4)
    with model.join(enable=False):
        model(torch.ones(2, 12)).sum().backward()
        optimizer.step()
    # The method sets what a run in join() has; entered, the other rank would wait for the one that was refused.
    model._join_config = model._join_config._replace(enable=True, throw_on_early_termination=False)
    with pytest.raises(StateError, match="as many batches"):
        optimizer.step()
    assert manager.step == 1
    model._join_config = model._join_config._replace(throw_on_early_termination=True)
    optimizer.step()
    assert manager.step == 2


def test_uneven_inputs_are_refused_at_the_first_step(tmp_path: Path) -> None:
    on_two_ranks(_join, tmp_path)


def _average(rank: int, folder: str) -> None:
    tensors = {"b": torch.tensor([1.0, 4.0 + 2.0 * rank]), "a": torch.full((2, 3), 1.0 - rank)}
    ranks.average(tensors)
    torch.save(tensors, Path(folder) / f"{rank}.pt")


def test_what_ranks_computed_becomes_their_mean(tmp_path: Path) -> None:
    on_two_ranks(_average, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(found["b"], torch.tensor([1.0, 5.0]))
        assert torch.equal(found["a"], torch.full((2, 3), 0.5))


@pytest.fixture(autouse=True)
def _gloo() -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
