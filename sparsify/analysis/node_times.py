"""Times of the nodes of an ONNX file, from onnxruntime's profiler.

onnxruntime fuses, renames and reorders nodes. So the nodes and values of a copy get numbers for names, which survive in
the names of the nodes that replace them: "@12@_nchwc" comes from node 12.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.onnx.runtime import SessionSettings, run_session, start_session

if TYPE_CHECKING:
    import numpy as np
    from onnx import GraphProto, ModelProto, NodeProto

__all__: list[str] = []

BEFORE = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "ReorderInput"})
"""Conversions for the node that reads their result."""
AFTER = frozenset({"DequantizeLinear", "ReorderOutput"})
"""Conversions of the result of the node before."""
EITHER = frozenset({"Transpose", "Cast", "MemcpyToHost", "MemcpyFromHost"})
"""Conversions where onnxruntime put them in; where the file has them, they are nodes like others."""
ELSEWHERE = "nowhere in the file"


@dataclass(frozen=True)
class NodeTimes:
    """Times of one call of a file, in milliseconds: means over the faster half of the calls, so that all add up.

    Attributes:
        owners: by the name that was given to the nodes.
        others: nodes without an owner, by their own name; those that cannot be traced to the file by "nowhere in the
            file" and their operator.
        total: of all nodes; the sum of both.
    """

    owners: Mapping[str, float]
    others: Mapping[str, float]
    total: float


def node_times(
    model: ModelProto,
    feed: Mapping[str, np.ndarray],
    owners: Sequence[tuple[str, ...]],
    shares: Mapping[str, float],
    *,
    threads: int | None,
    warmup: int,
    iterations: int,
    path: Path | None = None,
) -> NodeTimes:
    """Times of a model's nodes by their owner, from runs under onnxruntime's profiler.

    The time of a fused node counts to the owner it is named for. A fused node that is named for none of its parts that
    have an owner is shared among those, in proportion to `shares`. Conversions of types and layouts count to the node
    they are made for.

    Args:
        model: it is not changed; a copy is run.
        feed: its inputs by name.
        owners: of each node of the model's graph, in order; several share its time, () has none.
        shares: by owner, e.g. multiplications.
        threads: of onnxruntime; None: its own choice.
        warmup: runs before those that count.
        iterations: runs that are timed; the faster half of them counts.
        path: the file that the model is from, next to which its external values lie.

    Raises:
        ExportError: onnxruntime cannot run the model.
    """
    with tempfile.TemporaryDirectory(prefix="sparsify-") as text:
        runs, optimized = _profiled(numbered(model), feed, threads, warmup + iterations, Path(text), path)
    runs = sorted(runs[warmup:], key=lambda run: sum(run.values()))
    runs = runs[: (len(runs) + 1) // 2]
    means: dict[tuple[str, str], float] = defaultdict(float)
    for run in runs:
        for key, microseconds in run.items():
            means[key] += microseconds / 1e3 / len(runs)
    inner = {(node.name, node.op_type) for node in _inner_nodes(optimized.graph)}
    found = _Origins(model.graph, optimized.graph, owners)
    mine: dict[str, float] = defaultdict(float)
    others: dict[str, float] = defaultdict(float)
    total = 0.0
    for (name, op), ms in means.items():
        if (name, op) in inner and name not in found.nodes:
            continue  # Within the time of the If or Loop around it.
        total += ms
        who = found.owners(name)
        if not who:
            others[found.label(name, op)] += ms
            continue
        whole = sum(shares.get(owner, 0.0) for owner in who)
        for owner in who:
            mine[owner] += ms * (shares.get(owner, 0.0) / whole if whole else 1 / len(who))
    return NodeTimes(dict(mine), dict(others), total)


def numbered(model: ModelProto) -> ModelProto:
    """A copy whose node i is called "@i@", and its k-th output "@i.k@"; the graph's own outputs keep their names."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = {value.name for value in copy.graph.output}
    names: dict[str, str] = {}
    for i, node in enumerate(copy.graph.node):
        node.name = f"@{i}@"
        names.update({name: f"@{i}.{k}@" for k, name in enumerate(node.output) if name and name not in kept})
    _rename(copy.graph.node, names)
    return copy


def _rename(nodes: Iterable[NodeProto], names: Mapping[str, str]) -> None:
    """Renames values in place, in subgraphs too, which read values of the graph around them."""
    for node in nodes:
        for values in (node.input, node.output):
            for k, name in enumerate(values):
                values[k] = names.get(name, name)
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                # A subgraph may return values of the graph around it.
                for value in inner.output:
                    value.name = names.get(value.name, value.name)
                _rename(inner.node, names)


