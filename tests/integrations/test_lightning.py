"""Lightning's Trainer with one line: the recipe's clock, its loss, checkpoints, resuming, and what is said."""

from __future__ import annotations

import importlib.util
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sparsify.errors import ArgumentError, SparsifyWarning, StateError, TargetError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.learning_rate import LearningRateFunctionModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.recipe import Recipe
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import assert_same_state, channel_pruning, gradual_pruning
from tests.zoo.small import perceptron

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch import callbacks as theirs  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, Logger  # noqa: E402

from sparsify.integrations.lightning import SparsifyCallback, apply_checkpoint_structure  # noqa: E402

# Lightning warns about much of its own; warnings of ours are errors, as everywhere.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::sparsify.errors.SparsifyWarning"),
]

EPOCHS, BATCHES = 4, 5
RATE = LearningRateFunctionModifier(start_epoch=0.0, end_epoch=4.0, lr_func="linear", init_lr=0.1, final_lr=0.01)
RECIPES: dict[str, list[Modifier]] = {
    "pruning": [gradual_pruning(0.0, 3.0), RATE],
    "int8": [QuantizationModifier(start_epoch=1.5, disable_quantization_observer_epoch=3.0)],
    "channels": [channel_pruning(start_epoch=0.5, end_epoch=2.0, shrink=True)],
    "all": [
        channel_pruning(start_epoch=0.0, end_epoch=1.0, shrink=True),
        gradual_pruning(1.0, 2.5),
        QuantizationModifier(start_epoch=2.5),
        DistillationModifier(hardness=0.5),
        RATE,
    ],
}


def built(*modifiers: Modifier, epochs: float = EPOCHS) -> Recipe:
    return ScheduledModifierManager([EpochRangeModifier(end_epoch=float(epochs)), *modifiers]).recipe


def recipe_of(name: str) -> Recipe:
    return built(*RECIPES[name])


