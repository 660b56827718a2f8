"""Masks that move, on real training steps: each method against a reference of its own over the whole trajectory."""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsify.errors import ArgumentError, DataError, RecipeError, StateError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.regularization import PowerpropagationModifier
from sparsify.modifiers.sparse_training import (
    ACDCPruningModifier,
    MovementPruningModifier,
    RigLPruningModifier,
)
from sparsify.modifiers.top_kast import TopKASTPruningModifier
from sparsify.pruning.layer_sparsity import spread
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import (
    STEPS,
    STEPS_PER_EPOCH,
    assert_same_state,
    masks_of,
    pruning_fields,
    regress,
    regression_at_work,
    regression_batch,
    regression_loss,
    regression_model,
    reloaded,
    top_kast,
    weights_of,
    zeros_of,
)
from tests.optimizer_forms import FORMS
from tests.ranks import on_two_ranks


def movement(**changed: Any) -> MovementPruningModifier:
    return MovementPruningModifier(**pruning_fields(init_sparsity=0.1, final_sparsity=0.8, **changed))


def acdc(**changed: Any) -> ACDCPruningModifier:
    return ACDCPruningModifier(**{**pruning_fields(), "compression_sparsity": 0.75, **changed})


def rigl(**changed: Any) -> RigLPruningModifier:
    return RigLPruningModifier(**{**pruning_fields(), "final_sparsity": 0.7, **changed})


ALL: dict[str, Callable[..., Modifier]] = {"movement": movement, "acdc": acdc, "rigl": rigl, "top-kast": top_kast}


# ---------------------------------------------------------------------------------------------- promises of them all


@pytest.mark.parametrize("form", ["sgd momentum", "adam", "adamw two groups", "rprop", "sgd stepped twice", "lbfgs"])
@pytest.mark.parametrize("method", ALL)
def test_resuming_at_any_step_equals_never_stopping(method: str, form: str) -> None:
    if (method, form) == ("top-kast", "lbfgs"):
        pytest.skip("refused: test_what_computes_the_loss_inside_of_a_step_is_refused")
    modifier = ALL[method](**({"num_grads": 2} if method == "rigl" else {}))

    def states(model: nn.Module, optimizer: Any, manager: Any) -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "manager": manager.state_dict()}

    model, optimizer, manager = run = regression_at_work(modifier, form)
    found = {0: reloaded(**states(*run))}
    regress(model, optimizer, range(STEPS), lambda step: found.__setitem__(step, reloaded(**states(*run))))
    for step in range(STEPS):
        model, optimizer, manager = other = regression_at_work(modifier, form, seed=step + 1)
        checkpoint = copy.deepcopy(found[step])
        manager.load_state_dict(checkpoint["manager"])
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        regress(model, optimizer, range(step, STEPS))
        assert_same_state(states(*other), found[STEPS], f"{method}, {form}, resumed at step {step}")


@pytest.mark.parametrize("form", ["sgd momentum", "adam"])
@pytest.mark.parametrize(
    "modifier",
    [
        MovementPruningModifier(**pruning_fields(init_sparsity=0.0, final_sparsity=0.0)),
        ACDCPruningModifier(**pruning_fields(compression_sparsity=0.0, momentum_buffer_reset=False)),
        RigLPruningModifier(**pruning_fields(final_sparsity=0.0)),
        TopKASTPruningModifier(**pruning_fields(forward_sparsity=0.0, backward_sparsity=0.0, active_weight_decay=0.0)),
    ],
    ids=list(ALL),
)
def test_without_sparsity_nothing_changes(modifier: Modifier, form: str) -> None:
    plain = regression_model()
    regress(plain, FORMS[form](plain), range(STEPS))
    model, optimizer, manager = regression_at_work(modifier, form)
    regress(model, optimizer, range(STEPS))
    manager.finalize()
    assert_same_state(model.state_dict(), plain.state_dict(), form)


