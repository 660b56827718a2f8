"""Several tensors on one grid: what one layer reads in several calls, as the head of a detector on every level."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsify.quantization.fake_quantize import FakeQuantize

__all__: list[str] = []


class SameGrid(nn.Module):
    """Stands where a tensor is quantized, and leaves that to the quantizer of another place.

    A layer has one scale for what it reads, since its bias lies on the grid of that scale and its weights'. Two scales
    one behind the other would round twice, and onnxruntime makes one of them that is neither.
    """

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        # In a tuple so that it is no child.
        self._quantizer = (quantizer,)

    @property
    def gate(self) -> str | None:
        """As the quantizer's."""
        return self._quantizer[0].gate

    def forward(self, x: Tensor) -> Any:
        """What the quantizer gives."""
        return self._quantizer[0](x)
