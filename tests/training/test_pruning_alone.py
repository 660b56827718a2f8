"""Training that only prunes touches no quantization."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import sparsify
from sparsify import GMPruningModifier, ScheduledModifierManager

# `import sparsify` brings the room along: a QuantizationModifier's fields are checked against its schemes, and
# export_onnx, which it carries, writes quantized layers. Training must add nothing to that.
SCRIPT = """
import sys, torch, sparsify

def rooms():
    return {name for name in sys.modules if name.startswith("sparsify.quantization")}

before = rooms()
model = torch.nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
modifier = sparsify.GMPruningModifier(
    params="__ALL_PRUNABLE__", init_sparsity=0.1, final_sparsity=0.5, start_epoch=0.0, end_epoch=1.0,
    update_frequency=0.5,
)
manager = sparsify.ScheduledModifierManager([modifier])
manager.modify(model, optimizer, steps_per_epoch=2)
for _ in range(3):
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
manager.finalize()
assert int((model.weight == 0).sum()) == 6
assert rooms() == before, rooms() - before
"""


def test_training_imports_no_more_of_it_than_the_package_does() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_no_function_of_it_is_called() -> None:
    room = str(Path(sparsify.__file__).parent / "quantization")
    called: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(room):
            called.add(frame.f_code.co_qualname)

    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modifier = GMPruningModifier(
        params="__ALL_PRUNABLE__",
        init_sparsity=0.1,
        final_sparsity=0.5,
        start_epoch=0.0,
        end_epoch=1.0,
        update_frequency=0.5,
    )
    manager = ScheduledModifierManager([modifier])
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=torch.randn(2, 4))
        for _ in range(3):
            manager.update_loss(model(torch.randn(2, 4)).sum()).backward()
            optimizer.step()
        manager.finalize()
    finally:
        sys.setprofile(before)
    assert not called
