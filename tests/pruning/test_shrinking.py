"""Dead channels are found by their zeros and removed; outputs stay, what cannot go says why."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsify
from sparsify.errors import ArgumentError, DataError, StateError
from sparsify.pruning.dry_run import dry_run, find_groups
from sparsify.pruning.group_masks import dead_channels
from sparsify.pruning.groups import find_unchecked_groups
from tests.loops import holds_state
from tests.zoo.prunable import Encoder, Residual, every_second, made_in_double, mask_channels_
from tests.zoo.small import Branching, written


@pytest.mark.parametrize("kind", [Residual, Encoder])
def test_what_was_masked_is_found_and_removed(kind: type[nn.Module]) -> None:
    model, x = made_in_double(kind)
    channel_groups = find_unchecked_groups(model, (x,))
    pruned = every_second(channel_groups)
    mask_channels_(model, channel_groups, pruned)
    assert {name: list(channels) for name, channels in dead_channels(model, channel_groups).items()} == pruned
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    model.eval()
    before = model(x)
    model.train()
    done = sparsify.shrink(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.allclose(model.eval()(x), before, rtol=1e-10, atol=1e-12)
    assert done.widths == {n: (f.size, f.size - len(pruned[n])) for n, f in channel_groups.groups.items()}
    assert done.parameters_after == sum(p.numel() for p in model.parameters()) < done.parameters_before
    assert all(name in str(done) for name in done.widths)


def test_a_second_time_nothing_is_left_to_remove() -> None:
    model, x = made_in_double()
    channel_groups = find_unchecked_groups(model, (x,))
    mask_channels_(model, channel_groups, every_second(channel_groups))
    sparsify.shrink(model, x)
    again = sparsify.shrink(model, x)
    assert again.widths == {}
    assert again.parameters_before == again.parameters_after
    assert "nothing was removed" in str(again)


def test_rows_alone_are_enough_where_nothing_makes_something_of_zero() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 3, 1)).double()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*model[0].parameters(), *model[1].parameters()):
            parameter[:3] = 0
    before = model.eval()(x)
    assert sparsify.shrink(model, x).widths == {"0.weight": (8, 5)}
    assert torch.allclose(model(x), before)


def test_rows_alone_are_not_enough_behind_a_sigmoid() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter[:3] = 0
        model[2].weight[:, 5] = 0  # this one nobody reads
    before = model(x)
    done = sparsify.shrink(model, x)
    assert done.widths == {"0.weight": (8, 7)}
    assert "weights of 3 channels are zero, yet they are at work" in done.whole["0.weight"]
    assert torch.allclose(model(x), before)


def test_one_channel_stays_of_a_group_that_is_dead_altogether() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    nn.init.zeros_(model[2].weight)
    x = torch.randn(4, 3)
    before = model(x)
    assert sparsify.shrink(model, x).widths == {"0.weight": (8, 1)}
    assert torch.allclose(model(x), before)


def test_a_copy_is_shrunk_alike_and_an_optimizer_goes_on() -> None:
    model, x = made_in_double(Encoder)
    optimizer = torch.optim.AdamW(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    average = copy.deepcopy(model)
    channel_groups = find_unchecked_groups(model, (x,))
    mask_channels_(model, channel_groups, every_second(channel_groups))
    done = sparsify.shrink(model, x, optimizer)
    done.apply_to(average)
    assert {n: p.shape for n, p in average.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    model(x).sum().backward()
    optimizer.step()


def up_down(code: Callable[[Any, Tensor], Tensor], **numbers: int) -> Any:
    """Computes `code` on what Linear(4, 8) and a ReLU give; a Linear(8, 2) is there for it."""
    layers = {"up": nn.Linear(4, 8), "down": nn.Linear(8, 2)}
    return written(lambda self, x: code(self, self.up(x).relu()), **layers, **numbers)


class FixedShape(nn.Module):
    """Has a size in its code that is no attribute: what shrinks would fail."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)
        self.free, self.out = nn.Linear(2, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.up(x).relu().view(len(x), 8)
        out: Tensor = self.out(self.free(self.down(wide)).relu())
        return out


def test_what_code_has_as_a_fixed_size_stays_whole_with_the_reason() -> None:
    model, x = FixedShape(), torch.randn(3, 4)
    before = copy.deepcopy(model.state_dict())
    found = find_unchecked_groups(model, (x,))
    assert set(found.groups) == {"up.weight", "down.weight", "free.weight"}
    checked = dry_run(model, found, (x,))
    assert set(checked.groups) == {"down.weight", "free.weight"}
    assert "the smaller model fails: RuntimeError" in checked.whole["up.weight"]
    assert holds_state(model, before)


def test_what_computes_something_else_when_smaller_stays_whole() -> None:
    # The count of the channels enters the result.
    model, x = up_down(lambda self, wide: self.down(wide) * wide.shape[1]), torch.randn(3, 4)
    # As residual branches begin: as long as it is zero, all that comes before looks right.
    nn.init.zeros_(model.down.weight)
    checked = find_groups(model, (x,))
    assert not checked.groups
    assert "computes something else" in checked.whole["up.weight"]


def test_what_gives_nan_when_smaller_stays_whole() -> None:
    model, x = up_down(lambda self, wide: self.down(wide) * (1 if wide.shape[1] == 8 else torch.nan)), torch.randn(3, 4)
    checked = find_groups(model, (x,))
    assert "computes something else: its output is nan off" in checked.whole["up.weight"]


def test_a_model_in_training_is_compared_without_its_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 2)).train()
    x = torch.randn(3, 4)
    assert set(find_groups(model, (x,)).groups) == {"0.weight"}
    assert all(module.training for module in model.modules())


class Counted(nn.Module):
    """Tells how many samples it has seen at once; `least`: fails on fewer."""

    def __init__(self, least: int = 1) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)
        self.least = least
        self.seen: list[int] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Counted:
        made = Counted(self.least).to(self.up.weight.dtype)
        made.load_state_dict(self.state_dict())
        made.seen = self.seen  # one list for all copies
        return made

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        if len(x) < self.least:
            raise ValueError("too few")
        out: Tensor = self.down(self.up(x).relu())
        return out


@pytest.mark.parametrize(("least", "expected"), [(1, {2}), (5, {2, 9})])
def test_two_samples_are_compared_unless_code_wants_more(least: int, expected: set[int]) -> None:
    model, x = Counted(least), torch.randn(9, 4)
    channel_groups = find_unchecked_groups(model, (x,))
    model.seen.clear()
    assert set(dry_run(model, channel_groups, (x,)).groups) == {"up.weight"}
    assert set(model.seen) == expected


def test_a_model_that_takes_float32_only_is_compared_in_it() -> None:
    model, x = up_down(lambda self, wide: self.down(wide.to(torch.float32))), torch.randn(3, 4)
    assert set(find_groups(model, (x,)).groups) == {"up.weight"}


def test_a_constant_that_equals_a_size_by_chance_is_told_from_one_that_follows() -> None:
    # One number that equals the width follows it, the other is a constant of the formula.
    model = up_down(lambda self, wide: self.down(wide.view(-1, self.width) / self.buckets), width=8, buckets=8).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    checked = find_groups(model, (x,))
    assert checked.constants == {"buckets"}
    mask_channels_(model, checked, every_second(checked))
    before = model(x)
    sparsify.shrink(model, x)
    assert (model.width, model.buckets) == (4, 8)
    assert torch.allclose(model(x), before)


def test_outputs_that_are_not_finite_are_refused() -> None:
    model, x = made_in_double()
    with torch.no_grad():
        model.fc.weight[0, 0] = torch.nan
    before = model.conv1.weight.clone()
    with pytest.raises(DataError, match="'output' is not finite"):
        sparsify.shrink(model, x)
    assert torch.equal(model.conv1.weight, before)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ArgumentError, match="model is a str"):
        sparsify.shrink("model", torch.randn(1))  # type: ignore[arg-type]

    with pytest.raises(ArgumentError, match="cannot be traced"):
        sparsify.shrink(Branching(), torch.randn(2, 2))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model, x = FixedShape(), torch.randn(3, 4)
    model.kept = model(x)  # an output of a graph, which torch does not copy
    shape = model.up.weight.shape
    with pytest.raises(ArgumentError, match="FixedShape cannot be copied"):
        sparsify.shrink(model, x)
    assert model.up.weight.shape == shape


def test_a_live_wrapper_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made_in_double()
    monkeypatch.setattr("sparsify.pruning.removal.is_distributed", lambda _: True)
    monkeypatch.setattr("sparsify.pruning.shrinking.is_distributed", lambda _: True)
    with pytest.raises(StateError, match="unwrap, shrink, wrap again"):
        sparsify.shrink(model, x)
