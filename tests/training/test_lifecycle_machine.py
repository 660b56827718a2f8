"""Anything in any order: a random walk over {step, skip, save, load, copy, finalize, to(dtype), load dense weights}.

The reference is the sixty lines of `Book`: what may be non-zero, counted and ranked with sorted Python lists.
"""

from __future__ import annotations

import copy
import io
from contextlib import suppress
from fractions import Fraction
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

from sparsify.modifiers.learning_rate import LearningRateFunctionModifier
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.training.manager import ScheduledModifierManager

NAMES = ["0.weight", "2.weight"]
FIRST, LAST = Fraction(1, 10), Fraction(4, 5)


class Book:
    """What must be true, kept apart from how it is done: masks as sets of positions, time as fractions."""

    def __init__(self, weights: dict[str, list[float]], per_epoch: int, start: int, end: int, every: int) -> None:
        # Times in steps: the recipe's epochs are multiples of a step.
        self.per_epoch, self.start, self.end, self.every = per_epoch, start, end, every
        self.step = 0
        self.zero: dict[str, set[int]] = {}
        self.point: int | None = None
        self.due(weights)

    def grid(self) -> int | None:
        """The last point of the grid that is due, in steps."""
        if self.step < self.start:
            return None
        if self.step >= self.end:
            return self.end
        return self.start + (self.step - self.start) // self.every * self.every

    def due(self, weights: dict[str, list[float]]) -> None:
        """Grows the masks where a point of the grid is due; `weights` as they are after the step and its masks."""
        point = self.grid()
        if point is None or point == self.point:
            return
        self.point = point
        x = Fraction(1) if point >= self.end else Fraction(point - self.start, self.end - self.start)
        sparsity = FIRST + (LAST - FIRST) * (1 - (1 - x) ** 3)
        for name, values in weights.items():
            pruned = self.zero.setdefault(name, set())
            count = round(len(values) * float(sparsity))
            ranked = sorted(range(len(values)), key=lambda i: (i not in pruned, abs(values[i]), i))
            self.zero[name] = set(ranked[:count])

    def rate(self) -> float:
        """The learning rate of the next step: linear from .1 to .01 over the same window; .5 before it."""
        if self.step < self.start:
            return 0.5
        x = 1.0 if self.step >= self.end else (self.step - self.start) / (self.end - self.start)
        return 0.1 + (0.01 - 0.1) * x

    def save(self) -> Any:
        return copy.deepcopy((self.step, self.zero, self.point))

    def load(self, saved: Any) -> None:
        self.step, self.zero, self.point = copy.deepcopy(saved)