def _profiled(
    model: ModelProto,
    feed: Mapping[str, np.ndarray],
    threads: int | None,
    calls: int,
    scratch: Path,
    path: Path | None,
) -> tuple[list[dict[tuple[str, str], float]], ModelProto]:
    """({(node, operator): microseconds} of every call, the graph that was run)."""
    import onnx

    settings = SessionSettings(
        threads=threads,
        optimized_path=scratch / "optimized.onnx",
        profile_prefix=scratch / "profile",
        # Without the weights, which are not read here.
        entries={
            "session.optimized_model_external_initializers_file_name": "weights",
            "session.optimized_model_external_initializers_min_size_in_bytes": "64",
        },
    )
    session = start_session(model, settings, path=path, changed=True)
    for _ in range(calls):
        run_session(session, dict(feed))
    # https://onnxruntime.ai/docs/api/python/auto_examples/plot_profiling.html shows the events. That a node's event is
    # called "<node>_kernel_time", and that optimizers keep parts of names, is not promised: seen in onnxruntime 1.31.1,
    # and tests/analysis/test_performance.py fails where it changes.
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    optimized = onnx.load(scratch / "optimized.onnx", load_external_data=False)
    runs: list[dict[tuple[str, str], float]] = []
    run: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            run[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]] += event["dur"]
        elif event.get("name") == "model_run":
            runs.append(dict(run))
            run = defaultdict(float)
    return runs, optimized


class _Origins:
    """Maps the nodes of the optimized graph to the nodes of the file that they come from."""

    def __init__(self, file: GraphProto, optimized: GraphProto, owners: Sequence[tuple[str, ...]]) -> None:
        self.file, self.file_owners = file, owners
        self.nodes: dict[str, NodeProto] = {node.name: node for node in optimized.node}
        self.made_in_file = {name: i for i, node in enumerate(file.node) for name in node.output}
        from sparsify.onnx.graph import GraphView

        self.view = GraphView(optimized)
        self.outputs = {value.name for value in file.output}
        self.anchors = {node.name: self._anchors(node) for node in optimized.node}
        self.taken = {i for anchors in self.anchors.values() for i in anchors}

    def _anchors(self, node: NodeProto) -> list[int]:
        """The nodes of the file that it is named for."""
        for names in ([node.name], list(node.output)):
            found = [int(i) for name in names for i in re.findall(r"@(\d+)(?:\.\d+)?@", name)]
            found += [self.made_in_file[name] for name in names if name in self.outputs and name in self.made_in_file]
            if found:
                return list(dict.fromkeys(found))
        return []

    def owners(self, name: str) -> list[str]:
        """The owners of the time of one optimized node; several where nodes of several owners run as one."""
        node = self.nodes.get(name)
        if node is None:
            return []
        own = self._own(node)
        if own or not self._converts(node):
            return own
        return self._neighbour(node)

    def label(self, name: str, op: str) -> str:
        """The name under which the time of a node without a layer is reported."""
        anchors = self.anchors.get(name, [])
        if not anchors:
            return f"{ELSEWHERE}/{op}"
        node = self.file.node[anchors[-1]]
        return node.name or f"{node.op_type}_{anchors[-1]}"

    def _own(self, node: NodeProto) -> list[str]:
        anchors = self.anchors[node.name]
        direct = [owner for i in anchors for owner in self.file_owners[i]]
        if direct:
            return list(dict.fromkeys(direct))
        if len(anchors) == 1 and self.file.node[anchors[0]].op_type == node.op_type:
            return []  # The node of the file, unchanged.
        # Named for the last of the nodes that were fused: the others are those before it that do not run by themselves.
        found: dict[str, None] = {}
        todo, seen = list(anchors), set(anchors)
        while todo:
            for value in self.file.node[todo.pop()].input:
                i = self.made_in_file.get(value)
                if i is None or i in seen or i in self.taken:
                    continue
                seen.add(i)
                found.update(dict.fromkeys(self.file_owners[i]))
                if not self.file_owners[i]:
                    todo.append(i)
        return list(found)

    def _converts(self, node: NodeProto) -> bool:
        return node.op_type in BEFORE | AFTER or (node.op_type in EITHER and not self.anchors[node.name])

    def _neighbour(self, node: NodeProto) -> list[str]:
        """The owner next to a conversion: the one it is made for, or else the one on its other side."""
        for forward in (False, True) if node.op_type in AFTER else (True, False):
            if found := self._along(node, forward=forward):
                return found
        return []

    def _along(self, node: NodeProto, *, forward: bool) -> list[str]:
        """The owner of the nearest node that is no conversion, where there is one in this direction."""
        for _ in range(len(self.nodes)):
            if forward:
                readers = [reader for name in node.output for reader in self.view.consumers(name)]
                if not readers:
                    return []
                node = readers[0]
            else:
                before = next((self.view.producer[name] for name in node.input if name in self.view.producer), None)
                if before is None:
                    return []
                node = before
            own = self._own(node)
            if own or not self._converts(node):
                return own
        return []


def _inner_nodes(graph: GraphProto) -> list[NodeProto]:
    """The nodes of subgraphs, at any depth."""
    found: list[NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                found += [*inner.node, *_inner_nodes(inner)]
    return found
