"""The callback for the Trainer of transformers: one line, and stopped and resumed is never stopped."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import ArgumentError, SparsifyWarning, StateError
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.learning_rate import LearningRateFunctionModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.sparsification_logging import SparsificationLoggingModifier
from sparsify.quantization.plan import is_quantized
from tests.loops import assert_same_state, channel_pruning, gradual_pruning

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sparsify.integrations.transformers import SparsifyCallback, SparsifyTrainerMixin  # noqa: E402

# transformers and accelerate warn about much of their own; our warnings stay errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::sparsify.errors.SparsifyWarning"),
]

ROWS, BATCH, GROUP, EPOCHS = 26, 4, 3, 4
STEPS = 3
"""26 rows are 7 batches: two groups of three and a last one of one."""


def bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    return transformers.BertForSequenceClassification(config)


def sentences(count: int = ROWS) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 40, (8,), generator=draw) for _ in range(count)]
    return [{"input_ids": one, "labels": int(one.sum() % 2)} for one in ids]


class Pictures(nn.Module):
    """A small network with norms, called as the Trainer calls models."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(32, 2)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.head(nn.functional.dropout(self.body(pixels), 0.1, self.training))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def pictures(count: int = ROWS) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(2)
    rows = [torch.randn(1, 6, 6, generator=draw) for _ in range(count)]
    return [{"pixels": one, "labels": int(one.mean() > 0)} for one in rows]


def arguments_of(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": GROUP,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }


def arguments(folder: Path, **changed: Any) -> Any:
    return transformers.TrainingArguments(**{**arguments_of(folder), **changed})


ALL = [EpochRangeModifier(end_epoch=float(EPOCHS)), SparsificationLoggingModifier(update_frequency=0.5)]
PRUNED = [*ALL, gradual_pruning(0.0, 2.0, 0.3)]
QUANTIZED = [*ALL, QuantizationModifier(start_epoch=1.3, disable_quantization_observer_epoch=3.0)]
REMOVED = [*ALL, channel_pruning(params=["re:body.*weight"], start_epoch=0.0, end_epoch=1.3, shrink=True)]
TOGETHER = [
    *REMOVED,
    gradual_pruning(1.4, 2.5, 0.3, params=["head.weight"]),
    QuantizationModifier(start_epoch=2.7, disable_quantization_observer_epoch=3.3),
    LearningRateFunctionModifier(lr_func="cosine", init_lr=0.02, final_lr=0.001, start_epoch=1.0, end_epoch=3.5),
    DistillationModifier(hardness=0.4, start_epoch=0.5, end_epoch=3.0),
]
RECIPES: dict[str, tuple[list[Modifier], Callable[[int], Any], Callable[[], Any]]] = {
    "pruned": (PRUNED, bert, sentences),
    "int8": (QUANTIZED, bert, sentences),
    "pruned, int8": ([*PRUNED, QUANTIZED[-1]], bert, sentences),
    "channels removed": (REMOVED, Pictures, pictures),
    "all together": (TOGETHER, Pictures, pictures),
}


def trained(
    folder: Path,
    modifiers: list[Modifier],
    model: Any,
    rows: Any,
    resume: Any = None,
    kind: Any = None,
    options: dict[str, Any] | None = None,
    **changed: Any,
) -> tuple[Any, SparsifyCallback]:
    callback = SparsifyCallback(modifiers, **(options or {}))
    trainer = (kind or transformers.Trainer)(
        model=model, args=arguments(folder, **changed), train_dataset=rows, callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def states(folder: Path, last: int) -> dict[str, Any]:
    """What is in a checkpoint: the manager, the optimizer, the weights, the log."""
    from safetensors.torch import load_file

    at = folder / f"checkpoint-{last}"
    log = json.loads((at / "trainer_state.json").read_text())["log_history"]
    return {
        "sparsify": torch.load(at / "sparsify.pt", weights_only=True),
        "optimizer": torch.load(at / "optimizer.pt", weights_only=True),
        "weights": load_file(at / "model.safetensors"),
        "log": [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in log],
    }


def resumed_equals(folder: Path, name: str, steps: Iterator[int] | range) -> None:
    modifiers, model, data = RECIPES[name]
    options = {"distillation_teacher": "self"} if any(m.kind == "distillation" for m in modifiers) else {}
    trainer, callback = trained(folder / "whole", modifiers, model(0), data(), options=options)
    last = EPOCHS * STEPS
    assert trainer.state.global_step == callback.manager.step == last and callback.manager.epoch == EPOCHS
    wanted = states(folder / "whole", last)
    final = trainer.model.state_dict()
    for step in steps:
        at = folder / f"from-{step}"
        shutil.copytree(folder / "whole" / f"checkpoint-{step}", at / f"checkpoint-{step}")
        trainer, _ = trained(at, modifiers, model(step + 1), data(), resume=True, options=options)
        assert_same_state(states(at, last), wanted, f"{name}, resumed at step {step}")
        assert_same_state(trainer.model.state_dict(), final, f"{name}, resumed at step {step}")


def test_one_line_trains_counts_logs_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    resumed_equals(tmp_path, "all together", range(5, 6))


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_resumed_at_any_checkpoint_it_is_the_run_that_never_stopped(name: str, tmp_path: Path) -> None:
    resumed_equals(tmp_path, name, range(1, EPOCHS * STEPS))


def zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


def head_of(model: Any) -> torch.Tensor:
    return model.head.weight.detach()


@pytest.mark.slow
def test_steps_are_counted_as_the_trainer_counts_them(tmp_path: Path) -> None:
    # (rows, arguments, optimizer steps an epoch): groups with a remainder, without, dropped rows, one group alone.
    table = [
        (26, {}, 3),
        (24, {}, 2),
        (26, {"dataloader_drop_last": True}, 2),
        (26, {"gradient_accumulation_steps": 1}, 7),
        (5, {"gradient_accumulation_steps": 8}, 1),
    ]
    for number, (rows, changed, steps) in enumerate(table):
        data = pictures(rows)
        given = {"save_strategy": "no", "num_train_epochs": 2, **changed}
        trainer, callback = trained(tmp_path / str(number), [gradual_pruning(0.0, 1.5)], Pictures(), data, **given)
        assert trainer.state.global_step == callback.manager.step == 2 * steps, changed
        assert callback.manager.epoch == 2.0
        assert zeros(head_of(trainer.model)) == pytest.approx(0.8, abs=0.01)


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from pictures(10)


@pytest.mark.slow
def test_data_without_a_length_get_the_epochs_of_the_recipe(tmp_path: Path) -> None:
    given = {"save_strategy": "no", "max_steps": 9, "gradient_accumulation_steps": 1}
    trainer, callback = trained(tmp_path, PRUNED, Pictures(), Stream(), **given)
    assert trainer.state.global_step == 9 and callback.manager.epoch == 4.5
    assert zeros(head_of(trainer.model)) == pytest.approx(0.8, abs=0.01)
    options = {"steps_per_epoch": 3}
    with pytest.warns(SparsifyWarning, match=r"max_epochs=4, 12 optimizer steps of 3 .* max_steps=9, 9 steps"):
        _, callback = trained(tmp_path, PRUNED, Pictures(), Stream(), options=options, **given)
    assert callback.manager.epoch == 3.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("epochs", "message"),
    [
        (3, r"max_epochs=4, 12 optimizer steps of 3 an epoch; .* num_train_epochs=3, 9 steps: it ends in epoch 3"),
        (6, r"num_train_epochs=6, 18 steps: from epoch 4 on nothing changes"),
    ],
)
def test_a_training_of_another_length_than_the_recipe_is_said_with_both(
    epochs: int, message: str, tmp_path: Path
) -> None:
    with pytest.warns(SparsifyWarning, match=message):
        trained(tmp_path, PRUNED, Pictures(), pictures(), num_train_epochs=epochs, save_strategy="no")


@pytest.mark.slow
def test_train_called_twice_goes_on_and_holds_what_there_is(tmp_path: Path) -> None:
    for name in ("pruned", "channels removed", "all together"):
        modifiers = RECIPES[name][0]
        options = {"distillation_teacher": "self"} if name == "all together" else {}
        trainer, callback = trained(tmp_path, modifiers, Pictures(), pictures(), options=options)
        before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.train()
        after = trainer.model.state_dict()
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[key], after[key]) for key in before), "it trained"
        for key, value in after.items():
            assert value.shape == before[key].shape
            if key.endswith("weight") and value.dim() > 1:
                assert torch.equal(value == 0, before[key] == 0), (name, key)
        assert not callback.manager.attached


