"""The optimizers that the promises are tested with: all of torch's that train dense weights, in several forms."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

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


class Lookahead(Optimizer):
    """In the shape of timm's (1.0.31): no `Optimizer.__init__`, and weights are moved after the inner step."""

    def __init__(self, base_optimizer: Optimizer, alpha: float = 0.5, k: int = 2) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group |= {"lookahead_alpha": alpha, "lookahead_k": k, "lookahead_step": 0}

    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        loss = self._base_optimizer.step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                group["lookahead_step"] += 1
                if group["lookahead_step"] % group["lookahead_k"] == 0:
                    for fast in group["params"]:
                        state = self._base_optimizer.state[fast]
                        slow = state.setdefault("lookahead_slow_buff", fast.clone())
                        slow.add_(fast - slow, alpha=group["lookahead_alpha"])
                        fast.copy_(slow)
        return loss

    def state_dict(self):  # type: ignore[no-untyped-def, override]
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict):  # type: ignore[no-untyped-def, override]
        self._base_optimizer.load_state_dict(state_dict)
        self.param_groups = self._base_optimizer.param_groups


class SAM(Optimizer):
    """As public repositories write it (https://github.com/davda54/sam): perturb, compute gradients again, step."""

    def __init__(self, params: Any, base_optimizer: type[Optimizer], rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        gradients = [p.grad.norm() for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack(gradients).norm()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def, override]
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()

    def load_state_dict(self, state_dict):  # type: ignore[no-untyped-def, override]
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups
