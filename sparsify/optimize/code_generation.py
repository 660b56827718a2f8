"""Generates the lines that a recipe needs in a training loop, and a whole training script that runs as it is."""

from __future__ import annotations

import keyword
import re
from string import Template
from typing import Literal, get_args

from sparsify.errors import ArgumentError, did_you_mean

__all__ = ["Framework", "integration_code", "training_script"]

Framework = Literal["torch", "accelerate", "lightning", "transformers"]


def integration_code(recipe: str = "recipe.yaml", *, framework: Framework = "torch") -> str:
    """The lines to add to a training loop that exists: Python, with the names that such loops usually have.

    Args:
        recipe: the path of the recipe file as the code is to name it.
        framework: whose loop it is.

    Raises:
        ArgumentError: no such framework.

    >>> print(integration_code().splitlines()[0])
    from sparsify import ScheduledModifierManager, export_onnx, verify_onnx
    """
    if framework not in _INTEGRATIONS:
        known = get_args(Framework)
        raise ArgumentError(
            f"framework: {framework!r} is none of {', '.join(known)}.{did_you_mean(str(framework), known)}"
        )
    return Template(_INTEGRATIONS[framework]).substitute(recipe=repr(str(recipe)))


def training_script(
    recipe: str = "recipe.yaml",
    *,
    model: str = "my_package.models:build",
    data: str = "my_package.data:loaders",
    optimizer: str = "SGD",
    learning_rate: float = 0.1,
    loss: str = "cross_entropy",
) -> str:
    """A complete script that trains by the recipe, can be stopped and resumed, exports, verifies and benchmarks.

    Args:
        recipe: the path of the recipe file, as the script's default.
        model: "package.module:function" that builds the model.
        data: "package.module:function" that gives (training batches, test batches), each an iterable of
            (inputs, labels) that has a length.
        optimizer: a class of torch.optim.
        learning_rate: where it starts; learning-rate modifiers of the recipe take over.
        loss: a function of torch.nn.functional, of outputs and labels.

    Raises:
        ArgumentError: a reference that is none, an optimizer or a loss that torch does not have.
    """
    import torch
    from torch.nn import functional

    for name, reference in (("model", model), ("data", data)):
        check_reference(reference, name)
    if not (isinstance(optimizer, str) and isinstance(getattr(torch.optim, optimizer, None), type)):
        known = [n for n in dir(torch.optim) if n[0].isupper()]
        raise ArgumentError(f"optimizer: torch.optim has no {optimizer!r}.{did_you_mean(str(optimizer), known)}")
    if not (isinstance(loss, str) and callable(getattr(functional, loss, None))):
        known = [n for n in dir(functional) if not n.startswith("_")]
        raise ArgumentError(f"loss: torch.nn.functional has no {loss!r}.{did_you_mean(str(loss), known)}")
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, int | float) or not 0 < learning_rate < 1e6:
        raise ArgumentError(f"learning_rate: {learning_rate!r} is no learning rate; give a number above 0.")
    extra = ", momentum=0.9" if optimizer == "SGD" else ""
    return Template(_SCRIPT).substitute(
        recipe=repr(str(recipe)),
        model=repr(model),
        data=repr(data),
        optimizer=optimizer,
        extra=extra,
        learning_rate=repr(float(learning_rate)),
        loss=loss,
    )


def check_reference(reference: str, what: str) -> tuple[str, str]:
    """(module, attribute path) of "package.module:function".

    Raises:
        ArgumentError: it is not written like that.
    """
    match = re.fullmatch(r"([\w.]+):([\w.]+)", reference) if isinstance(reference, str) else None
    parts = [part for side in match.groups() for part in side.split(".")] if match else []
    if match is None or not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        raise ArgumentError(f"{what}: {reference!r} is not written as package.module:function.")
    return match.group(1), match.group(2)


