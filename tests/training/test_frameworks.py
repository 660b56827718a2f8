"""Training loops that are not the user's own: Lightning's and transformers' (promise 2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import gradual_pruning
from tests.zoo.small import perceptron

# The frameworks warn about much of their own.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def exact(model: nn.Sequential) -> bool:
    return (int((model[0].weight == 0).sum()), int((model[2].weight == 0).sum())) == (43, 29)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_lightning_counts_every_step(accumulation: int, precision: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = perceptron(6, 9, 4)
            self.manager = ScheduledModifierManager([gradual_pruning()])

        def training_step(self, batch: Any, index: int) -> Any:
            return self.manager.update_loss(self.model(batch[0]).square().mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
            optimizer = self.manager.modify(self.model, optimizer, steps_per_epoch=8 // accumulation)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 6)), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        precision=precision,
        accumulate_grad_batches=accumulation,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader)
    assert module.manager.step == trainer.global_step == 24 // accumulation
    assert module.manager.epoch == 3.0 and exact(module.model)
    module.manager.finalize(module.model)


def test_lightning_computes_forward_inside_the_step_and_quantizes_all_the_same(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = perceptron(6, 9, 4)
            # Without sample_inputs: the trace waits for a forward, which comes after the step has begun.
            self.manager = ScheduledModifierManager([QuantizationModifier(start_epoch=1.0)])

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.manager.modify(self.model, optimizer, steps_per_epoch=4)

    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 6)), batch_size=4)
    lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(module, loader)
    assert module.manager.step == 8
    assert "QuantizedLinear" in {type(layer).__name__ for layer in module.model.modules()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_of_transformers_counts_every_step(accumulation: int, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = perceptron(6, 9, 4)

        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            outputs = self.layers(x)
            return {"loss": outputs.square().mean(), "logits": outputs}

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager([gradual_pruning()])
    manager.modify(model, optimizer, steps_per_epoch=8 // accumulation)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"x": torch.randn(6), "labels": torch.zeros(())} for _ in range(32)]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    assert manager.step == trainer.state.global_step == 24 // accumulation
    assert manager.epoch == 3.0 and exact(model.layers)
