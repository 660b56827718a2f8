"""Outputs behind a top-k or a sort: places of equal scores may come in any order, and are compared as sets.

torch and onnxruntime order equal scores as they like, and scores of integers are often equal: 12 detections of 300
candidates, the zeros behind a ReLU. Which index, label or box stands at such a place says nothing of either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, helper

from sparsify.onnx.graph import GraphView, all_inputs

__all__: list[str] = []

RankedArray = NDArray[Any]

SAME_SCORE = 1e-6
"""Scores this near, as a fraction of the largest, are equal: the last bits of a float are not the same everywhere."""
PAIRED = 2000
"""Places of equal scores up to which rows of floats are paired with the nearest; more are sorted."""


@dataclass(frozen=True)
class ScoreOrder:
    """A TopK (a sort is one, too) of which the indices reach an output."""

    scores: str
    """The value that it ranks."""
    best: str
    """Its first output: the scores in order."""
    axis: int


@dataclass(frozen=True)
class Tied:
    """Two outputs, brought into one order where scores are equal."""

    expected: RankedArray
    found: RankedArray
    places: int
    """Places with equal scores."""
    cut: int
    """Those of them that lie at the end of a top-k, which leaves out others of the same score: not compared."""


def rankings(model: ModelProto) -> dict[str, ScoreOrder]:
    """{output: the TopK that its order is of}; of outputs behind one TopK, by its indices."""
    view = GraphView(model.graph)
    found: dict[str, ScoreOrder] = {}
    for output in model.graph.output:
        waiting, seen, last = [output.name], {output.name}, {}
        while waiting:
            name = waiting.pop()
            node = view.producer.get(name)
            if node is None:
                continue
            if node.op_type == "TopK" and name == node.output[1]:
                last[node.output[1]] = node
                continue
            fresh = [read for read in all_inputs(node) if read not in seen]
            seen.update(fresh)
            waiting += fresh
        if len(last) == 1:
            node = next(iter(last.values()))
            axis = next((int(helper.get_attribute_value(a)) for a in node.attribute if a.name == "axis"), -1)
            found[output.name] = ScoreOrder(node.input[0], node.output[0], axis)
    return found


def in_one_order(
    expected: RankedArray, found: RankedArray, ranking: ScoreOrder, values: Mapping[str, RankedArray]
) -> Tied:
    """Both outputs with the rows of equal scores in one order; as they are, where the output has no place per score.

    Args:
        expected: the output of one side.
        found: that of the other.
        ranking: from `rankings`.
        values: of the scores and of the best of them, by name.
    """
    if ranking.scores not in values or ranking.best not in values:
        return Tied(expected, found, 0, 0)
    scores, best = values[ranking.scores], values[ranking.best]
    axis = ranking.axis % best.ndim
    if expected.shape != found.shape or expected.shape[: axis + 1] != best.shape[: axis + 1]:
        return Tied(expected, found, 0, 0)
    if axis != best.ndim - 1:
        if expected.shape != best.shape:
            return Tied(expected, found, 0, 0)
        moved = [np.moveaxis(each, axis, -1) for each in (expected, found, scores, best)]
        last = ScoreOrder(ranking.scores, ranking.best, -1)
        tied = in_one_order(moved[0], moved[1], last, {ranking.scores: moved[2], ranking.best: moved[3]})
        back = [np.moveaxis(each, -1, axis) for each in (tied.expected, tied.found)]
        return Tied(back[0], back[1], tied.places, tied.cut)
    count = best.shape[-1]
    rows, lines = best.reshape(-1, count), scores.reshape(-1, scores.shape[-1])
    one, other = (each.reshape(len(rows), count, -1).copy() for each in (expected, found))
    near = SAME_SCORE * float(np.abs(best[np.isfinite(best)]).max(initial=0.0))
    places = cut = 0
    for at, (row, line) in enumerate(zip(rows, lines, strict=True)):
        edges = np.flatnonzero(~(np.abs(np.diff(row)) <= near)) + 1
        for begin, end in zip([0, *edges], [*edges, count], strict=True):
            # The place of the last score of a top-k goes to any of those that have it.
            left_out = end == count and np.count_nonzero(np.abs(line - row[-1]) <= near) > np.count_nonzero(
                np.abs(row - row[-1]) <= near
            )
            if end - begin < 2 and not left_out:
                continue
            places += int(end - begin)
            if left_out:
                cut += int(end - begin)
                other[at, begin:end] = one[at, begin:end]
            else:
                _pair_rows(one[at], other[at], slice(begin, end))
    return Tied(one.reshape(expected.shape), other.reshape(found.shape), places, cut)


def _pair_rows(one: RankedArray, other: RankedArray, group: slice) -> None:
    """Brings the rows of a group into one order, in place."""
    mine, theirs = one[group], other[group]
    if one.dtype.kind == "f" and len(mine) <= PAIRED:
        free = np.ones(len(theirs), bool)
        order = []
        for row in mine:
            apart = np.where(free, np.abs(theirs.astype(np.float64) - row).max(-1, initial=0.0), np.inf)
            order.append(int(np.argmin(apart)))
            free[order[-1]] = False
        other[group] = theirs[order]
        return
    for each, rows in ((one, mine), (other, theirs)):
        each[group] = rows[np.lexsort(rows.T[::-1])]