@pytest.mark.slow
def test_training_twice_goes_on_with_quantized_layers(tmp_path: Path) -> None:
    trainer, callback = trained(tmp_path, QUANTIZED, Pictures(), pictures(), save_strategy="no")
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert before.keys() == after.keys() and is_quantized(trainer.model) and callback.manager.epoch == 8.0
    # Ranges were frozen at epoch 3 and stay so.
    assert all(torch.equal(after[key], before[key]) for key in after if key.endswith((".low", ".high")))


@pytest.mark.slow
def test_a_stopped_run_is_taken_up_by_the_next_train(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    stop, callback = Stop(), SparsifyCallback(PRUNED)
    trainer = transformers.Trainer(
        model=Pictures(),
        args=arguments(tmp_path, num_train_epochs=4, save_strategy="no"),
        train_dataset=pictures(),
        callbacks=[callback, stop],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not callback.manager.attached and callback.manager.step == 4
    assert 0.1 < zeros(head_of(trainer.model)) < 0.8, "finalized, usable"
    trainer.remove_callback(stop)
    trainer.train()
    assert callback.manager.step == 16 and zeros(head_of(trainer.model)) == pytest.approx(0.8, abs=0.01)


@pytest.mark.slow
def test_a_smaller_batch_after_running_out_of_memory_begins_anew(tmp_path: Path) -> None:
    class Small(transformers.Trainer):  # type: ignore[name-defined, misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs["labels"]) > 8 and self.state.global_step >= 1:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            return super().compute_loss(model, inputs, *args, **kwargs)

    given = {
        "auto_find_batch_size": True,
        "per_device_train_batch_size": 9,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
    }
    modifiers = [*PRUNED, QuantizationModifier(start_epoch=0.0)]
    trainer, callback = trained(tmp_path, modifiers, Pictures(), pictures(), kind=Small, **given)
    assert trainer.state.global_step == callback.manager.step and callback.manager.epoch == 4.0
    assert trainer.state.max_steps > 8, "a smaller batch was taken"
    assert zeros(head_of(trainer.model)) == pytest.approx(0.8, abs=0.01) and is_quantized(trainer.model)


@pytest.mark.slow
def test_every_trial_of_a_search_begins_with_its_own_model(tmp_path: Path) -> None:
    callback = SparsifyCallback([*PRUNED, QUANTIZED[-1]])
    trainer = transformers.Trainer(
        model_init=lambda: Pictures(),
        args=arguments(tmp_path, save_strategy="no"),
        train_dataset=pictures(),
        callbacks=[callback],
    )
    ends = []
    for _ in range(2):
        trainer.train()
        assert callback.manager.step == EPOCHS * STEPS
        ends.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    assert_same_state(ends[0], ends[1], "the same run twice")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Trainer", "Seq2SeqTrainer"])
def test_the_loss_of_a_subclass_is_what_the_recipe_adds_to(kind: str, tmp_path: Path) -> None:
    losses: list[float] = []

    class Own(getattr(transformers, kind)):  # type: ignore[misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(**inputs)
            loss = outputs["loss"] * 0.0 + 3.0
            return (loss, outputs) if return_outputs else loss

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss) * (1 if self.current_gradient_accumulation_steps == 1 else GROUP))
            return loss

    given: dict[str, Any] = {"save_strategy": "no", "num_train_epochs": 1}
    args = arguments(tmp_path, **given)
    if kind == "Seq2SeqTrainer":
        args = transformers.Seq2SeqTrainingArguments(**{**arguments_of(tmp_path), **given})
    teacher = Pictures(seed=9)
    callback = SparsifyCallback(
        [DistillationModifier(hardness=0.5, start_epoch=0.0, end_epoch=1.0)], distillation_teacher=teacher
    )
    Own(model=Pictures(), args=args, train_dataset=pictures(), callbacks=[callback]).train()
    # Half of 3, and half of a divergence that is small beside it.
    assert all(1.5 < loss < 2.5 for loss in losses), losses


