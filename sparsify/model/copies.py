"""Deep copies of models, whatever their modules keep of a forward."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__: list[str] = []

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def deep_copied(model: AnyModule) -> AnyModule:
    """A deep copy of `model`. Tensors that modules keep of a computation are in it without their history.

    torch copies no tensor that was computed from a parameter, as the weight that `torch.nn.utils.weight_norm` and
    `spectral_norm` set before every forward: https://github.com/pytorch/pytorch/issues/28594, seen in torch 2.13.0.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for leaf in pytree.tree_leaves(list(vars(module).values())):
            if isinstance(leaf, Tensor) and not leaf.is_leaf:
                memo[id(leaf)] = leaf.detach().clone()
    return copy.deepcopy(model, memo)
