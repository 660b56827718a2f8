"""The smallest integration: a training loop of your own, and what is added to it.

    python examples/plain_loop.py

A small network learns scikit-learn's handwritten digits while 80 % of its weights go to zero.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sparsify import ScheduledModifierManager

RECIPE = """
modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 12.0
  - !GMPruningModifier
    params: __ALL_PRUNABLE__
    init_sparsity: 0.05
    final_sparsity: 0.8
    start_epoch: 1.0
    end_epoch: 9.0
    update_frequency: 0.5
"""


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    y = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=64, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    manager = ScheduledModifierManager.from_yaml(RECIPE)  # 1
    optimizer = manager.modify(model, optimizer, steps_per_epoch=len(loader))  # 2: the same optimizer comes back
    for _ in range(manager.max_epochs):  # 3
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = manager.update_loss(F.cross_entropy(model(inputs), labels))  # 4: only for recipes with distillation
            loss.backward()
            optimizer.step()
    manager.finalize(model)  # 5

    with torch.no_grad():
        accuracy = (model(x[1400:]).argmax(1) == y[1400:]).float().mean()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            print(f"{name}: {(parameter == 0).float().mean():.1%} zeros")
    print(f"accuracy on {len(x) - 1400} images it has not seen: {accuracy:.1%}")


if __name__ == "__main__":
    main()
