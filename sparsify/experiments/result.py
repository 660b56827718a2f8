"""The result of an experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ExperimentResult"]


@dataclass(frozen=True)
class ExperimentResult:
    """Folder and figures of an experiment.

    Attributes:
        folder: of the run; None where it was checked alone.
        figures: the content of `metrics.yaml`: metrics of the dense and the compressed model in torch and in
            onnxruntime, sparsity asked and delivered, sizes in bytes, paired speed, verification. Where it was checked
            alone: the counts of samples, the labels, and how the split was made.
        short: in what it falls short of what was asked, each a line; empty where all is well.
    """

    folder: Path | None
    figures: Mapping[str, Any]
    short: tuple[str, ...] = field(default=())
