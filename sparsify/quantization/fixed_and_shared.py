"""Quantizers with a grid that no observer finds: that of the function before them, or that of another quantizer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparsify.quantization.fake_quantize import FakeQuantize

__all__: list[str] = []

FIXED: dict[str, tuple[float, int]] = {"tanh": (1 / 128, 128)}
"""Function -> (scale, zero point) of its result, uint8. tanh(x) = 2 sigmoid(2 x) - 1: on this grid its integers are
those of the sigmoid with the scale 1/256 and the zero point 0, for which onnxruntime 1.31.1 has a table, as it has none
for tanh: with one this grid would be needless. 0 is exact, and no value of interest lies half-way between two
integers."""


class FixedQuantize(FakeQuantize):
    """A quantizer on a grid of `FIXED`. It counts batches and refuses what is not finite, and learns nothing of them.

    Checkpoint: as FakeQuantize; low, high, scale and zero_point never change.
    """

    def __init__(self, name: str, *, function: str, **options: Any) -> None:
        super().__init__(name, **{**options, "observer": "moving_average"})
        self.function = function
        scale, zero_point = FIXED[function]
        self.scale.fill_(scale)
        self.zero_point.fill_(zero_point)
        self.low.fill_((self.first - zero_point) * scale)
        self.high.fill_((self.last - zero_point) * scale)

    def _observe(self, batch_low: float, batch_high: float, x: Tensor) -> None:
        self._require_finite(batch_low, batch_high)
        self.batches.add_(1)

    def _observe_on_device(self, low: Tensor, high: Tensor) -> None:
        # What is not finite makes the range NaN, so that `check` says it; nothing else moves it.
        self.low.add_(low * 0)
        self.high.add_(high * 0)
        self.batches.add_(1)


class SameGrid(nn.Module):
    """Stands where a tensor is quantized, and leaves that to the quantizer of another place.

    A layer has one scale for what it reads, since its bias lies on the grid of that scale and its weights'. Two scales
    one behind the other would round twice, and onnxruntime 1.31.1 makes one of them that is neither.
    """

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        # In a tuple so that it is no child.
        self._quantizer = (quantizer,)

    @property
    def quantizer(self) -> FakeQuantize:
        """The quantizer of the other place."""
        return self._quantizer[0]

    @property
    def gate(self) -> str | None:
        """As the quantizer's."""
        return self._quantizer[0].gate

    def forward(self, x: Tensor) -> Any:
        """The result of the quantizer of the other place."""
        return self._quantizer[0](x)