class Regression(lightning.LightningModule):  # type: ignore[name-defined, misc]
    """A regression whose batch follows from the number of the batch alone, so that a run may stop anywhere."""

    def __init__(self, *, dictionary: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.net = perceptron(6, 10, 4, seed=seed)
        self.dictionary = dictionary
        self.losses: list[float] = []
        self.lr = 0.05
        self.batch_size = 2

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(900 + 100 * self.trainer.global_step + index)
        shape = [torch.randn(8, size, generator=draw) for size in (6, 4)]
        return shape[0].to(self.dtype), shape[1].to(self.dtype)

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = self.batch(index)
        loss = (self(x) - y).square().mean()
        self.losses.append(loss.item())
        self.log("train_loss", loss)
        return {"loss": loss, "outputs": 1} if self.dictionary else loss

    def validation_step(self, batch: Any, index: int) -> None:
        draw = torch.Generator().manual_seed(5)
        self.log("val_loss", self(torch.randn(8, 6, generator=draw).to(self.dtype)).square().mean())

    test_step = validation_step

    def predict_step(self, batch: Any, index: int) -> Any:
        return self(torch.ones(2, 6))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> Any:
        return loader(BATCHES * self.batch_size, self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(2)

    test_dataloader = predict_dataloader = val_dataloader


def loader(count: int, batch_size: int = 1, **given: Any) -> DataLoader[Any]:
    return DataLoader(torch.arange(float(count)), batch_size=batch_size, **given)  # type: ignore[arg-type]


class Recorder(Logger):  # type: ignore[misc]
    """Keeps what is logged as (name, step, value)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[str, int, float]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows += [(name, step or 0, float(value)) for name, value in metrics.items() if name != "epoch"]

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def of_recipe(self) -> list[tuple[str, int, float]]:
        return sorted(row for row in self.rows if "/" in row[0])


@dataclass
class Fit:
    module: Any
    trainer: Any
    callback: SparsifyCallback
    recorder: Recorder = field(default_factory=Recorder)

    @property
    def manager(self) -> Any:
        return self.callback.manager

    def end(self, folder: Path) -> Any:
        path = folder / "end.ckpt"
        self.trainer.save_checkpoint(path)
        saved = torch.load(path, weights_only=False)
        # How the epoch is reckoned; the epoch itself is compared.
        for key in ("mark_epoch", "mark_step", "checksum"):
            del saved["sparsify"][""]["manager"][key]
        return {key: saved[key] for key in ("state_dict", "optimizer_states", "sparsify")}


def trainer_of(folder: Path, *callbacks: Any, recorder: Any = False, **given: Any) -> Any:
    options: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "logger": recorder,
        "enable_checkpointing": any(isinstance(one, theirs.Checkpoint) for one in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return lightning.Trainer(callbacks=list(callbacks), **{**options, **given})


def prepared(
    folder: Path,
    recipe: Any,
    *callbacks: Any,
    module: Any = None,
    options: dict[str, Any] | None = None,
    **given: Any,
) -> Fit:
    recorder = Recorder()
    options = dict(options or {})
    if any(isinstance(m, DistillationModifier) for m in Recipe.from_yaml(str(recipe)).modifiers):
        options.setdefault("distillation_teacher", "self")
    callback = SparsifyCallback(recipe, **options)
    trainer = trainer_of(folder, callback, *callbacks, recorder=recorder, **given)
    return Fit(Regression() if module is None else module, trainer, callback, recorder)


def fitted(folder: Path, recipe: Any, *callbacks: Any, ckpt_path: Any = None, loaders: Any = None, **given: Any) -> Fit:
    fit = prepared(folder, recipe, *callbacks, **given)
    fit.trainer.fit(fit.module, train_dataloaders=loaders, ckpt_path=ckpt_path)
    return fit


def zeros(module: Any) -> float:
    weights = [p for name, p in module.named_parameters() if name.endswith("weight")]
    return float(sum((w == 0).sum() for w in weights)) / sum(w.numel() for w in weights)


def layers(module: Any) -> set[str]:
    return {type(layer).__name__ for layer in module.modules()}


def every_checkpoint(folder: Path) -> Any:
    return theirs.ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=1)


# ---------------------------------------------------------------------- the whole way


def test_one_line_prunes_quantizes_exports_and_verifies(tmp_path: Path) -> None:
    fit = fitted(tmp_path, recipe_of("all"), options={"export_path": tmp_path / "m.onnx"})
    assert not fit.manager.attached and fit.manager.epoch == EPOCHS and fit.manager.step == EPOCHS * BATCHES
    assert zeros(fit.module) == pytest.approx(0.8, abs=0.02) and "QuantizedLinear" in layers(fit.module)
    assert fit.module.net[0].weight.shape == (5, 6)
    assert fit.callback.exported is not None and fit.callback.exported.path.exists()
    assert fit.callback.verification
    logged = {name for name, _, _ in fit.recorder.of_recipe()}
    assert any("sparsity" in name for name in logged) and any("learning_rate" in name for name in logged)
    assert not set(vars(fit.trainer.strategy)) & {"training_step", "backward", "load_model_state_dict"}
    pickle.dumps(fit.module)


@pytest.mark.parametrize("name", ["pruning", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_resumed_at_any_checkpoint_is_the_run_that_never_stopped(
    name: str, accumulation: int, tmp_path: Path
) -> None:
    if accumulation == 2 and name == "pruning":
        pytest.skip("with all of it")
    resumes(name, accumulation, tmp_path, every=4 if name == "pruning" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "channels"])
def test_structure_is_there_before_the_weights_are_loaded(name: str, tmp_path: Path) -> None:
    resumes(name, 1, tmp_path, every=3)


def resumes(name: str, accumulation: int, folder: Path, every: int, **given: Any) -> None:
    saved = every_checkpoint(folder / "saved")
    whole = fitted(folder, recipe_of(name), saved, accumulate_grad_batches=accumulation, **given)
    steps = math.ceil(BATCHES / accumulation) * EPOCHS
    assert whole.manager.step == steps
    wanted, logged = whole.end(folder), whole.recorder.of_recipe()
    paths = sorted((folder / "saved").glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))
    assert len(paths) == steps
    for path in paths[::every]:
        step = int(path.stem.rpartition("=")[2])
        resumed = fitted(
            folder, recipe_of(name), ckpt_path=path, module=Regression(seed=3), accumulate_grad_batches=accumulation
        )
        assert_same_state(resumed.end(folder), wanted, path.name)
        assert resumed.recorder.of_recipe() == [row for row in logged if row[1] > step], path.name
        assert resumed.module.losses == whole.module.losses[-len(resumed.module.losses) :] or step == steps


# ---------------------------------------------------------------------- when the recipe is attached


@pytest.mark.parametrize("name", ["pruning", *(pytest.param(n, marks=pytest.mark.slow) for n in ("int8", "channels"))])
def test_fit_twice_goes_on_where_the_first_one_ended(name: str, tmp_path: Path) -> None:
    whole = fitted(tmp_path, recipe_of(name))
    fit = prepared(tmp_path, recipe_of(name), max_epochs=2)
    with (
        pytest.warns(SparsifyWarning, match="the Trainer ends at epoch 2 of the recipe's 4"),
        pytest.warns(SparsifyWarning, match="before the recipe was through: epoch 2 of 4"),
    ):
        fit.trainer.fit(fit.module)
    assert fit.manager.step == 2 * BATCHES and not fit.manager.attached
    fit.trainer.fit_loop.max_epochs = EPOCHS
    fit.trainer.fit(fit.module)
    # Optimizers are made anew by Lightning, so weights are others; a third time there is nothing left to do.
    for _ in range(2):
        assert fit.manager.step == EPOCHS * BATCHES and fit.manager.epoch == EPOCHS
        assert zeros(fit.module) == pytest.approx(zeros(whole.module), abs=0.02)
        assert layers(fit.module) == layers(whole.module)
        assert [p.shape for p in fit.module.parameters()] == [p.shape for p in whole.module.parameters()]
        fit.trainer.fit(fit.module)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pruning", "int8", "channels"])
def test_the_module_in_memory_goes_on_from_its_last_checkpoint(name: str, tmp_path: Path) -> None:
    whole = fitted(tmp_path, recipe_of(name)).end(tmp_path)
    saved = theirs.ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=1)
    fit = prepared(tmp_path, recipe_of(name), saved, module=Failing(at=14))
    with pytest.raises(ValueError, match="once"):
        fit.trainer.fit(fit.module)
    fit.trainer.fit(fit.module, ckpt_path="last")
    assert_same_state(fit.end(tmp_path), whole, name)


class Failing(Regression):
    """Raises once, at one step."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at: int | None = at

    def training_step(self, batch: Any, index: int) -> Any:
        if self.trainer.global_step == self.at:
            self.at = None
            raise ValueError("once")
        return super().training_step(batch, index)


@pytest.mark.parametrize("finder", ["rate", pytest.param("size", marks=pytest.mark.slow)])
@pytest.mark.parametrize("as_callback", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_search_is_no_part_of_the_run(finder: str, as_callback: bool, tmp_path: Path) -> None:
    from lightning.pytorch.tuner import Tuner

    plain = fitted(tmp_path, recipe_of("pruning"))
    if as_callback:
        given: dict[str, Any] = {"num_training_steps": 7, "update_attr": False}
        size = {"mode": "binsearch", "steps_per_trial": 2, "init_val": 2, "max_trials": 1, "margin": 0.0}
        search = theirs.LearningRateFinder(**given) if finder == "rate" else theirs.BatchSizeFinder(**size)
        fit = fitted(tmp_path, recipe_of("pruning"), search)
    else:
        fit = prepared(tmp_path, recipe_of("pruning"))
        tuner = Tuner(fit.trainer)
        if finder == "rate":
            tuner.lr_find(fit.module, num_training=7, update_attr=False)
        else:
            tuner.scale_batch_size(
                fit.module, mode="binsearch", init_val=2, max_trials=1, steps_per_trial=2, margin=0.0
            )
        assert not fit.manager.attached and zeros(fit.module) == 0
        fit.trainer.fit(fit.module)
    assert fit.manager.step == plain.manager.step
    assert all(map(torch.equal, fit.module.state_dict().values(), plain.module.state_dict().values()))


@pytest.mark.slow
def test_a_search_between_two_epochs_is_no_part_of_the_run(tmp_path: Path) -> None:
    class Between(theirs.LearningRateFinder):  # type: ignore[misc]
        def on_fit_start(self, *_: Any) -> None: ...

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                self.lr_find(trainer, pl_module)

    plain = fitted(tmp_path, recipe_of("pruning"))
    fit = fitted(tmp_path, recipe_of("pruning"), Between(num_training_steps=6, update_attr=False))
    assert fit.manager.step == plain.manager.step and zeros(fit.module) == zeros(plain.module)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["pruning", "int8"])
def test_in_every_precision(precision: Any, name: str, tmp_path: Path) -> None:
    fit = fitted(tmp_path, recipe_of(name), precision=precision)
    assert fit.manager.step == fit.trainer.global_step == EPOCHS * BATCHES
    assert name == "int8" or zeros(fit.module) == pytest.approx(0.8, abs=0.02)
    assert name == "pruning" or "QuantizedLinear" in layers(fit.module)


class ByHand(Regression):
    """Manual optimization: several optimizers, one step every `every` batches."""

    def __init__(self, *, optimizers: int = 1, every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.count, self.every = optimizers, every

    def training_step(self, batch: Any, index: int) -> Any:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        x, y = self.batch(index)
        loss = (self(x) - y).square().mean()
        self.losses.append(loss.item())
        self.manual_backward(loss)
        if (index + 1) % self.every == 0 or self.trainer.is_last_batch:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parts = [self.net[0].parameters(), self.net[2].parameters()] if self.count == 2 else [self.parameters()]
        return [torch.optim.SGD(part, lr=0.05) for part in parts]


def test_manual_optimization_steps_once_a_batch(tmp_path: Path) -> None:
    fit = fitted(tmp_path, recipe_of("pruning"), module=ByHand())
    assert fit.manager.step == EPOCHS * BATCHES and zeros(fit.module) == pytest.approx(0.8, abs=0.02)


@pytest.mark.slow
def test_manual_optimization_that_steps_more_seldom_is_counted_and_said(tmp_path: Path) -> None:
    with pytest.warns(SparsifyWarning, match=r"took 3 optimizer steps in epoch 0, .* its 5 batches"):
        fit = fitted(tmp_path, recipe_of("pruning"), module=ByHand(every=2))
    assert fit.manager.step == EPOCHS * 3 and fit.manager.epoch == EPOCHS
    fit = fitted(tmp_path, recipe_of("pruning"), module=ByHand(every=2), options={"steps_per_epoch": 3})
    assert fit.manager.step == EPOCHS * 3 and fit.manager.epoch == EPOCHS


@pytest.mark.slow
def test_several_optimizers_of_one_model(tmp_path: Path) -> None:
    fit = fitted(tmp_path, recipe_of("pruning"), module=ByHand(optimizers=2))
    assert fit.manager.step == EPOCHS * BATCHES and zeros(fit.module) == pytest.approx(0.8, abs=0.02)


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize("kind", ["tensor", "dict", "manual"])
def test_the_loss_of_distillation_is_added(kind: str, tmp_path: Path) -> None:
    recipe = built(DistillationModifier(hardness=0.5), epochs=2)
    teacher = perceptron(6, 7, 4, seed=5)

    def module() -> Any:
        return ByHand() if kind == "manual" else Regression(dictionary=kind == "dict")

    plain = prepared(tmp_path, recipe, module=module(), max_epochs=2)
    trainer_of(tmp_path, max_epochs=2).fit(plain.module)
    fit = fitted(tmp_path, recipe, module=module(), max_epochs=2, options={"distillation_teacher": teacher})

    class Called(type(fit.module)):  # type: ignore[misc]
        """The same by hand."""

        def training_step(self, batch: Any, index: int) -> Any:
            x, y = self.batch(index)
            outputs = self.net(x)
            loss = manager.update_loss((outputs - y).square().mean(), outputs=outputs, inputs=(x,))
            if kind == "manual":
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()
                return None
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer = optimizer[0] if isinstance(optimizer, list) else optimizer
            return manager.modify(self.net, optimizer, steps_per_epoch=BATCHES, distillation_teacher=teacher)

    manager = ScheduledModifierManager(recipe)
    by_hand = Called()
    trainer_of(tmp_path, max_epochs=2).fit(by_hand)
    manager.finalize()
    assert all(map(torch.equal, fit.module.state_dict().values(), by_hand.state_dict().values()))
    assert not torch.equal(fit.module.net[0].weight, plain.module.net[0].weight)


# ---------------------------------------------------------------------- how long an epoch is


class Stream(IterableDataset[Tensor]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        return iter(torch.arange(float(self.count)))


@pytest.mark.parametrize(
    ("given", "loaders", "steps"),
    [
        ({"accumulate_grad_batches": 2}, loader(5), 3),
        ({"limit_train_batches": 3}, loader(5), 3),
        ({"limit_train_batches": 0.5, "accumulate_grad_batches": 2}, loader(10), 3),
        ({"val_check_interval": 2}, loader(5), 5),
        ({}, loader(11, 2, drop_last=True), 5),
        ({"max_steps": 12, "max_epochs": -1}, loader(3), 3),
        ({"limit_train_batches": 4}, DataLoader(Stream(9)), 4),
    ],
)
@pytest.mark.slow
def test_optimizer_steps_of_an_epoch(given: dict[str, Any], loaders: Any, steps: int, tmp_path: Path) -> None:
    fit = fitted(tmp_path, recipe_of("pruning"), loaders=loaders, **given)
    assert fit.manager.step == fit.trainer.global_step == steps * EPOCHS and fit.manager.epoch == EPOCHS
    tag = next(name for name, _, _ in fit.recorder.of_recipe() if name.startswith("learning_rate"))
    assert len([row for row in fit.recorder.of_recipe() if row[0] == tag]) == steps * EPOCHS + 1


def test_a_stream_of_unknown_length_is_counted_and_said(tmp_path: Path) -> None:
    with pytest.warns(SparsifyWarning, match="the first has the resolution of a whole epoch"):
        fit = fitted(tmp_path, recipe_of("pruning"), loaders=DataLoader(Stream(3)))
    assert fit.manager.step == 12 and fit.manager.epoch == EPOCHS and zeros(fit.module) == pytest.approx(0.8, abs=0.02)


@pytest.mark.slow
def test_an_endless_stream_takes_its_epochs_from_max_steps(tmp_path: Path) -> None:
    with pytest.warns(SparsifyWarning, match="5 optimizer steps are taken for one, .* max_steps=20"):
        fit = fitted(tmp_path, recipe_of("pruning"), loaders=DataLoader(Stream(1000)), max_steps=20, max_epochs=-1)
    assert fit.manager.step == 20 and fit.manager.epoch == EPOCHS
    given = {"options": {"steps_per_epoch": 5}, "max_steps": 20, "max_epochs": -1}
    fit = fitted(tmp_path, recipe_of("pruning"), loaders=DataLoader(Stream(1000)), **given)
    assert fit.manager.step == 20 and fit.manager.epoch == EPOCHS


@pytest.mark.slow
def test_accumulation_that_changes_from_epoch_to_epoch(tmp_path: Path) -> None:
    fit = fitted(tmp_path, recipe_of("pruning"), theirs.GradientAccumulationScheduler({0: 2, 2: 1, 3: 5}))
    assert fit.manager.step == fit.trainer.global_step == 3 + 3 + 5 + 1 and fit.manager.epoch == EPOCHS


@pytest.mark.slow
@pytest.mark.parametrize(("given", "epochs"), [(None, EPOCHS), (True, EPOCHS), (False, 2)])
def test_the_trainer_gets_the_recipes_epochs_where_it_has_none(given: Any, epochs: int, tmp_path: Path) -> None:
    told = {"max_epochs": None} if given is None else {"max_epochs": 2}
    fit = prepared(tmp_path, recipe_of("pruning"), options={"set_max_epochs": given}, **told)
    if given is False:
        with (
            pytest.warns(SparsifyWarning, match="will not be through"),
            pytest.warns(SparsifyWarning, match="before the recipe was through"),
        ):
            fit.trainer.fit(fit.module)
    else:
        fit.trainer.fit(fit.module)
    assert fit.trainer.current_epoch == epochs


# ---------------------------------------------------------------------- checkpoints


def test_checkpoints_of_before_the_end_are_told_or_not_kept(tmp_path: Path) -> None:
    def best() -> Any:
        # The loss rises as more is pruned: the first is the best.
        return theirs.ModelCheckpoint(tmp_path / "best", monitor="epoch_number", save_on_train_epoch_end=True)

    class Counting(Regression):
        def on_train_epoch_end(self) -> None:
            self.log("epoch_number", float(self.trainer.current_epoch))

    with pytest.warns(SparsifyWarning, match=r"best checkpoint, .*: epoch 1 of 4, .* weights zero"):
        fit = fitted(tmp_path, recipe_of("pruning"), best(), module=Counting())
    with pytest.warns(SparsifyWarning, match="before the recipe had done its work: epoch 1 of 4"):
        fit.trainer.test(fit.module, ckpt_path="best", verbose=False)
    fit = fitted(tmp_path, recipe_of("pruning"), best(), module=Counting(), options={"best_model": "finished"})
    fit.trainer.test(fit.module, ckpt_path="best", verbose=False)
    assert zeros(fit.module) == pytest.approx(0.8, abs=0.02)
    assert "check_monitor_top_k" not in vars(fit.trainer.checkpoint_callback)


@pytest.mark.slow
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_structured_checkpoint_is_tested_and_loaded(weights_only: bool, tmp_path: Path) -> None:
    fit = fitted(tmp_path, recipe_of("all"))
    path = tmp_path / "finished.ckpt"
    fit.trainer.save_checkpoint(path, weights_only=weights_only)
    wanted = fit.module.eval()(torch.ones(2, 6))
    fresh = Regression(seed=4)
    trainer = trainer_of(tmp_path, SparsifyCallback(recipe_of("all"), distillation_teacher="self"))
    for call in (trainer.validate, trainer.test):
        call(fresh, ckpt_path=path, verbose=False)
    assert torch.equal(trainer.predict(fresh, ckpt_path=path)[0], wanted)
    assert torch.equal(fresh.eval()(torch.ones(2, 6)), wanted)

    class Loaded(Regression):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            apply_checkpoint_structure(self, checkpoint)

    loaded = Loaded.load_from_checkpoint(path, weights_only=False)
    assert torch.equal(loaded.eval()(torch.ones(2, 6)), wanted)


@pytest.mark.slow
def test_weights_of_before_do_not_fit_what_the_recipe_made(tmp_path: Path) -> None:
    fit = fitted(tmp_path, recipe_of("channels"), every_checkpoint(tmp_path / "saved"))
    first = min((tmp_path / "saved").glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))
    with (
        pytest.warns(SparsifyWarning, match="before the recipe had done its work"),
        pytest.raises(StateError, match="Give a fresh module"),
    ):
        fit.trainer.test(fit.module, ckpt_path=first, verbose=False)


def test_early_stopping_is_told(tmp_path: Path) -> None:
    stop = theirs.EarlyStopping("val_loss", patience=0, mode="max", min_delta=100.0)
    with pytest.warns(SparsifyWarning, match=r"ended because something asked it to stop .*: epoch 2 of 4"):
        fit = fitted(tmp_path, recipe_of("pruning"), stop)
    assert not fit.manager.attached


@pytest.mark.slow
def test_a_checkpoint_without_the_recipe_is_told(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_epochs=1)
    trainer.fit(Regression())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.warns(SparsifyWarning, match="holds no state of this recipe: the recipe begins at its epoch 0"):
        fit = fitted(tmp_path, recipe_of("pruning"), ckpt_path=tmp_path / "dense.ckpt", max_epochs=1 + EPOCHS)
    assert fit.manager.epoch == EPOCHS


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_weights_are_pruned(kind: str, tmp_path: Path) -> None:
    if kind == "ema" and not hasattr(theirs, "EMAWeightAveraging"):
        pytest.skip("Lightning has it from 2.6 on")
    average = (
        theirs.StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=1)
        if kind == "swa"
        else theirs.EMAWeightAveraging(decay=0.9)
    )
    recipe = built(gradual_pruning(0.0, 3.0))
    saved = theirs.ModelCheckpoint(tmp_path / "saved", save_top_k=-1)
    fit = fitted(tmp_path, recipe, average, saved)
    assert zeros(fit.module) == pytest.approx(0.8, abs=0.02)
    for path in (tmp_path / "saved").glob("*.ckpt"):
        held = torch.load(path, weights_only=False)
        share = held["sparsify"][""]["progress"]["sparsity"]
        weights = [v for name, v in held["state_dict"].items() if name.endswith("weight")]
        assert float(sum((w == 0).sum() for w in weights)) / sum(w.numel() for w in weights) >= share - 0.02
    if kind == "ema":
        with pytest.raises(StateError, match="pairs the module's tensors with those of a copy"):
            fitted(tmp_path, recipe_of("int8"), theirs.EMAWeightAveraging(decay=0.9))


@pytest.mark.slow
def test_two_processes_train_and_resume(tmp_path: Path) -> None:
    # 10 samples in batches of 2 for two processes: 3 steps an epoch in each.
    def trained(folder: Path, **given: Any) -> Any:
        fit = prepared(tmp_path, recipe_of("pruning"), every_checkpoint(folder), strategy="ddp_fork", devices=2)
        fit.trainer.fit(fit.module, **given)
        last = max(folder.glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))
        return torch.load(last, weights_only=False)

    whole = trained(tmp_path / "whole")
    assert whole["global_step"] == whole["sparsify"][""]["manager"]["step"] == 3 * EPOCHS
    assert whole["sparsify"][""]["progress"]["finished"]
    resumed = trained(tmp_path / "resumed", ckpt_path=next((tmp_path / "whole").glob("*step=6.ckpt")))
    assert_same_state(resumed["state_dict"], whole["state_dict"], "resumed")


# ---------------------------------------------------------------------- interruptions


@pytest.mark.slow
def test_an_exception_leaves_a_usable_model_and_a_whole_checkpoint(tmp_path: Path) -> None:
    wanted = fitted(tmp_path, recipe_of("all")).end(tmp_path)
    saved = theirs.OnExceptionCheckpoint(tmp_path)
    fit = prepared(tmp_path, recipe_of("all"), saved, module=Failing(at=12))
    with pytest.raises(ValueError, match="once"):
        fit.trainer.fit(fit.module)
    assert not fit.manager.attached
    fit.module(torch.ones(2, 6))
    resumed = fitted(tmp_path, recipe_of("all"), ckpt_path=tmp_path / "on_exception.ckpt", module=Regression(seed=2))
    assert_same_state(resumed.end(tmp_path), wanted, "after an exception")


@pytest.mark.slow
def test_a_killed_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import importlib.util, sys
            from pathlib import Path
            sys.path.insert(0, {str(root)!r})
            spec = importlib.util.spec_from_file_location("t", {__file__!r})
            t = importlib.util.module_from_spec(spec); sys.modules["t"] = t; spec.loader.exec_module(t)
            folder = Path({str(tmp_path)!r})
            t.fitted(folder, t.recipe_of("all"), t.every_checkpoint(folder / "saved"))
            """
        )
    )
    running = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": str(root)})
    try:
        for _ in range(6000):
            if len(list((tmp_path / "saved").glob("*.ckpt"))) >= 13 or running.poll() is not None:
                break
            signal.sigtimedwait([], 0.02)
        running.send_signal(signal.SIGKILL)
    finally:
        running.kill()
        running.wait()
    last = max((tmp_path / "saved").glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]))
    wanted = fitted(tmp_path, recipe_of("all")).end(tmp_path)
    resumed = fitted(tmp_path, recipe_of("all"), ckpt_path=last, module=Regression(seed=2))
    assert_same_state(resumed.end(tmp_path), wanted, last.name)


# ---------------------------------------------------------------------- what is refused, and names


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"model": ""}, ArgumentError, "is no name of a submodule"),
        ({"best_model": "last"}, ArgumentError, 'neither "any" nor "finished"'),
        ({"steps_per_epoch": 0}, ArgumentError, "steps_per_epoch: 0 is not a positive int"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparsifyCallback(recipe_of("pruning"), **given)


def test_the_model_may_be_a_submodule_and_what_cannot_be_is_refused_before_training(tmp_path: Path) -> None:
    recipe = built(gradual_pruning(0.0, 1.0, params=["0.weight"]), epochs=1)
    fit = fitted(tmp_path, recipe, options={"model": "net"}, max_epochs=1)
    assert (fit.module.net[0].weight == 0).float().mean() == pytest.approx(0.8, abs=0.01)
    assert zeros(fit.module.net[2]) == 0
    with pytest.raises(TargetError, match=r"has no submodule 'nett'\. Did you mean 'net'"):
        fitted(tmp_path, recipe, options={"model": "nett"})

    class Mute(Regression):
        forward = lightning.LightningModule.forward

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(self.batch(index)[0]).square().mean()

        validation_step = None

    with pytest.raises(ArgumentError, match=r"has no forward\(\): name the submodule .*model='net'"):
        fitted(tmp_path, recipe_of("int8"), module=Mute())
    assert fitted(tmp_path, recipe_of("pruning"), module=Mute()).manager.epoch == EPOCHS


@pytest.mark.slow
def test_the_trainer_of_the_other_name_takes_it_too(tmp_path: Path) -> None:
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = perceptron(6, 10, 4)

        def training_step(self, batch: Any, index: int) -> Any:
            return self.net(torch.ones(2, 6)).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = SparsifyCallback(recipe_of("pruning"))
    trainer = other.Trainer(
        max_epochs=EPOCHS, callbacks=[callback], logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    module = Module()
    trainer.fit(module, loader(5))
    assert zeros(module) == pytest.approx(0.8, abs=0.02) and callback.manager.step == 20


def test_numbers_go_to_the_trainers_loggers(tmp_path: Path) -> None:
    callback = SparsifyCallback(recipe_of("pruning"))
    trainer_of(tmp_path, callback, recorder=CSVLogger(tmp_path)).fit(Regression())
    text = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "sparsity/net.0.weight" in text and "learning_rate/group_0" in text


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    spec = importlib.util.spec_from_file_location("without", sys.modules[SparsifyCallback.__module__].__file__ or "")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=r'pip install "sparsify-recipes\[lightning\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.slow
def test_the_page_on_lightning_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text()
    space: dict[str, Any] = {}
    count = 0
    for kind, name, text in re.findall(r"^```(\w+) ?(\S*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        if name:
            Path(name).write_text(text)
        elif kind == "py":
            exec(compile(text, "docs/lightning.md", "exec"), space)
            count += 1
    assert count == 4 and space["manager"].epoch == 6.0
