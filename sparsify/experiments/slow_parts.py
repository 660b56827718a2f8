"""Parts of a model that onnxruntime runs slower in integers than in float, by the times of their nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.analysis.node_times import node_times
from sparsify.experiments.one_shot_report import MeasuredPart
from sparsify.model.targets import is_prunable_layer, named_modules
from sparsify.onnx.runtime import read_model

if TYPE_CHECKING:
    import numpy as np
    from onnx import ModelProto
    from torch import nn

__all__: list[str] = []

FEWEST_PARTS = 6
"""A model is looked at in so many parts at least, where its modules allow it."""
SLOWER = 1.05
"""By so much a part has to be slower in integers to be given back to float."""
LEAST_LOST = 0.005
"""Of the time of the whole: parts that lose less are noise."""


def slower_parts(
    plain: Path, quantized: Path, feed: Mapping[str, np.ndarray], model: nn.Module, *, threads: int
) -> list[MeasuredPart]:
    """Parts whose nodes take longer in `quantized` than in `plain`, the worst first.

    Args:
        plain: the float file.
        quantized: the same in integers.
        feed: inputs of both.
        model: the module whose paths the nodes are named by.
        threads: of onnxruntime.
    """
    layers = [name for name, module in named_modules(model).items() if name and is_prunable_layer(module)]
    parts = _measured_parts(layers)
    found = []
    for path in (plain, quantized):
        file = read_model(path)
        owners = _owners(file, parts)
        found.append(node_times(file, feed, owners, {}, threads=threads, warmup=3, iterations=12, path=path))
    before, after = (times.owners for times in found)
    total = found[0].total
    slower = [
        MeasuredPart(name, before.get(name, 0.0), ms)
        for name, ms in after.items()
        if ms > SLOWER * before.get(name, 0.0) and ms - before.get(name, 0.0) > LEAST_LOST * total
    ]
    return sorted(slower, key=lambda part: part.float_ms - part.int8_ms)


def _measured_parts(layers: Sequence[str]) -> set[str]:
    """The modules that are looked at as one: layers by so many steps of their path that there are enough."""
    found: set[str] = set()
    for depth in range(1, 8):
        found = {".".join(name.split(".")[:depth]) for name in layers}
        if len(found) >= FEWEST_PARTS:
            break
    return found


def _owners(file: ModelProto, parts: set[str]) -> list[tuple[str, ...]]:
    """The part of each node, by its name: "path.of.module/Conv_1"; of a layer of an imported file its own name."""
    owners: list[tuple[str, ...]] = []
    for node in file.graph.node:
        steps = node.name.rpartition("/")[0].split(".")
        names = [node.name, *(".".join(steps[:count]) for count in range(len(steps), 0, -1))]
        owners.append(tuple(name for name in names if name in parts)[:1])
    return owners