class Life(RuleBasedStateMachine):
    @initialize(
        seed=st.integers(0, 99),
        per_epoch=st.integers(1, 5),
        start=st.integers(0, 4),
        length=st.integers(0, 9),
        every=st.integers(1, 4),
        fused=st.booleans(),
        adam=st.booleans(),
    )
    def begin(self, seed: int, per_epoch: int, start: int, length: int, every: int, fused: bool, adam: bool) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.kind, self.fused, self.per_epoch = (torch.optim.Adam if adam else torch.optim.SGD), fused, per_epoch
        window = {"start_epoch": start / per_epoch, "end_epoch": (start + length) / per_epoch}
        self.recipe = [
            GMPruningModifier(
                params="__ALL_PRUNABLE__",
                init_sparsity=float(FIRST),
                final_sparsity=float(LAST),
                update_frequency=every / per_epoch,
                **window,
            ),
            LearningRateFunctionModifier(lr_func="linear", init_lr=0.1, final_lr=0.01, **window),
        ]
        self.seed, self.finalized = seed, False
        self.saved: list[Any] = []
        self.attach()
        self.book = Book(self.weights(), per_epoch, start, start + length, every)

    def attach(self) -> None:
        self.optimizer = self.kind(self.model.parameters(), lr=0.5, fused=self.fused)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.manager = ScheduledModifierManager(self.recipe)
        self.manager.modify(self.model, self.optimizer, steps_per_epoch=self.per_epoch)

    def weights(self) -> dict[str, list[float]]:
        parameters = dict(self.model.named_parameters())
        return {name: parameters[name].detach().double().flatten().tolist() for name in NAMES}

    def backward(self, scale: float = 1.0, amp: bool = False) -> None:
        self.seed += 1
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(self.seed)).to(self.model[0].weight.dtype)
        self.optimizer.zero_grad()
        loss = self.manager.update_loss(self.model(inputs).square().mean()) * scale
        (self.scaler.scale(loss) if amp else loss).backward()

    def stepped(self) -> None:
        if not self.finalized:
            self.book.step += 1
            self.book.due(self.weights())

    @rule(amp=st.booleans())
    def step(self, amp: bool) -> None:
        if amp and self.model[0].weight.dtype == torch.float32:
            self.backward(amp=True)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.backward()
            self.optimizer.step()
        self.stepped()

    @precondition(lambda self: self.model[0].weight.dtype == torch.float32)
    @rule()
    def skip(self) -> None:
        before = self.weights()
        self.backward(float("inf"), amp=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        assert self.weights() == before

    @rule()
    def fail(self) -> None:
        def fails() -> float:
            raise ZeroDivisionError

        with suppress(ZeroDivisionError):
            self.optimizer.step(fails)

    @precondition(lambda self: not self.finalized)
    @rule()
    def save(self) -> None:
        file = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "manager": self.manager.state_dict(),
        }
        torch.save(state, file)
        self.saved.append((file.getvalue(), self.book.save()))

    @precondition(lambda self: self.saved and not self.finalized)
    @rule(data=st.data(), fresh=st.booleans(), order=st.permutations(["model", "optimizer", "manager"]))
    def load(self, data: Any, fresh: bool, order: list[str]) -> None:
        file, book = data.draw(st.sampled_from(self.saved))
        state = torch.load(io.BytesIO(file), weights_only=True)
        if fresh:
            self.manager.finalize(self.model)
            self.model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
            self.attach()
        for part in order:
            getattr(self, part).load_state_dict(state[part])
        self.book.load(book)

    @rule()
    def copy(self) -> None:
        other = copy.deepcopy(self.model)
        optimizer = copy.deepcopy(self.optimizer)
        optimizer.step()
        other(torch.randn(2, 5).to(other[0].weight.dtype)).sum().backward()
        torch.optim.SGD(other.parameters(), lr=1.0).step()
        assert not copy.deepcopy(self.manager).attached

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def to(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        # An optimizer's state does not follow its parameters: as a user would, begin it anew.
        self.optimizer.state.clear()
        self.optimizer.zero_grad()

    @precondition(lambda self: not self.finalized)
    @rule(assign=st.booleans())
    def load_dense_weights(self, assign: bool) -> None:
        dense = {name: torch.randn_like(value) for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(dense, assign=assign)
        if assign:
            # The optimizer still holds the old parameters; a user gives it the new ones.
            for group in self.optimizer.param_groups:
                group["params"] = list(self.model.parameters())
            self.optimizer.state.clear()
        self.step(amp=False)

    @rule()
    def finalize(self) -> None:
        self.manager.finalize(self.model)
        self.finalized = True
        self.book.zero = {}

    @invariant()
    def agrees_with_the_book(self) -> None:
        if not hasattr(self, "book"):
            return
        assert self.manager.step == self.book.step
        assert self.manager.attached == (not self.finalized)
        if self.finalized:
            return
        if self.book.step >= self.book.start or self.optimizer.param_groups[0]["lr"] == 0.5:
            assert abs(self.optimizer.param_groups[0]["lr"] - self.book.rate()) < 1e-12
        for name, values in self.weights().items():
            zeros = {i for i, value in enumerate(values) if value == 0.0}
            assert zeros == self.book.zero.get(name, set()), name


Life.TestCase.settings = settings(stateful_step_count=25)
TestLife = Life.TestCase
