"""The optimizers that the promises are tested with: all of torch's that train dense weights, in several forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

Form = Callable[[nn.Module], Optimizer]


class TwiceStepped(SGD):
    """Calls `super().step()`, so that torch runs hooks for the class and its base, and moves weights afterwards."""

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1e-3)
        return result


def _simple(cls: type[Optimizer], **options: object) -> Form:
    return lambda model: cls(model.parameters(), **options)


def _two_groups(model: nn.Module) -> Optimizer:
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return AdamW([{"params": weights, "weight_decay": 0.1}, {"params": others, "lr": 1e-3}], lr=1e-2)


FORMS: dict[str, Form] = {
    "sgd": _simple(SGD, lr=0.1),
    "sgd momentum": _simple(SGD, lr=0.05, momentum=0.9, weight_decay=0.01),
    "sgd nesterov, one by one": _simple(SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=False),
    "sgd fused": _simple(SGD, lr=0.05, momentum=0.9, fused=True),
    "sgd maximize": _simple(SGD, lr=0.01, momentum=0.9, maximize=True),
    "sgd stepped twice": lambda model: TwiceStepped(model.parameters(), lr=0.05, momentum=0.9),
    "adam": _simple(Adam, lr=0.01),
    "adam amsgrad": _simple(Adam, lr=0.01, amsgrad=True, weight_decay=0.1),
    "adam fused": _simple(Adam, lr=0.01, fused=True),
    "adam tensor rate": lambda model: Adam(model.parameters(), lr=torch.tensor(0.01), foreach=False),
    "adamw two groups": _two_groups,
    "nadam": _simple(NAdam, lr=0.01),
    "radam": _simple(RAdam, lr=0.01),
    "adamax": _simple(Adamax, lr=0.01),
    "adagrad": _simple(Adagrad, lr=0.05),
    "adadelta": _simple(Adadelta, lr=1.0),
    "adafactor": _simple(Adafactor, lr=0.05),
    "rmsprop centered momentum": _simple(RMSprop, lr=0.01, centered=True, momentum=0.9),
    "rprop": _simple(Rprop, lr=0.01),
    "asgd": _simple(ASGD, lr=0.05),
    "lbfgs": _simple(LBFGS, lr=0.1, max_iter=4, history_size=3),
}

if hasattr(torch.optim, "Muon"):  # torch >= 2.9; takes matrices only

    def _muon(model: nn.Module) -> Optimizer:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.dim() == 2)
        return torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.02)

    FORMS["muon"] = _muon
