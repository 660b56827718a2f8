"""Calibration data in the form of onnxruntime's own quantizer, for the benchmarks that compare with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnxruntime.quantization import CalibrationDataReader
from torch import Tensor

__all__ = ["Batches"]


class Batches(CalibrationDataReader):
    """Calibration batches as quantize_static asks for them."""

    def __init__(self, batches: list[dict[str, Tensor]]) -> None:
        self.batches: Iterator[dict[str, Tensor]] = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self.batches, None)
        return None if batch is None else {name: value.numpy() for name, value in batch.items()}