@pytest.mark.slow
def test_what_a_recipe_adds_is_divided_as_the_loss_of_the_task_is(tmp_path: Path) -> None:
    """With `compute_loss_func` the task's loss is divided by all items of a group at once, and not again."""

    def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum")
        return loss / (num_items_in_batch if num_items_in_batch is not None else len(labels))

    ends = []
    for batch, group in ((12, 1), (4, 3)):
        torch.manual_seed(0)
        model = nn.ModuleDict({"head": nn.Linear(36, 2)})
        model.forward = lambda pixels, labels=None, m=model: {"logits": m["head"](pixels.flatten(1))}
        callback = SparsifyCallback(
            [DistillationModifier(hardness=0.5, start_epoch=0.0, end_epoch=1.0)],
            distillation_teacher=_Flat(torch.nn.Linear(36, 2)),
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments(
                tmp_path,
                save_strategy="no",
                num_train_epochs=1,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=group,
                optim="sgd",
                max_grad_norm=0.0,
            ),
            train_dataset=pictures(24),
            callbacks=[callback],
            compute_loss_func=summed,
        )
        trainer.train()
        ends.append(model["head"].weight.detach().clone())
    torch.testing.assert_close(ends[0], ends[1])


class _Flat(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        nn.init.constant_(head.weight, 0.1)
        nn.init.constant_(head.bias, 0.0)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.head(pixels.flatten(1))}


def worsening() -> Callable[[Any], dict[str, float]]:
    """A metric that falls from one evaluation to the next."""
    count = itertools.count()
    return lambda _: {"quality": -float(next(count))}


def best_of(
    folder: Path, modifiers: list[Modifier], model: Any, *more: Any, changed: Any = None, **options: Any
) -> Any:
    callback = SparsifyCallback(modifiers, **options)
    given = {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "load_best_model_at_end": True,
        "metric_for_best_model": "quality",
        "greater_is_better": True,
        **(changed or {}),
    }
    trainer = transformers.Trainer(
        model=model,
        args=arguments(folder, **given),
        train_dataset=pictures(),
        eval_dataset=pictures(8),
        compute_metrics=worsening(),
        callbacks=[callback, *more],
    )
    trainer.train()
    return trainer


def test_the_best_model_is_one_where_the_recipe_has_done_its_work(tmp_path: Path) -> None:
    # Through at epoch 2: the evaluations after epochs 2, 3 and 4 compete, and the first of them is the best.
    trainer = best_of(tmp_path, PRUNED, Pictures())
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{2 * STEPS}")
    assert zeros(head_of(trainer.model)) == pytest.approx(0.8, abs=0.01)
    wanted = states(tmp_path, 2 * STEPS)["weights"]
    assert_same_state(dict(trainer.model.state_dict()), wanted, "the weights of that checkpoint")


@pytest.mark.slow
def test_a_best_model_from_before_is_warned_about_with_epoch_and_sparsity(tmp_path: Path) -> None:
    with pytest.warns(
        SparsifyWarning, match=r"is of epoch 1, before the recipe was through at epoch 2: its sparsity is 0\.68"
    ):
        trainer = best_of(tmp_path, PRUNED, Pictures(), best_model="any")
    wanted = states(tmp_path, STEPS)["weights"]
    assert_same_state(dict(trainer.model.state_dict()), wanted, "masks and weights of that moment")


@pytest.mark.slow
def test_a_best_model_from_before_quantization_is_float_again(tmp_path: Path) -> None:
    with pytest.warns(SparsifyWarning, match=r"is of epoch 1, before the recipe was through at epoch 1\.3"):
        trainer = best_of(tmp_path, QUANTIZED, Pictures(), best_model="any")
    assert not is_quantized(trainer.model)
    assert_same_state(dict(trainer.model.state_dict()), states(tmp_path, STEPS)["weights"], "float")


@pytest.mark.slow
def test_a_best_model_with_channels_that_are_gone_is_refused(tmp_path: Path) -> None:
    with pytest.warns(
        SparsifyWarning, match=r"cannot be loaded into the model as it is at epoch 4, so the last weights"
    ):
        trainer = best_of(tmp_path, REMOVED, Pictures(), best_model="any")
    assert_same_state(dict(trainer.model.state_dict()), states(tmp_path, 4 * STEPS)["weights"], "the last")


@pytest.mark.slow
def test_no_best_model_after_the_work_is_said(tmp_path: Path) -> None:
    class Skip(transformers.TrainerCallback):  # type: ignore[name-defined, misc]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate &= state.epoch < 3.5

    with pytest.warns(SparsifyWarning, match=r"no checkpoint was evaluated and saved after .* epoch 3.5"):
        best_of(tmp_path, [EpochRangeModifier(end_epoch=4.0), gradual_pruning(0.0, 3.5)], Pictures(), Skip())