@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("lbfgs", "muon")])
@pytest.mark.parametrize("method", ALL)
def test_what_is_masked_is_zero_after_every_step(method: str, form: str) -> None:
    model, optimizer, manager = regression_at_work(ALL[method](), form)
    sizes = {name: w.numel() for name, w in weights_of(model).items()}
    total = {"acdc": 75, "rigl": 70, "top-kast": 80}

    def check(step: int) -> None:
        found = masks_of(manager)
        pruned = {name: int((~mask).sum()) for name, mask in found.items()}
        assert not any(weights_of(model)[name][~mask].any() for name, mask in found.items()), step
        now = {name: int((weights_of(model)[name] == 0).sum()) for name in found}
        assert now == {name: round(s * sizes[name]) for name, s in manager.sparsity().items()}
        if method != "movement" and pruned:
            assert sum(pruned.values()) == total[method]
        # What has just been grown is zero for this one moment, and a unit that is dead stays so when dense.
        if step % 2 and pruned:
            assert all(count == pruned.get(name, 0) for name, count in zeros_of(model).items()), step

    regress(model, optimizer, range(STEPS), check)
    if method == "movement":
        assert zeros_of(model) == {name: round(0.8 * size) for name, size in sizes.items()}
    else:
        assert sum(zeros_of(model).values()) == total[method]
    before = copy.deepcopy(model.state_dict())
    manager.finalize()
    assert_same_state(model.state_dict(), before, "finalize")
    assert not any(torch.signbit(w[w == 0]).any() for w in weights_of(model).values())


@pytest.mark.parametrize("method", ALL)
def test_masks_end_with_the_window_where_they_are_not_left_on(method: str) -> None:
    model, optimizer, manager = regression_at_work(ALL[method](leave_enabled=False))
    regress(model, optimizer, range(10))
    assert sum(zeros_of(model).values()) >= 0.7 * 100
    assert not manager.sparsity()
    regress(model, optimizer, range(10, 12))
    assert sum(zeros_of(model).values()) == 0


@pytest.mark.parametrize("method", ALL)
def test_it_starts_late_and_no_earlier(method: str) -> None:
    model, optimizer, _ = regression_at_work(ALL[method](start_epoch=2.0))
    plain = regression_model()
    other = FORMS["sgd momentum"](plain)
    regress(model, optimizer, range(3))
    regress(plain, other, range(3))
    assert_same_state(model.state_dict(), plain.state_dict(), method)
    regress(model, optimizer, range(3, STEPS))
    assert sum(zeros_of(model).values()) == {"movement": 80, "acdc": 75, "rigl": 70, "top-kast": 80}[method]


@pytest.mark.parametrize("method", ALL)
def test_interrupted_inside_a_step_it_ends_in_a_usable_model(method: str) -> None:
    model, optimizer, manager = regression_at_work(ALL[method](start_epoch=0.0, end_epoch=50.0))
    regress(model, optimizer, range(3))
    held = {name: round(manager.sparsity().get(name, 0.0) * w.numel()) for name, w in weights_of(model).items()}

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    optimizer.register_step_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        regress(model, optimizer, range(3, 4))
    manager.finalize()
    assert zeros_of(model) == held


def test_a_forward_after_an_interrupted_step_sees_what_it_should() -> None:
    modifiers = [top_kast(end_epoch=50.0), PowerpropagationModifier(params="__ALL_PRUNABLE__", alpha=3.0)]
    model, optimizer, _ = regression_at_work(modifiers)
    regress(model, optimizer, range(3))
    inputs = regression_batch(0)[0]
    before = model(inputs)
    raises = True

    def stop(*_: Any) -> None:
        if raises:
            raise KeyboardInterrupt

    optimizer.register_step_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        regress(model, optimizer, range(3, 4))
    assert torch.equal(model(inputs), before)
    raises = False
    regress(model, optimizer, range(3, 8))
    other, its, _ = regression_at_work(modifiers)
    regress(other, its, range(8))
    assert_same_state(model.state_dict(), other.state_dict(), "the step was taken again")


# ---------------------------------------------------------------------------------------------- movement


@pytest.mark.parametrize("form", ["sgd momentum", "adam", "sgd fused"])
def test_movement_prunes_by_the_sum_of_gradient_times_weight(form: str) -> None:
    model, optimizer, _ = regression_at_work(movement(inter_func="linear"), form)
    reference = regression_model()
    other = FORMS[form](reference)
    scores = {name: torch.zeros_like(w) for name, w in weights_of(reference).items()}
    pruned = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in weights_of(reference).items()}

    def prune(sparsity: float) -> None:
        for name, w in weights_of(reference).items():
            values = scores[name] if scores[name].any() else w.abs()
            order = sorted(range(w.numel()), key=lambda i: (not pruned[name].view(-1)[i], values.view(-1)[i], i))
            pruned[name].view(-1)[order[: round(sparsity * w.numel())]] = True
            w[pruned[name]] = 0
            for value in other.state.get(dict(reference.named_parameters())[name], {}).values():
                if isinstance(value, Tensor) and value.shape == w.shape:
                    value[pruned[name]] = 0

    prune(0.1)
    for step in range(STEPS):
        regress(model, optimizer, [step])
        other.zero_grad()
        regression_loss(reference, step).backward()
        for name, p in reference.named_parameters():
            if name in scores:
                scores[name] += -0.01 * p.grad * p.detach()
        other.step()
        for name, w in weights_of(reference).items():
            w[pruned[name]] = 0
        epoch = (step + 1) / STEPS_PER_EPOCH
        if epoch == int(epoch) and epoch <= 5:
            prune(0.1 + 0.7 * epoch / 5)
        assert_same_state(model.state_dict(), reference.state_dict(), (form, step))
    assert zeros_of(model) == {"0.weight": 48, "2.weight": 32}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_movement_counts_gradients_that_a_closure_computes(set_to_none: bool) -> None:
    def run(inside: bool) -> Any:
        model, optimizer, manager = regression_at_work(movement(), "sgd")
        # Gradients from before stand there when the first step begins.
        regression_loss(model, 99).backward()
        for step in range(6):

            def closure(step: int = step) -> Tensor:
                # False: the new gradients come into the tensors of the old ones.
                optimizer.zero_grad(set_to_none=set_to_none)
                loss = regression_loss(model, step)
                loss.backward()
                return loss

            if inside:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        return manager.state_dict()["modifiers"]["MovementPruningModifier"]["scores"], model.state_dict()

    assert_same_state(run(True), run(False), "closure")


