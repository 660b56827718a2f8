"""OBS and M-FAC pruning on real steps and with samplers: each update against a dense reference of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsify.errors import ArgumentError, DataError, RecipeError, StateError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.second_order import MFACPruningModifier, OBSPruningModifier
from sparsify.pruning import second_order
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import (
    STEPS,
    assert_same_state,
    pruning_fields,
    regress,
    regression_at_work,
    regression_batch,
    regression_loss,
    regression_model,
    reloaded,
    weights_of,
    zeros_of,
)
from tests.optimizer_forms import FORMS
from tests.ranks import on_two_ranks

SIZES = {"0.weight": 60, "2.weight": 40}


def obs(**changed: Any) -> OBSPruningModifier:
    start = {"init_sparsity": 0.0, "final_sparsity": 0.8, "num_grads": 16, "damp": 1e-4, "fisher_block_size": 16}
    return OBSPruningModifier(**{**pruning_fields(), **start, **changed})


def mfac(**changed: Any) -> MFACPruningModifier:
    start = {"init_sparsity": 0.0, "final_sparsity": 0.8, "num_grads": 16, "damp": 1e-4, "fisher_block_size": 16}
    return MFACPruningModifier(**{**pruning_fields(), **start, "global_sparsity": True, **changed})


BOTH: dict[str, Callable[..., Modifier]] = {"obs": obs, "mfac": mfac}
both = pytest.mark.parametrize("method", BOTH)


def sampler(model: nn.Module, count: int = 1000) -> Callable[..., Iterator[Tensor]]:
    return lambda **_: (regression_loss(model, step) for step in range(count))


# ---------------------------------------------------------------------------------------------- the reference


def gradients_at(model: nn.Module, steps: range) -> list[dict[str, Tensor]]:
    found = []
    for step in steps:
        model.zero_grad()
        regression_loss(model, step).backward()
        found.append({name: w.grad.clone() for name, w in model.named_parameters() if name in SIZES})
    model.zero_grad()
    return found


def pruned_densely(
    before: dict[str, Tensor], gradients: list[dict[str, Tensor]], pruned: int, size: int = 16, damp: float = 1e-4
) -> dict[str, Tensor]:
    """One ranking over all weights by a dense inverse, what is zero being gone already; the rest minimised block by
    block."""
    scores, inverses = {}, {}
    for name, weight in before.items():
        flat = weight.double().reshape(-1)
        rows = torch.stack([g[name].double().reshape(-1) for g in gradients]) * (flat != 0)
        place = torch.arange(len(flat)) // size
        fisher = rows.T @ rows / len(rows) * (place[:, None] == place[None, :]) + damp * torch.eye(len(flat)).double()
        inverses[name] = torch.linalg.inv(fisher)
        scores[name] = torch.where(flat != 0, flat**2 / inverses[name].diagonal() / 2, 0.0)
    order = torch.cat(list(scores.values())).argsort(stable=True)
    goes = torch.zeros(len(order), dtype=torch.bool)
    goes[order[:pruned]] = True
    after = {}
    for (name, weight), q in zip(before.items(), goes.split([w.numel() for w in before.values()]), strict=True):
        flat, inverse = weight.double().reshape(-1), inverses[name]
        force = torch.linalg.solve(inverse[q][:, q], flat[q])
        moved = flat - inverse[:, q] @ force
        moved[q] = 0.0
        after[name] = torch.where(flat != 0, moved, 0.0).view(weight.shape).float()
    return after


def assert_close(model: nn.Module, wanted: dict[str, Tensor], what: str) -> None:
    for name, weight in weights_of(model).items():
        assert torch.equal(weight == 0, wanted[name] == 0), f"{what}: {name}"
        torch.testing.assert_close(weight, wanted[name], rtol=2e-3, atol=1e-5, msg=lambda text: f"{what}: {text}")


# ---------------------------------------------------------------------------------------------- what an update does


@both
def test_a_sampler_prunes_as_the_dense_inverse_says(method: str) -> None:
    model = regression_model()
    before = copy.deepcopy(weights_of(model))
    wanted = pruned_densely(before, gradients_at(model, range(16)), pruned=70)
    modifier = BOTH[method](init_sparsity=0.7, final_sparsity=0.7)
    manager = ScheduledModifierManager([modifier])
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), steps_per_epoch=2, grad_sampler=sampler(model))
    assert_close(model, wanted, method)
    assert sum(zeros_of(model).values()) == 70


@both
def test_a_later_update_keeps_what_is_gone_and_moves_only_what_stays(method: str) -> None:
    modifier = BOTH[method](init_sparsity=0.3, final_sparsity=0.6, inter_func="linear", end_epoch=2.0)
    model = regression_model()
    manager = ScheduledModifierManager([modifier])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    manager.modify(model, optimizer, steps_per_epoch=2, grad_sampler=sampler(model))
    first = {name: weight == 0 for name, weight in weights_of(model).items()}
    for pruned in (45, 60):
        before = copy.deepcopy(weights_of(model))
        wanted = pruned_densely(before, gradients_at(model, range(16)), pruned)
        regress(model, optimizer, range(2))
        assert_close(model, wanted, f"{method} at {pruned}")
    assert all(bool((weights_of(model)[name][pruned] == 0).all()) for name, pruned in first.items())


@both
def test_without_a_sampler_the_last_steps_before_an_update_count(method: str) -> None:
    """Two updates 4 steps apart; of the steps before each, the last 3 are in the Fisher matrix."""
    changed = {"num_grads": 3, "update_frequency": 2.0, "end_epoch": 4.0, "inter_func": "linear"}
    model, optimizer, _ = regression_at_work(BOTH[method](**changed), "sgd")
    for start, pruned in ((0, 40), (4, 80)):
        seen = []
        for step in range(start, start + 4):
            seen += gradients_at(model, range(step, step + 1))
            stepped = {name: weight - 0.1 * seen[-1][name] for name, weight in weights_of(model).items()}
            masked = {name: weight == 0 for name, weight in weights_of(model).items()}
            regress(model, optimizer, [step])
        # What the update found: a step of plain SGD, and what was gone not yet zero again.
        found = {name: weight.masked_fill(masked[name], 0.0) for name, weight in stepped.items()}
        assert sum(int(mask.sum()) for mask in masked.values()) == start * 10
        assert_close(model, pruned_densely(found, seen[-3:], pruned), f"{method} at {pruned}")


def test_where_updates_lie_closer_than_gradients_reach_a_mean_runs_on() -> None:
    _, _, manager = run = regression_at_work(obs(num_grads=4, update_frequency=0.5, final_sparsity=0.1))
    model, optimizer, _ = run
    reference: Tensor | float = 0.0
    for step in range(7):
        gradient = gradients_at(model, range(step, step + 1))[0]["2.weight"].reshape(-1)[:16].double()
        reference = reference * (0.75 if step >= 4 else 1.0) + gradient.outer(gradient)
        regress(model, optimizer, [step])
    state = manager.state_dict()["modifiers"]["OBSPruningModifier"]
    assert state["count"] == 4
    torch.testing.assert_close(state["sums"]["2.weight"][0].double(), reference, rtol=1e-5, atol=1e-9)


@both
def test_an_update_begins_anew_where_gradients_reach_as_far_as_the_one_before(method: str) -> None:
    model, optimizer, manager = regression_at_work(BOTH[method](num_grads=2, update_frequency=1.0))
    counts = []
    for step in range(6):
        regress(model, optimizer, [step])
        counts.append(manager.state_dict()["modifiers"][type(BOTH[method]()).__name__]["count"])
    assert counts == [1, 0, 1, 0, 1, 0]


def test_an_optimizer_that_writes_into_gradients_changes_nothing() -> None:
    class Writing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad.zero_()

    model = regression_model()
    optimizer = Writing(model.parameters(), lr=0.1)
    manager = ScheduledModifierManager([mfac(update_frequency=5.0)])
    manager.modify(model, optimizer, steps_per_epoch=2)
    wanted = gradients_at(model, range(1))[0]["0.weight"].reshape(-1)
    regress(model, optimizer, [0])
    rows = manager.state_dict()["modifiers"]["MFACPruningModifier"]["gradients"]["0.weight"]
    assert len(rows) == 1 and torch.equal(rows[0], wanted)


def test_mfac_keeps_the_last_gradients_and_as_many_as_the_sparsity_asks_for() -> None:
    counts = {0.0: 2, 0.5: 5}
    model, optimizer, manager = regression_at_work(mfac(num_grads=counts, update_frequency=-1.0, inter_func="linear"))
    held = []
    for step in range(9):
        last = gradients_at(model, range(step, step + 1))[0]["0.weight"].reshape(-1)
        regress(model, optimizer, [step])
        rows = manager.state_dict()["modifiers"]["MFACPruningModifier"]["gradients"]["0.weight"]
        torch.testing.assert_close(rows[-1], last)
        held.append(len(rows))
    assert held == [1, 2, 2, 2, 2, 2, 2, 3, 4]


def test_recomputations_reach_the_same_count_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = regression_model()
    found = []
    real = second_order.fisher_scores

    def watched(weight: Tensor, *rest: Any) -> Tensor:
        found.append(sum(zeros_of(model).values()))
        return real(weight, *rest)

    monkeypatch.setattr(second_order, "fisher_scores", watched)
    at_once = obs(init_sparsity=0.8, num_recomputations=4)
    manager = ScheduledModifierManager([at_once])
    manager.apply(model, grad_sampler=sampler(model))
    assert found == [0, 0, 20, 20, 40, 40, 60, 60]
    assert sum(zeros_of(model).values()) == 80


@both
def test_weights_that_no_loss_reaches_go_first_and_the_loss_stays(method: str) -> None:
    model = regression_model()
    with torch.no_grad():
        model[2].weight[:, :5] = 0.0  # nothing hears the first five hidden units
    before = regression_loss(model, 3).item()
    ScheduledModifierManager([BOTH[method](final_sparsity=0.5, damp=1e-9)]).apply(model, grad_sampler=sampler(model))
    assert zeros_of(model) == {"0.weight": 30, "2.weight": 20}
    assert regression_loss(model, 3).item() == pytest.approx(before, rel=1e-5)


# ---------------------------------------------------------------------------------------------- promises


@pytest.mark.parametrize(
    "form", ["sgd momentum", "sgd nesterov, one by one", "adam", "rprop", "sgd stepped twice", "lbfgs"]
)
@both
def test_resuming_at_any_step_equals_never_stopping(method: str, form: str) -> None:
    modifier = BOTH[method](num_grads=3, update_frequency=1.5)

    def states(model: nn.Module, optimizer: Any, manager: Any) -> dict[str, Any]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "manager": manager.state_dict()}

    model, optimizer, manager = run = regression_at_work(modifier, form)
    found = {0: reloaded(**states(*run))}
    regress(model, optimizer, range(STEPS), lambda step: found.__setitem__(step, reloaded(**states(*run))))
    assert sum(zeros_of(model).values()) == 80
    for step in range(STEPS):
        model, optimizer, manager = other = regression_at_work(modifier, form, seed=step + 1)
        checkpoint = copy.deepcopy(found[step])
        manager.load_state_dict(checkpoint["manager"])
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        regress(model, optimizer, range(step, STEPS))
        assert_same_state(states(*other), found[STEPS], f"{method}, {form}, resumed at step {step}")


@pytest.mark.parametrize("mask_type", ["unstructured", "[2, 2]", "2:4"])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("sampled", [True, False])
@both
def test_counts_are_exact_and_masks_only_grow(method: str, sampled: bool, together: bool, mask_type: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    kind: Any = [2, 2] if mask_type == "[2, 2]" else mask_type
    params = "2.weight" if kind == "2:4" else "__ALL_PRUNABLE__"
    changed = {"mask_type": kind, "params": params, "global_sparsity": together, "final_sparsity": 0.5}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager([BOTH[method](**changed)])
    given = {"grad_sampler": sampler(model)} if sampled else {}
    manager.modify(model, optimizer, steps_per_epoch=2, **given)
    pruned = {name: weight == 0 for name, weight in weights_of(model).items()}
    for step in range(STEPS):
        regress(model, optimizer, [step])
        now = {name: weight == 0 for name, weight in weights_of(model).items()}
        assert all(bool(now[name][pruned[name]].all()) for name in now)
        pruned = now
    total = sum(zeros_of(model).values())
    assert total == {"2.weight": 16}.get(params, 40)
    if mask_type == "2:4":
        assert bool(((model[2].weight.view(4, 2, 4) == 0).sum(2) == 2).all())
    if kind == [2, 2]:
        blocks = (model[0].weight.view(4, 2, 3, 2) == 0).sum((1, 3))
        assert bool(((blocks == 0) | (blocks == 4)).all())


@pytest.mark.parametrize("form", ["sgd momentum", "adam"])
@both
def test_without_sparsity_nothing_changes(method: str, form: str) -> None:
    plain = regression_model()
    regress(plain, FORMS[form](plain), range(STEPS))
    model, optimizer, manager = regression_at_work(BOTH[method](final_sparsity=0.0), form)
    regress(model, optimizer, range(STEPS))
    manager.finalize(model)
    assert_same_state(model.state_dict(), plain.state_dict(), method)


@both
def test_sampling_changes_neither_gradients_nor_random_numbers(method: str) -> None:
    model = regression_model()
    regression_loss(model, 0).backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state = torch.get_rng_state()
    ScheduledModifierManager([BOTH[method]()]).apply(model, grad_sampler=sampler(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_state({name: p.grad for name, p in model.named_parameters()}, before, method)


@both
def test_gradients_under_a_fused_scaler_are_true_and_skipped_steps_do_not_count(method: str) -> None:
    kept = []
    for scale in (None, 1024.0):
        model = regression_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
        manager = ScheduledModifierManager([BOTH[method](num_grads=4, update_frequency=4.0)])
        manager.modify(model, optimizer, steps_per_epoch=1)
        for step in range(3):
            optimizer.zero_grad()
            (regression_loss(model, step) * (scale or 1.0)).backward()
            if scale is not None:  # as GradScaler tells a fused optimizer
                optimizer.grad_scale = torch.tensor(scale)  # type: ignore[attr-defined]
                optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
            optimizer.step()
            if scale is not None:
                model[0].weight.grad.fill_(torch.inf)
                optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
                optimizer.step()
        kept.append(manager.state_dict()["modifiers"][f"{type(BOTH[method]()).__name__}"])
    assert kept[0]["count"] == 3
    assert_same_state(kept[1], kept[0], method)


@both
def test_a_closure_gives_its_own_gradients_even_in_the_same_tensors(method: str) -> None:
    kept = []
    for closure in (False, True):
        model = regression_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        regression_loss(model, 99).backward()
        manager = ScheduledModifierManager([BOTH[method](num_grads=4, update_frequency=4.0)])
        manager.modify(model, optimizer, steps_per_epoch=1)
        for step in range(3):

            def compute(step: int = step, model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad(set_to_none=False)
                loss = regression_loss(model, step)
                loss.backward()
                return loss

            if closure:
                optimizer.step(compute)
            else:
                compute()
                optimizer.step()
        kept.append(manager.state_dict()["modifiers"][f"{type(BOTH[method]()).__name__}"])
    assert_same_state(kept[1], kept[0], method)


def _train_on_two(rank: int, folder: str) -> None:
    for method, make in BOTH.items():
        for sampled in (False, True):
            model = DistributedDataParallel(regression_model())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            generator = torch.Generator().manual_seed(100 + rank)

            def losses(model: nn.Module = model, generator: torch.Generator = generator) -> Iterator[Tensor]:
                for _ in range(8):
                    yield model.module(torch.randn(5, 6, generator=generator)).square().sum()

            manager = ScheduledModifierManager([make(num_grads=4)])
            manager.modify(model, optimizer, steps_per_epoch=2, grad_sampler=losses if sampled else None)
            for _ in range(10):
                optimizer.zero_grad()
                model(torch.randn(5, 6, generator=generator)).square().sum().backward()
                optimizer.step()
            manager.finalize(model)
            torch.save(model.module.state_dict(), Path(folder) / f"{method} {sampled} {rank}.pt")


def test_masks_and_weights_are_the_same_on_both_ranks(tmp_path: Path) -> None:
    on_two_ranks(_train_on_two, tmp_path)
    for method in BOTH:
        for sampled in (False, True):
            first, second = (
                torch.load(tmp_path / f"{method} {sampled} {rank}.pt", weights_only=True) for rank in (0, 1)
            )
            assert_same_state(first, second, f"{method} {sampled}")
            assert sum(int((first[name] == 0).sum()) for name in SIZES) == 80


# ---------------------------------------------------------------------------------------------- memory, and refusals


@both
def test_what_does_not_fit_in_memory_is_refused_before_anything_is_taken(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_order, "free_bytes", lambda device: 10**6)
    model = regression_model()
    before = copy.deepcopy(model.state_dict())
    lower = {"obs": "fisher_block_size", "mfac": "num_grads"}[method]
    with pytest.raises(ArgumentError, match=rf"Modifier needs up to .* GB on cpu, .* Lower {lower}, or name fewer"):
        ScheduledModifierManager([BOTH[method]()]).apply(model, grad_sampler=sampler(model))
    assert_same_state(model.state_dict(), before, method)


@both
def test_nothing_is_kept_between_windows_nor_at_the_end(method: str) -> None:
    model, optimizer, manager = regression_at_work(BOTH[method](num_grads=1, update_frequency=2.0, end_epoch=4.0))
    counts = []
    for step in range(10):
        regress(model, optimizer, [step])
        state = manager.state_dict()["modifiers"][type(BOTH[method]()).__name__]
        counts.append((state["count"], len(state.get("sums", state.get("gradients")))))
    assert counts == [(0, 0)] * 10


@both
def test_without_training_and_without_a_sampler_it_says_what_is_missing(method: str) -> None:
    with pytest.raises(StateError, match=r"without training there are no gradients\. Pass a grad_sampler"):
        ScheduledModifierManager([BOTH[method]()]).apply(regression_model())


@both
def test_all_at_once_before_any_gradient_is_refused(method: str) -> None:
    with pytest.raises(StateError, match="final_sparsity is due before any gradient was seen"):
        regression_at_work(BOTH[method](end_epoch=0.0, final_sparsity=0.5))


@both
def test_masks_due_before_any_gradient_go_by_magnitude(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = regression_model()
    flat = torch.cat([weight.reshape(-1) for weight in weights_of(model).values()])
    wanted = flat.abs() > flat.abs().sort().values[29]
    model, _, _ = regression_at_work(BOTH[method](init_sparsity=0.3))
    assert torch.equal(torch.cat([weight.reshape(-1) for weight in weights_of(model).values()]), flat * wanted)
    assert "by magnitude" in caplog.text


@both
def test_infinite_gradients_are_refused_by_name_and_nothing_changes(method: str) -> None:
    model = regression_model()
    before = copy.deepcopy(model.state_dict())

    def losses() -> Iterator[Tensor]:
        yield model(regression_batch(0)[0]).sum() * torch.inf

    with pytest.raises(DataError, match=r"the gradients of '0\.weight' hold NaN or infinity"):
        ScheduledModifierManager([BOTH[method]()]).apply(model, grad_sampler=losses)
    assert_same_state(model.state_dict(), before, method)


@pytest.mark.parametrize(
    ("make", "changed", "text"),
    [
        (obs, {"score_type": "movement"}, r"score_type: 'movement' is another modifier's"),
        (mfac, {"score_type": "obs"}, r"score_type: 'obs' is another modifier's"),
        (mfac, {"num_grads": {}}, r"num_grads: \{\} says no count"),
        (obs, {"damp": 0.0}, "damp"),
        (obs, {"fisher_block_size": 0}, "fisher_block_size"),
    ],
)
def test_fields_that_cannot_be_meant_are_refused(make: Any, changed: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        make(**changed)


@both
def test_whole_channels_of_a_weight_go_by_their_mean_score(method: str) -> None:
    model = regression_model()
    modifier = BOTH[method](mask_type="filter", global_sparsity=False, params=["0.weight"], num_grads=16)
    ScheduledModifierManager([modifier]).apply(model, grad_sampler=sampler(model))
    rows = model[0].weight.detach()
    final = modifier.final_sparsity
    assert isinstance(final, float)
    assert int((rows == 0).flatten(1).all(1).sum()) == round(len(rows) * final)
    assert bool((rows[(rows != 0).any(1)] != 0).all())


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"grads_device: 'nowhere' is no device here"):
        regression_at_work(mfac(grads_device="nowhere"))


@both
def test_a_sampler_that_is_none_is_refused(method: str) -> None:
    with pytest.raises(ArgumentError, match="grad_sampler"):
        regression_at_work(BOTH[method](), grad_sampler=3)


@both
def test_arguments_reach_the_sampler(method: str) -> None:
    model, seen = regression_model(), []

    def losses(**options: Any) -> Iterator[Tensor]:
        seen.append(options)
        yield from sampler(model)()

    modifier = BOTH[method](grad_sampler_kwargs={"batch_size": 16})
    ScheduledModifierManager([modifier]).apply(model, grad_sampler=losses)
    assert seen and all(options == {"batch_size": 16} for options in seen)
