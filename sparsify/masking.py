"""Scores -> masks (pure functions), and the Masker that keeps masks by parameter name and applies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

__all__: list[str] = []


class Masker:
    """Masks by parameter name; what they mask is zero after every `apply`."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        raise NotImplementedError

    @property
    def names(self) -> list[str]:
        """The masked parameters."""
        raise NotImplementedError

    @property
    def masks(self) -> dict[str, Tensor]:
        """True where a weight is kept."""
        raise NotImplementedError

    def bind(self, optimizer: Optimizer | None) -> None:
        """Takes `optimizer` as the one whose state is zeroed where a mask grows."""
        raise NotImplementedError

    def set(self, name: str, mask: Tensor) -> None:
        """Puts `mask` in force: weights and optimizer state are zero where it is False."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Ends the mask; the weights stay zero until something moves them."""
        raise NotImplementedError

    def apply(self) -> None:
        """Sets what is masked to zero, in place."""
        raise NotImplementedError

    def apply_to_grads(self) -> None:
        """Sets the gradients of what is masked to zero, in place."""
        raise NotImplementedError

    def apply_to(self, model: nn.Module) -> None:
        """Masks another model with the same parameter names."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises where a masked parameter is missing, has another shape or holds NaN."""
        raise NotImplementedError

    def finalize(self) -> None:
        """Bakes the masks in as +0.0 and forgets them."""
        raise NotImplementedError

    def sparsity(self) -> dict[str, float]:
        """The fraction of masked weights, by name."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The masks, packed."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Puts the masks of `state` in force in place of those there."""
        raise NotImplementedError
