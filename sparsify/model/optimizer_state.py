"""What an optimizer remembers of a parameter (momentum, second moments, ...), and forgetting it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS

__all__: list[str] = []


def forget(optimizer: Any, parameter: Tensor, where: Tensor | None = None) -> None:
    """Sets what `optimizer` remembers of `parameter` to what it would begin with. All that there is, whatever its name.

    Zero for nearly everything, both moments of Adam among it; the step size of Rprop begins with the learning rate, the
    sum of Adagrad with its initial value, the average of ASGD with the weights.

    Args:
        optimizer: may be None, or keep no state.
        where: a bool tensor of the parameter's shape: only there, and only what has that shape. None: everywhere, the
            count of steps included. It belongs to all weights of the parameter: with moments of zero and a late count,
            Adam would take steps of several times the learning rate.
    """
    states = getattr(optimizer, "state", None)
    if not isinstance(states, Mapping):
        return
    if isinstance(optimizer, LBFGS):
        # Curvature in the space of all weights, kept under the first of them: it holds for all or for none.
        for state in states.values():
            state.clear()
        return
    # Not `states[parameter]`: it is a defaultdict, and an optimizer takes an empty entry for one that was set up.
    state = states.get(parameter)
    if not state:
        return
    group: dict[str, Any] = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
    with torch.no_grad():
        for key, value in state.items():
            if isinstance(value, Tensor):
                first = parameter if key == "ax" and value.shape == parameter.shape else _initial_value(key, group)
                if where is None:
                    value.copy_(torch.as_tensor(first, device=value.device))
                elif value.shape == parameter.shape and key != "step":
                    here = where.to(value.device)
                    value.copy_(torch.where(here, torch.as_tensor(first).to(value), value))
            elif where is None and isinstance(value, int | float) and not isinstance(value, bool):
                state[key] = type(value)(_initial_value(key, group))


def _initial_value(key: str, group: Mapping[str, Any]) -> Any:
    if key == "step_size":
        return group["lr"]
    if key in ("mu_product", "mu"):
        return 1.0
    if key == "eta":
        return group["lr"]
    return group.get("initial_accumulator_value", 0.0) if key == "sum" else 0.0