_INTEGRATIONS: dict[str, str] = {
    "torch": """from sparsify import ScheduledModifierManager, export_onnx, verify_onnx
import os
import torch

# After the model, its optimizer and the loader are built:
manager = ScheduledModifierManager.from_yaml($recipe)
optimizer = manager.modify(model, optimizer, steps_per_epoch=len(loader), sample_inputs=sample_inputs)

first = 0
if os.path.exists("checkpoint.pt"):
    saved = torch.load("checkpoint.pt", weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])  # the manager's state is inside
    torch.set_rng_state(saved["random"])
    first = round(manager.epoch)

for epoch in range(first, manager.max_epochs):
    model.train()
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = manager.update_loss(criterion(model(inputs), labels))
        loss.backward()
        optimizer.step()
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save(states, "checkpoint.pt.new")
    os.replace("checkpoint.pt.new", "checkpoint.pt")  # the old one or the new one, never half of either

# When training is over:
manager.finalize(model)
model.eval()
export_onnx(model, sample_inputs, "model.onnx")
print(verify_onnx(model, "model.onnx", sample_inputs))
""",
    "accelerate": """import os
from pathlib import Path

from accelerate import Accelerator
from sparsify import ScheduledModifierManager, export_onnx, verify_onnx
from sparsify.integrations.accelerate import prepare

accelerator = Accelerator()
manager = ScheduledModifierManager.from_yaml($recipe)
# In place of accelerator.prepare: counts the optimizer's steps, and joins save_state and load_state.
model, optimizer, loader = prepare(accelerator, manager, model, optimizer, loader, sample_inputs=sample_inputs)

checkpoints = Path("checkpoints")
done = max((int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()), default=0)
if done:
    accelerator.load_state(str(checkpoints / str(done)))

for epoch in range(done, manager.max_epochs):
    model.train()
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            loss = manager.update_loss(criterion(model(inputs), labels))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(str(checkpoints / "new"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.rename(checkpoints / "new", checkpoints / str(epoch + 1))  # a whole checkpoint, or none

model = accelerator.unwrap_model(model)
manager.finalize(model)
model.eval()
export_onnx(model, sample_inputs, "model.onnx")
print(verify_onnx(model, "model.onnx", sample_inputs))
""",
    "lightning": """from lightning import Trainer
from sparsify.integrations.lightning import SparsifyCallback

# One callback; the LightningModule `module` and its loader stay as they are.
callback = SparsifyCallback($recipe, sample_inputs=sample_inputs, export_path="model.onnx")
trainer = Trainer(max_epochs=callback.manager.max_epochs, callbacks=[callback])
trainer.fit(module, loader)  # ckpt_path="..." goes on from a checkpoint
print(callback.verification)
""",
    "transformers": """from pathlib import Path

from sparsify.integrations.transformers import SparsifyCallback
from transformers import Trainer

# Give TrainingArguments num_train_epochs as long as the recipe: another length is warned about.
callback = SparsifyCallback($recipe, export_path="model.onnx", sample_inputs=sample_inputs)
trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[callback])

# A run that was stopped goes on from its last checkpoint.
stopped = any(Path(arguments.output_dir).glob("checkpoint-*"))
trainer.train(resume_from_checkpoint=stopped)
print(callback.verification)
""",
}

_SCRIPT = '''"""Trains by a recipe, resumes, exports, verifies, benchmarks. Written by sparsify; yours to change.

    python train.py --model package.module:function --data package.module:function
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import torch
from sparsify import ScheduledModifierManager, benchmark_onnx, export_onnx, verify_onnx
from torch.nn import functional as F


def load(reference):
    """What "package.module:name" names."""
    module, _, path = reference.partition(":")
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


@torch.no_grad()
def evaluate(model, batches, device):
    """Mean loss and, where the outputs are classes, accuracy."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for inputs, labels in batches:
        outputs, labels = model(inputs.to(device)), labels.to(device)
        loss += F.$loss(outputs, labels).item() * len(labels)
        if not labels.is_floating_point():
            right += int((outputs.argmax(1) == labels).sum())
        count += len(labels)
    return loss / count, right / count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default=$recipe)
    parser.add_argument("--model", default=$model, help="package.module:function that builds the model")
    parser.add_argument("--data", default=$data, help="package.module:function: (training batches, test batches)")
    parser.add_argument("--learning-rate", type=float, default=$learning_rate)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("compressed"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = load(arguments.model)().to(arguments.device)
    batches, tests = load(arguments.data)()
    sample = next(iter(batches))[0][:2].to(arguments.device)
    arguments.output.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.output / "checkpoint.pt"

    optimizer = torch.optim.$optimizer(model.parameters(), lr=arguments.learning_rate$extra)
    manager = ScheduledModifierManager.from_yaml(Path(arguments.recipe))
    optimizer = manager.modify(model, optimizer, steps_per_epoch=len(batches), sample_inputs=(sample,))
    parts = {"model": model, "optimizer": optimizer}  # the manager's state is inside the optimizer's
    first = 0
    if arguments.resume:
        saved = torch.load(checkpoint, map_location=arguments.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"].cpu())
        first = round(manager.epoch)

    for epoch in range(first, manager.max_epochs):
        model.train()
        for inputs, labels in batches:
            inputs, labels = inputs.to(arguments.device), labels.to(arguments.device)
            optimizer.zero_grad()
            loss = manager.update_loss(F.$loss(model(inputs), labels))
            loss.backward()
            optimizer.step()
        test_loss, accuracy = evaluate(model, tests, arguments.device)
        print(f"epoch {epoch + 1} of {manager.max_epochs}: loss {test_loss:.4f}, accuracy {accuracy:.2%}", flush=True)
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**states, "random": torch.get_rng_state()}, f"{checkpoint}.new")
        os.replace(f"{checkpoint}.new", checkpoint)  # the old one or the new one, never half of either

    manager.finalize(model)
    model.eval().cpu()
    path = arguments.output / "model.onnx"
    print(export_onnx(model, (sample.cpu(),), path))
    print(verify_onnx(model, path, (sample.cpu(),)))
    print(benchmark_onnx(path))


if __name__ == "__main__":
    main()
'''
