"""Pruning by second-order information: what the loss would lose with a weight, and how the others make up for it.

These modifiers load, save and check; they do not run yet.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from sparsify.modifiers.base import Active, Run, not_yet
from sparsify.modifiers.pruning import GradualPruning

__all__ = ["MFACPruningModifier", "OBSPruningModifier"]

Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class OBSPruningModifier(GradualPruning):
    """Optimal brain surgeon over blocks of the empirical Fisher matrix (oBERT, Kurtic 2022, arXiv 2203.07259).

    The weights that stay are moved to make up for those that go. The rest is as GMPruningModifier.
    """

    runs: ClassVar[bool] = False
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "phased", "available_devices", "available_gpus"})
    global_sparsity: bool = Field(
        default=True, description="Whether all parameters are ranked together, or each by itself."
    )
    num_grads: Count = Field(default=1024, description="How many gradients the Fisher matrix is estimated from.")
    damp: Positive = Field(default=1e-7, description="What is added to the diagonal of the Fisher matrix.")
    fisher_block_size: Count = Field(default=50, description="Weights in a block of the Fisher matrix.")
    grad_sampler_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Arguments for the gradient sampler that is given to modify()."
    )
    num_recomputations: Count = Field(
        default=1, description="How often the Fisher matrix is estimated anew within one update of the masks."
    )

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)


class MFACPruningModifier(GradualPruning):
    """Matrix-free second-order pruning (M-FAC, Frantar 2021, arXiv 2107.03356); the rest is as GMPruningModifier."""

    runs: ClassVar[bool] = False
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"log_types", "phased", "available_devices", "available_gpus", "use_gradient_buffering"}
    )
    num_grads: Count | dict[float, Count] = Field(
        default=64,
        description="How many gradients are kept; or {fraction of zeros: count}, each from that sparsity on.",
    )
    damp: Positive = Field(default=1e-5, description="What is added to the diagonal of the Fisher matrix.")
    fisher_block_size: Count | None = Field(
        default=2000, description="Weights in a block of the Fisher matrix; null: one block a parameter."
    )
    num_pages: Count = Field(default=1, description="In how many parts gradients are kept, to save memory.")
    grads_device: str | int = Field(default="cpu", description="The device on which gradients are kept.")
    grad_sampler_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Arguments for the gradient sampler that is given to modify()."
    )

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)
