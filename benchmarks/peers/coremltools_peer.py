"""The task with MagnitudePruner of coremltools.optimize.torch: gradual, by magnitude, every layer by itself.

Its masks are computed from weights that keep the value they had when they were masked, so that they can come back.
"""

from __future__ import annotations

import task
import torch
from coremltools.optimize.torch.pruning import MagnitudePruner, MagnitudePrunerConfig
from torch import nn

__all__: list[str] = []


def work(model: nn.Module, data: task.Digits, seed: int, level: float) -> dict[str, float]:
    every = round(task.UPDATE_EVERY * task.STEPS_PER_EPOCH)
    last = round(task.PRUNED_BY * task.STEPS_PER_EPOCH)
    layer = {
        # The first entry has the initial sparsity, as the first update of a gradual recipe.
        "scheduler": {"update_steps": list(range(0, last + 1, every)), "power": 3},
        "initial_sparsity": 0.0,
        "target_sparsity": level,
    }
    config = MagnitudePrunerConfig.from_dict({"module_name_configs": {n: layer for n in task.pruned_layers(model)}})
    pruner = MagnitudePruner(model, config)
    prepared = pruner.prepare(inplace=True)

    def after_step(_: int, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        pruner.step()
        return optimizer

    return task.timed(
        prepared, data, seed, after_step=after_step, finish=lambda: pruner.finalize(prepared, inplace=True)
    )


if __name__ == "__main__":
    task.peer(work)