@pytest.mark.slow
def test_early_stopping_waits_for_the_recipe_and_where_it_does_not_it_is_told(tmp_path: Path) -> None:
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    trainer = best_of(tmp_path / "waits", PRUNED, Pictures(), stop)
    assert trainer.state.global_step == 3 * STEPS, "the best after epoch 2, worse after 3"
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    modifiers = [EpochRangeModifier(end_epoch=4.0), gradual_pruning(0.0, 4.0)]
    with pytest.warns(SparsifyWarning) as said:
        best_of(tmp_path / "told", modifiers, Pictures(), stop, best_model="any")
    assert any("before the recipe was through at epoch 4" in str(one.message) for one in said)


@pytest.mark.slow
def test_a_callback_that_is_added_later_does_the_same(tmp_path: Path) -> None:
    modifiers, model, data = RECIPES["channels removed"]
    trained(tmp_path / "whole", modifiers, model(0), data())
    wanted = states(tmp_path / "whole", EPOCHS * STEPS)
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "later" / "checkpoint-5")
    trainer = transformers.Trainer(model=model(1), args=arguments(tmp_path / "later"), train_dataset=data())
    trainer.add_callback(SparsifyCallback(modifiers))
    trainer.train(resume_from_checkpoint=True)
    assert_same_state(states(tmp_path / "later", EPOCHS * STEPS), wanted, "added later")


@pytest.mark.slow
def test_the_mixin_hands_over_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsify.integrations import transformers as module

    monkeypatch.setattr(module, "trainer_with", lambda callback: None)

    class Own(SparsifyTrainerMixin, transformers.Trainer):  # type: ignore[name-defined, misc]
        pass

    _, callback = trained(tmp_path, PRUNED, Pictures(), pictures(), kind=Own, save_strategy="no")
    assert callback.manager.epoch == EPOCHS
    with pytest.raises(StateError, match="did not find the Trainer"):
        trained(tmp_path, PRUNED, Pictures(), pictures(), save_strategy="no")


@pytest.mark.slow
def test_a_checkpoint_without_the_managers_state_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, PRUNED, Pictures(), pictures(), save_steps=4)
    (tmp_path / "checkpoint-8" / "sparsify.pt").unlink()
    model = Pictures()
    with pytest.raises(StateError, match=r"checkpoint-8 was written without SparsifyCallback"):
        trained(tmp_path, PRUNED, model, pictures(), resume=str(tmp_path / "checkpoint-8"))


@pytest.mark.slow
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path) -> None:
    trained(tmp_path, PRUNED, Pictures(), pictures(), save_steps=3)
    wanted = states(tmp_path, 12)
    shutil.rmtree(tmp_path / "checkpoint-12")
    state = tmp_path / "checkpoint-9" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    with pytest.warns(SparsifyWarning, match=r"checkpoint-9 in .* not written to its end; .* from checkpoint-6"):
        trained(tmp_path, PRUNED, Pictures(3), pictures(), save_steps=3, resume=True)
    assert_same_state(states(tmp_path, 12), wanted, "resumed from 6")


@pytest.mark.slow
def test_old_checkpoints_go_with_their_state(tmp_path: Path) -> None:
    trained(tmp_path, PRUNED, Pictures(), pictures(), save_total_limit=2)
    assert sorted(path.parent.name for path in tmp_path.rglob("sparsify.pt")) == ["checkpoint-11", "checkpoint-12"]


@pytest.mark.slow
def test_the_finished_model_is_exported_and_verified_on_request(tmp_path: Path) -> None:
    options = {"export_path": tmp_path / "model.onnx"}
    trainer, callback = trained(tmp_path, QUANTIZED, Pictures(), pictures(), options=options, save_strategy="no")
    assert (tmp_path / "model.onnx").exists() and callback.exported is not None
    assert callback.verification.ok and trainer.model.training


@pytest.mark.slow
def test_what_is_logged_are_the_sparsity_and_the_learning_rate_in_force(tmp_path: Path) -> None:
    rates = LearningRateFunctionModifier(
        lr_func="linear", init_lr=0.12, final_lr=0.0, start_epoch=0.0, end_epoch=float(EPOCHS)
    )
    modifiers = [*PRUNED, rates]
    trainer, _ = trained(tmp_path, modifiers, Pictures(), pictures(), save_strategy="no")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [round(entry["learning_rate"], 6) for entry in entries] == [round(0.12 - 0.01 * i, 6) for i in range(12)]
    sparsity = [entry["sparsity"] for entry in entries]
    assert sparsity == sorted(sparsity) and sparsity[-1] == pytest.approx(0.8, abs=0.01)
    assert sum("zeros/model" in entry for entry in entries) >= 7, "those of SparsificationLoggingModifier"


