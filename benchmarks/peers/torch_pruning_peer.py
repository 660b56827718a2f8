"""The task with Torch-Pruning: whole channels by the group L2 norm, every layer by itself, in steps while it trains."""

from __future__ import annotations

import task
import torch
import torch_pruning
from torch import nn

__all__: list[str] = []

EVERY = 2.0
"""Epochs between two removals."""


def work(model: nn.Module, data: task.Digits, seed: int, level: float) -> dict[str, float]:
    every, steps = round(EVERY * task.STEPS_PER_EPOCH), round(task.PRUNED_BY / EVERY)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        data.test_x[:1],
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=level,
        iterative_steps=steps,
        iterative_pruning_ratio_scheduler=lambda ratio, count: [
            ratio * task.cubic(i / count) for i in range(count + 1)
        ],
        ignored_layers=[model.get_submodule("fc")],
    )

    def after_step(done: int, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if done % every or done > every * steps:
            return optimizer
        pruner.step()
        # Its parameters are new ones, so the optimizer starts anew, as its documentation asks.
        return task.sgd(model)

    return task.timed(model, data, seed, after_step=after_step)


if __name__ == "__main__":
    task.peer(work)