@pytest.mark.parametrize("fused", [True, False])
def test_movement_under_a_gradient_scaler_counts_true_gradients_of_real_steps(fused: bool) -> None:
    def run(scale: float | None) -> Any:
        model = regression_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
        manager = ScheduledModifierManager([movement()])
        manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=1000)
        for step in (0, 1, 99, 2, 3):
            if step == 99 and scale is None:
                continue
            optimizer.zero_grad()
            loss = regression_loss(model, step) * (math.inf if step == 99 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert manager.step == 4
        return manager.state_dict()["modifiers"]["MovementPruningModifier"]["scores"]

    assert_same_state(run(1024.0), run(None), fused)


def test_scores_in_a_state_stay_what_they_were_while_training_goes_on() -> None:
    model, optimizer, manager = regression_at_work(movement())
    regress(model, optimizer, range(2))
    state = manager.state_dict()
    before = copy.deepcopy(state)
    regress(model, optimizer, range(2, 4))
    assert_same_state(state, before, "")
    now = manager.state_dict()["modifiers"]["MovementPruningModifier"]["scores"]
    assert any(
        not torch.equal(now[name], value)
        for name, value in before["modifiers"]["MovementPruningModifier"]["scores"].items()
    )


def test_scores_of_half_precision_are_summed_in_full() -> None:
    model = regression_model().to(torch.bfloat16)
    manager = ScheduledModifierManager([movement()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager.modify(model, optimizer, steps_per_epoch=2)
    model(regression_batch(0)[0].bfloat16()).square().mean().backward()
    optimizer.step()
    scores = manager.state_dict()["modifiers"]["MovementPruningModifier"]["scores"]
    assert {value.dtype for value in scores.values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------- AC/DC


@pytest.mark.parametrize(
    ("start", "end", "frequency", "sparse"),
    [
        (0, 20, 5, [range(5, 10), range(15, 24)]),  # the table of the recipe dialect
        (0, 22, 5, [range(5, 10), range(15, 24)]),  # 2 epochs left at 20: too short for a dense phase
        (0, 25, 5, [range(5, 10), range(15, 20), range(25, 28)]),
        (3, 13, 4, [range(7, 16)]),  # at 11 only 2 are left
        (2, 4, 4, [range(2, 8)]),  # shorter than one phase
        (1, 1, 1, [range(1, 4)]),
    ],
)
def test_phases_of_acdc(start: int, end: int, frequency: int, sparse: list[range]) -> None:
    model = regression_model()
    optimizer = FORMS["sgd momentum"](model)
    manager = ScheduledModifierManager(
        [acdc(start_epoch=float(start), end_epoch=float(end), update_frequency=float(frequency))]
    )
    manager.modify(model, optimizer, steps_per_epoch=2)
    last = sparse[-1].stop
    for step in range(2 * last):
        due = any(step // 2 in phase for phase in sparse)
        count = sum(zeros_of(model).values())
        assert count == 75 if due else count < 75 or step in {2 * phase.stop for phase in sparse}, step
        assert bool(manager.sparsity()) == due, step
        regress(model, optimizer, [step])


@pytest.mark.parametrize("form", ["sgd momentum", "adam", "adam amsgrad", "nadam", "rprop", "adagrad", "asgd"])
@pytest.mark.parametrize("reset", [True, False])
def test_acdc_going_dense_forgets_what_the_optimizer_remembers(form: str, reset: bool) -> None:
    model, optimizer, _ = regression_at_work(
        acdc(update_frequency=1.0, end_epoch=4.0, momentum_buffer_reset=reset), form
    )
    regress(model, optimizer, range(3))
    regress(model, optimizer, [3])  # goes dense at epoch 2
    # A fresh optimizer on the same weights takes the same next step, where everything was forgotten.
    twin = copy.deepcopy(model)
    fresh = FORMS[form](twin)
    if form.startswith("sgd"):  # with a buffer of zeros instead of none
        for p in twin.parameters():
            fresh.state[p]["momentum_buffer"] = torch.zeros_like(p)
    regress(model, optimizer, [4])
    regress(twin, fresh, [4])
    same = all(torch.equal(w, weights_of(twin)[name]) for name, w in weights_of(model).items())
    assert same == reset


def test_acdc_against_a_reference() -> None:
    model, optimizer, _ = regression_at_work(acdc(update_frequency=1.5, end_epoch=6.0))
    reference = regression_model()
    other = FORMS["sgd momentum"](reference)
    kept: dict[str, Tensor] = {}
    for step in range(STEPS):
        # Sparse from 1.5, dense from 3, sparse from 4.5 on.
        if step in (3, 9):
            together = torch.cat([w.abs().view(-1) for w in weights_of(reference).values()])
            limit = together.sort().values[74]
            kept = {name: w.abs() > limit for name, w in weights_of(reference).items()}
        if step == 6:
            kept = {}
            for name, p in reference.named_parameters():
                if name.endswith("weight"):
                    other.state[p]["momentum_buffer"].zero_()
        for name, mask in kept.items():
            p = dict(reference.named_parameters())[name]
            p.data.mul_(mask)
            if step in (3, 9):
                other.state[p]["momentum_buffer"].mul_(mask)
        if step:
            assert_same_state(model.state_dict(), reference.state_dict(), step)
        regress(model, optimizer, [step])
        regress(reference, other, [step])
        for name, mask in kept.items():
            dict(reference.named_parameters())[name].data.mul_(mask)
    assert sum(zeros_of(model).values()) == 75


@pytest.mark.parametrize("mask_type", ["2:4", "block4"])
def test_acdc_and_top_kast_take_patterns(mask_type: str) -> None:
    for modifier in (
        acdc(params="conv", mask_type=mask_type, compression_sparsity=0.5),
        top_kast(params="conv", mask_type=mask_type, forward_sparsity=0.5, backward_sparsity=0.25),
    ):
        model = nn.Sequential()
        model.add_module("conv", nn.Conv2d(8, 4, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        manager = ScheduledModifierManager([modifier])
        manager.modify(model, optimizer, steps_per_epoch=2)
        for _ in range(12):
            optimizer.zero_grad()
            model(torch.randn(2, 8, 5, 5)).square().mean().backward()
            optimizer.step()
        groups = (model.conv.weight == 0).movedim(1, -1).reshape(-1, 4).sum(1)  # type: ignore[union-attr]
        assert int(groups.sum()) == 144
        assert set(groups.tolist()) == ({2} if mask_type == "2:4" else {0, 4})


# ---------------------------------------------------------------------------------------------- RigL


SHAPES = {"a": (16, 3, 3, 3), "b": (32, 16, 3, 3), "c": (10, 32)}


def test_the_numbers_of_erdos_renyi() -> None:
    found = spread(SHAPES, 0.9, "erdos_renyi_kernel")
    assert {name: round(s, 6) for name, s in found.items()} == {"a": 0.743649, "b": 0.948089, "c": 0.418595}
    flat = spread(SHAPES, 0.9, "erdos_renyi")
    # (16 + 3) 9 + (32 + 16) 9 + 42 = 645 shares of the 536 weights that are kept.
    assert flat == pytest.approx(
        {"a": 1 - 536 / 645 * 19 / 48, "b": 1 - 536 / 645 * 48 / 512, "c": 1 - 536 / 645 * 42 / 320}
    )
    assert set(spread(SHAPES, 0.9, "uniform").values()) == {0.9}


@pytest.mark.parametrize("strategy", ["erdos_renyi_kernel", "erdos_renyi", "uniform"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
def test_the_shares_of_layers_make_up_the_whole(strategy: Any, sparsity: float) -> None:
    shapes = {**SHAPES, "bias": (7,), "one": (1, 1), "wide": (3, 900)}
    found = spread(shapes, sparsity, strategy)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert all(0.0 <= s <= 1.0 for s in found.values())
    assert sum(found[n] * sizes[n] for n in shapes) == pytest.approx(sparsity * sum(sizes.values()))
    assert spread({}, sparsity, strategy) == {}


def reference_rigl(form: str, num_grads: int, sampler: bool = False) -> Iterator[nn.Module]:
    """The weights after every step; lists of positions instead of masks."""
    model = regression_model()
    optimizer = FORMS[form](model)
    named = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    shares = {"0.weight": 16, "2.weight": 14}
    # 100 weights, 30 kept; (6 + 10) / 60 and (10 + 4) / 40 of it: 16 and 14 of 30.
    active: dict[str, set[int]] = {}
    for name, p in named.items():
        order = sorted(range(p.numel()), key=lambda i: (-p.detach().abs().view(-1)[i].item(), -i))
        active[name] = set(order[: shares[name]])

    def hold() -> None:
        for name, p in named.items():
            for i in set(range(p.numel())) - active[name]:
                p.data.view(-1)[i] = 0.0

    def clear(p: Tensor, positions: set[int]) -> None:
        for value in optimizer.state[p].values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                for i in positions:
                    value.view(-1)[i] = 0.0

    hold()
    seen: list[dict[str, Tensor]] = []
    for step in range(STEPS):
        regress(model, optimizer, [step])
        seen.append({name: p.grad.clone() for name, p in named.items() if p.grad is not None})
        hold()
        done = step + 1
        epoch = done / STEPS_PER_EPOCH
        if epoch == int(epoch) and epoch < 5:
            fraction = 0.3 * (1 + math.cos(math.pi * epoch / 5)) / 2
            if sampler:
                mean = {name: torch.zeros_like(p) for name, p in named.items()}
                for number in range(num_grads):
                    grads = torch.autograd.grad(regression_loss(model, 70 + number), list(named.values()))
                    for name, g in zip(named, grads, strict=True):
                        mean[name] += g / num_grads
            else:
                mean = {name: sum(g[name] for g in seen[-num_grads:]) / num_grads for name in named}  # type: ignore[misc]
            for name, p in named.items():
                change = round(fraction * len(active[name]))
                w, g = p.detach().abs().view(-1), mean[name].abs().view(-1)
                dropped = set(sorted(active[name], key=lambda i: (w[i].item(), i))[:change])
                candidates = set(range(p.numel())) - (active[name] - dropped)
                grown = set(sorted(candidates, key=lambda i: (-g[i].item(), -i))[:change])
                before, active[name] = active[name], (active[name] - dropped) | grown
                clear(p, set(range(p.numel())) - active[name])
                clear(p, grown - before)
            hold()
        yield model


@pytest.mark.parametrize(
    ("form", "num_grads", "sampler"),
    [("sgd momentum", 1, False), ("adam", 1, False), ("sgd momentum", 2, False), ("adam", 3, True)],
)
def test_rigl_against_a_reference(form: str, num_grads: int, sampler: bool) -> None:
    def losses() -> Iterator[Tensor]:
        for number in range(2 if num_grads == 3 else 1):  # begun again where it ends too early
            yield regression_loss(model, 70 + number)

    def long() -> Iterator[Tensor]:
        for number in range(99):
            yield regression_loss(model, 70 + number)

    model, optimizer, manager = regression_at_work(
        rigl(num_grads=num_grads), form, grad_sampler=long if sampler else None
    )
    counts = zeros_of(model)
    assert counts == {"0.weight": 44, "2.weight": 26}
    moved = 0
    for step, reference in enumerate(reference_rigl(form, num_grads, sampler)):
        before = {name: w == 0 for name, w in weights_of(model).items()}
        regress(model, optimizer, [step])
        assert_same_state(model.state_dict(), reference.state_dict(), (form, step))
        assert {name: int((~mask).sum()) for name, mask in masks_of(manager).items()} == counts
        moved += sum(int((before[n] & (w != 0)).sum()) for n, w in weights_of(model).items())
    assert moved > 4


@pytest.mark.parametrize("form", ["sgd momentum", "adam", "adam amsgrad", "rprop"])
def test_rigl_forgets_what_the_optimizer_remembers_of_a_grown_weight(form: str) -> None:
    model, optimizer, manager = regression_at_work(rigl(init_update_fraction=0.9, update_frequency=2.0), form)
    regress(model, optimizer, range(3))
    before = {name: mask.clone() for name, mask in masks_of(manager).items()}
    regress(model, optimizer, [3])
    grown = {name: mask & ~before[name] for name, mask in masks_of(manager).items()}
    assert sum(int(mask.sum()) for mask in grown.values()) > 3
    for name, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            if name in grown and isinstance(value, Tensor) and value.shape == p.shape:
                first = 0.01 if key == "step_size" else 0.0
                assert torch.all(value[grown[name]] == first), key
                assert value[masks_of(manager)[name] & before[name]].any(), key


def test_the_masks_of_rigl_do_not_move_after_the_end() -> None:
    model, optimizer, manager = regression_at_work(rigl(end_epoch=2.0))
    regress(model, optimizer, range(4))
    before = {name: mask.clone() for name, mask in masks_of(manager).items()}
    regress(model, optimizer, range(4, 12))
    assert_same_state(masks_of(manager), before, "")


def test_the_loader_form_of_a_gradient_sampler_leaves_training_alone() -> None:
    def loader(shift: int = 0) -> list[tuple[Tensor, Tensor]]:
        torch.randn(3)  # a loader that shuffles
        return [regression_batch(70 + shift + number) for number in range(2)]

    def run(sampler: Any, **changed: Any) -> Any:
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.Dropout(0.3), nn.Linear(10, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        manager = ScheduledModifierManager([rigl(**changed)])
        manager.modify(model, optimizer, steps_per_epoch=2, grad_sampler=sampler)
        regress(model, optimizer, range(6))
        return model.state_dict()

    criterion = nn.MSELoss()
    still = {"init_update_fraction": 1e-9}  # asks for gradients and moves nothing
    assert_same_state(run((loader, criterion), num_grads=3, **still), run(None, **still), "")
    shifted = {"grad_sampler_kwargs": {"shift": 5}}
    first = run((loader, criterion), **shifted)
    assert_same_state(run((lambda: loader(5), criterion)), first, "what it is called with")
    assert_same_state(
        run(([regression_batch(75)], criterion)),
        run((lambda: [regression_batch(75)], criterion)),
        "a list is a loader too",
    )
    assert not torch.equal(run((loader, criterion))["0.weight"], first["0.weight"])


def test_gradients_of_training_outlive_those_that_are_sampled() -> None:
    sampler = {"grad_sampler": lambda: (regression_loss(model, 70) for _ in "12")}
    model, optimizer, manager = regression_at_work(rigl(), **sampler)
    for step in range(4):
        optimizer.zero_grad()
        regression_loss(model, step).backward()
        masks = masks_of(manager)
        before = {name: (p.grad, copy.deepcopy(p.grad)) for name, p in model.named_parameters()}
        optimizer.step()
        for name, parameter in model.named_parameters():
            grad, values = before[name]
            assert grad is not None and parameter.grad is grad
            # Those of masked weights are set to zero before the step.
            assert torch.equal(grad, torch.where(masks[name], values, 0.0) if name in masks else values)


@pytest.mark.parametrize(
    ("sampler", "error", "text"),
    [
        (7, ArgumentError, "grad_sampler: int is neither a callable that yields losses nor"),
        ((1, 2), ArgumentError, "grad_sampler: tuple is neither"),
        (lambda: [], DataError, "grad_sampler gave nothing"),
        (lambda: [torch.ones(())], DataError, "a Tensor that cannot be back-propagated"),
        (([torch.ones(8, 6)], nn.MSELoss()), DataError, r"gave a Tensor where \(inputs, target\) was expected"),
    ],
)
def test_what_is_no_gradient_sampler_is_refused(sampler: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        model, optimizer, _ = regression_at_work(rigl(), grad_sampler=sampler)
        regress(model, optimizer, range(3))


@pytest.mark.filterwarnings("ignore:steps_per_epoch was not given")
def test_rigl_moves_where_the_length_of_an_epoch_is_not_known() -> None:
    model = regression_model()
    optimizer = FORMS["sgd momentum"](model)
    manager = ScheduledModifierManager([rigl(init_update_fraction=0.9)])
    manager.modify(model, optimizer)
    seen = []
    for epoch in manager.epochs():
        seen.append({name: mask.clone() for name, mask in masks_of(manager).items()})
        regress(model, optimizer, range(3 * epoch, 3 * epoch + 3))
    assert sum(not torch.equal(a["0.weight"], b["0.weight"]) for a, b in pairwise(seen)) >= 3


# ---------------------------------------------------------------------------------------------- Top-KAST


@pytest.mark.parametrize("form", ["sgd momentum", "adam"])
def test_top_kast_against_a_reference(form: str) -> None:
    decay = 0.05
    model, optimizer, _ = regression_at_work(top_kast(active_weight_decay=decay), form)
    reference = regression_model()  # holds all weights between steps
    other = FORMS[form](reference)
    named = {name: p for name, p in reference.named_parameters() if name.endswith("weight")}

    def sets(count: int) -> dict[str, Tensor]:
        together = torch.cat([p.detach().abs().view(-1) for p in named.values()])
        keep = torch.ones(100, dtype=torch.bool)
        keep[together.sort(stable=True).indices[:count]] = False
        return {name: part.view(named[name].shape) for name, part in zip(named, keep.split([60, 40]), strict=True)}

    forward, backward = sets(80), sets(50)
    entered = 0
    for step in range(STEPS):
        if step < 10:
            # The forward set alone is seen; the rest of the backward set is trained with its gradients.
            whole = {name: p.detach().clone() for name, p in named.items()}
            for name, p in named.items():
                p.data.mul_(forward[name])
            other.zero_grad()
            regression_loss(reference, step).backward()
            for name, p in named.items():
                p.data.copy_(whole[name])
                assert p.grad is not None
                penalty = torch.where(forward[name], decay * p.detach(), decay / (1 - 0.8) * p.detach())
                p.grad.copy_(torch.where(backward[name], p.grad + penalty, 0.0))
            stale = {name: p.detach().clone() for name, p in named.items()}
            other.step()
            for name, p in named.items():
                p.data.copy_(torch.where(backward[name], p.detach(), stale[name]))
            if step % 2 == 1:
                known, (forward, backward) = backward, (sets(80), sets(50))
                entered += sum(int((backward[n] & ~known[n]).sum()) for n in named)
                for name, p in named.items():
                    for value in other.state[p].values():
                        if isinstance(value, Tensor) and value.shape == p.shape:
                            value.mul_(forward[name] if step == 9 else backward[name])
        else:
            regress(reference, other, [step])
        shown = {n: p.detach() * forward[n] if n in forward else p.detach() for n, p in reference.named_parameters()}
        if step >= 9:
            for name, p in named.items():
                p.data.mul_(forward[name])
        regress(model, optimizer, [step])
        found = {name: p.detach() + 0.0 for name, p in model.named_parameters()}
        for name, value in shown.items():
            assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-7), (step, name)
            assert not found[name][value == 0].any()
        assert sum(zeros_of(model).values()) == 80
    assert entered > 0, "weights of neither set came in"


def test_outside_of_the_backward_set_the_optimizer_remembers_nothing() -> None:
    model, optimizer, manager = regression_at_work(top_kast(), "adam")
    regress(model, optimizer, range(7))
    for value in (
        optimizer.state[p][key] for p in model.parameters() for key in ("exp_avg", "exp_avg_sq") if p.dim() > 1
    ):
        assert 0 < int((value == 0).sum()) < value.numel()
    total = sum(int((optimizer.state[p]["exp_avg"] == 0).sum()) for p in model.parameters() if p.dim() > 1)
    assert total == 50
    state = manager.state_dict()["modifiers"]["TopKASTPruningModifier"]
    assert sum(int(extra.sum()) for extra in state["extra"].values()) == 30
    regress(model, optimizer, range(7, 10))
    assert not manager.state_dict()["modifiers"]["TopKASTPruningModifier"]["rest"], "given up at the end"


def test_weights_that_are_loaded_do_not_mix_with_those_outside_of_the_forward_set() -> None:
    model = regression_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    manager = ScheduledModifierManager([top_kast(update_frequency=5.0)])
    manager.modify(model, optimizer, steps_per_epoch=2)
    before = manager.state_dict()["modifiers"]["TopKASTPruningModifier"]["rest"]
    model.load_state_dict(regression_model(7).state_dict())
    regress(model, optimizer, [0])
    assert_same_state(manager.state_dict()["modifiers"]["TopKASTPruningModifier"]["rest"], before, "")
    assert sum(zeros_of(model).values()) == 80


def test_what_computes_the_loss_inside_of_a_step_is_refused() -> None:
    with pytest.raises(
        StateError, match="TopKASTPruningModifier: LBFGS computes the loss inside of the optimizer's step"
    ):
        regression_at_work(top_kast(), "lbfgs")
    model, optimizer, _ = regression_at_work(top_kast(), "sgd")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = regression_loss(model, 0)
        loss.backward()
        return loss

    with pytest.raises(StateError, match=r"TopKASTPruningModifier: step\(closure\) computes the loss inside"):
        optimizer.step(closure)


# ---------------------------------------------------------------------------------------------- refused, and ranks


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: acdc(update_frequency=-1.0), r"ACDCPruningModifier.update_frequency: -1 \(every step\) is no length"),
        (lambda: movement(score_type="obs"), r"MovementPruningModifier.score_type: 'obs' is another modifier's"),
        (lambda: top_kast(backward_sparsity=0.9), "backward_sparsity: 0.9 lies above forward_sparsity 0.8"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Callable[[], Modifier], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        make()


@pytest.mark.parametrize("kind", ["filter", "channel"])
def test_whole_channels_of_a_weight_are_compressed_together(kind: str) -> None:
    model = regression_model()
    ScheduledModifierManager([acdc(mask_type=kind, global_sparsity=False, params=["0.weight"])]).apply(model)
    weight = model[0].weight.detach() if kind == "filter" else model[0].weight.detach().T
    pruned = (weight == 0).all(1)
    assert int(pruned.sum()) == round(len(weight) * 0.75)
    assert bool((weight[~pruned] != 0).all())


def test_movement_reads_the_score_type_of_older_files() -> None:
    assert movement(score_type="magnitude").score_type == "magnitude"
    regression_at_work(movement(score_type="magnitude"))


def _train(rank: int, folder: str) -> None:
    for name in ("movement", "rigl"):
        torch.manual_seed(3)
        inner = regression_model()
        model = DistributedDataParallel(inner)

        def losses(inner: nn.Module = inner) -> Iterator[Tensor]:
            for number in range(4):
                yield regression_loss(inner, 30 + 10 * rank + number)

        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        modifier = rigl(num_grads=2, init_update_fraction=0.9) if name == "rigl" else movement()
        manager = ScheduledModifierManager([modifier])
        manager.modify(model, optimizer, steps_per_epoch=2, grad_sampler=losses if name == "rigl" else None)
        regress(model, optimizer, range(100 * rank, 100 * rank + 10))
        torch.save(inner.state_dict(), Path(folder) / f"{name}{rank}.pt")
        manager.finalize()
        # Wrappers go before the process group does, and no rank leaves while another one still talks to it.
        del model
        gc.collect()
        dist.barrier()


def test_masks_are_the_same_on_both_ranks(tmp_path: Path) -> None:
    on_two_ranks(_train, tmp_path)
    for name in ("movement", "rigl"):
        first, second = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in (0, 1))
        assert_same_state(first, second, name)
        assert int((first["0.weight"] == 0).sum()) == {"movement": 48, "rigl": 44}[name]