def test_a_wrong_choice_of_best_model_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"best_model: 'last' is neither"):
        SparsifyCallback(PRUNED, best_model="last")  # type: ignore[arg-type]


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import pytest, torch
torch.set_num_threads(1)
import importlib.util
spec = importlib.util.spec_from_file_location("tests_of_the_trainer", {file!r})
here = importlib.util.module_from_spec(spec)
spec.loader.exec_module(here)
from pathlib import Path
import transformers

class Kill(transformers.TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)

modifiers, model, data = here.RECIPES["all together"]
callback = here.SparsifyCallback(modifiers, distillation_teacher="self")
trainer = transformers.Trainer(
    model=model({seed}), args=here.arguments(Path({folder!r})), train_dataset=data(), callbacks=[callback, Kill()]
)
trainer.train(resume_from_checkpoint={resume})
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])

    def run(folder: str, **given: Any) -> int:
        text = KILLED.format(root=root, file=__file__, folder=str(tmp_path / folder), **given)
        command = [sys.executable, "-W", "ignore", "-c", text]
        return subprocess.run(command, capture_output=True, check=False, timeout=600).returncode

    assert run("whole", step=-1, seed=0, resume=False) == 0
    wanted = states(tmp_path / "whole", EPOCHS * STEPS)
    assert run("killed", step=6, seed=0, resume=False) == -signal.SIGKILL
    # As if it had been killed while it wrote the last one.
    (tmp_path / "killed" / "checkpoint-6" / "trainer_state.json").unlink()
    assert run("killed", step=9, seed=1, resume=True) == -signal.SIGKILL
    assert run("killed", step=-1, seed=2, resume=True) == 0
    assert_same_state(states(tmp_path / "killed", EPOCHS * STEPS), wanted, "killed twice")


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_precision_and_checkpointed_activations_change_nothing_else(changed: dict[str, Any], tmp_path: Path) -> None:
    trainer, callback = trained(tmp_path / "whole", RECIPES["pruned, int8"][0], bert(), sentences(), **changed)
    assert callback.manager.epoch == EPOCHS and is_quantized(trainer.model)
    wanted = states(tmp_path / "whole", EPOCHS * STEPS)
    for step in (3, 7):
        at = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", at / f"checkpoint-{step}")
        trained(at, RECIPES["pruned, int8"][0], bert(step), sentences(), resume=True, **changed)
        assert_same_state(states(at, EPOCHS * STEPS), wanted, (changed, step))


@pytest.mark.slow
def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def masked_lm(seed: int) -> Any:
        torch.manual_seed(seed)
        return transformers.BertForMaskedLM(bert().config)

    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in sentences()]
    trainer, _ = trained(tmp_path / "whole", PRUNED, masked_lm(0), rows)
    model = trainer.model
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    wanted = states(tmp_path / "whole", EPOCHS * STEPS)
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "from" / "checkpoint-5")
    trained(tmp_path / "from", PRUNED, masked_lm(1), rows, resume=True)
    assert_same_state(states(tmp_path / "from", EPOCHS * STEPS), wanted, "tied")


@pytest.mark.slow
def test_resuming_in_the_same_process_finds_int8_layers(tmp_path: Path) -> None:
    trainer, _ = trained(tmp_path, QUANTIZED, Pictures(), pictures())
    wanted = states(tmp_path, EPOCHS * STEPS)
    for step in (2, 8):
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_state(states(tmp_path, EPOCHS * STEPS), wanted, step)


@pytest.mark.slow
def test_compiled_models_are_distilled_and_quantized(tmp_path: Path) -> None:
    modifiers = [*QUANTIZED, DistillationModifier(hardness=0.4, start_epoch=0.0, end_epoch=3.0)]
    given = {"torch_compile": True, "torch_compile_backend": "eager", "save_strategy": "no"}
    options = {"distillation_teacher": Pictures(7)}
    trainer, callback = trained(tmp_path, modifiers, Pictures(), pictures(), options=options, **given)
    assert callback.manager.epoch == EPOCHS and is_quantized(trainer.model)
