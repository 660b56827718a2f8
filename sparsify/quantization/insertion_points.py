"""Places at which a quantizer can stand: a layer's output, a module's own output, an operation in a user's forward."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property
from typing import Literal

from sparsify.model.trace import Trace, TracedNode
from sparsify.quantization.attention_products import MATMUL, OPERANDS
from sparsify.quantization.forward_ops import COUNTED, KINDS, child_name
from sparsify.quantization.layer_selection import QuantizedLayers
from sparsify.quantization.layers import POINTWISE
from sparsify.quantization.weight_readers import CONTAINERS, watched_owner

__all__: list[str] = []

QuantizerRole = Literal["input", "output", "function"]


class InsertionPoints:
    """Places of quantizers for the tensors of a trace.

    Args:
        trace: of the model.
        chosen: its quantized layers.
        nodes: layer -> its operations in the trace; more may be added later.
        ends: node that gives the output of a layer -> the layer; more may be added later.
    """

    def __init__(
        self, trace: Trace, chosen: QuantizedLayers, nodes: dict[str, list[TracedNode]], ends: dict[str, str]
    ) -> None:
        self.trace = trace
        self.chosen = chosen
        self.modules, self.folds = chosen.modules, chosen.folds
        self.nodes, self.ends = nodes, ends

    def place(self, node: TracedNode) -> tuple[str, str, QuantizerRole] | None:
        """(module, child, role) of a quantizer of the result of `node`; None: one can stand only at its readers."""
        if node.name in self.ends:
            layer = self.ends[node.name]
            made = self.nodes.get(layer, [])
            # A layer behind one that is called several times, or that others compute, has a quantizer of its own.
            if (len(made) > 1 or self.chosen.is_lent(layer)) and made[0].kind not in ("conv", "batch_norm"):
                return None
            return self.folds.get(layer, layer), "output_quantizer", "output"
        if node.kind not in KINDS or not node.is_float or self.chosen.ignores(node):
            return None
        if self.is_own_module(node):
            return node.owner, "output_quantizer", "output"
        owner = self.watched_owner(node)
        # A container runs or lists its children: a quantizer among them would be one more layer.
        if isinstance(self.modules[owner], CONTAINERS) or self.counts(owner) is None:
            return None
        return owner, child_name(node.kind, self.index(node, owner)), "function"

    def is_own_module(self, node: TracedNode) -> bool:
        """True if `node` is all that a ReLU or a pool computes, called from one place, or a user's activation."""
        module = self.modules.get(node.owner)
        return node.whole or (type(module) in POINTWISE and self.trace.calls.get(node.owner) == 1)

    def watched_owner(self, node: TracedNode) -> str:
        """The user's module in whose forward the node stands: modules of torch without children are looked through."""
        return watched_owner(self.modules, node)

    def _own_nodes(self, owner: str) -> dict[int, list[TracedNode]]:
        """The counted operations of a module, by call."""
        return self._by_owner.get(owner, {})

    @cached_property
    def _by_owner(self) -> dict[str, dict[int, list[TracedNode]]]:
        by_owner: dict[str, dict[int, list[TracedNode]]] = defaultdict(lambda: defaultdict(list))
        for node in self.trace.nodes:
            if node.kind in COUNTED and node.is_float and not self.is_own_module(node):
                if node.kind == MATMUL and node.op not in OPERANDS:
                    continue
                path = self.watched_owner(node)
                number = next((call.number for call in reversed(node.stack) if call.path == path), 0)
                by_owner[path][number].append(node)
        return by_owner

    def counts(self, owner: str) -> dict[str, int] | None:
        """{kind: number of operations} that a module computes itself; None where that differs between its calls."""
        calls = self._own_nodes(owner)
        found = [{kind: sum(n.kind == kind for n in nodes) for kind in COUNTED} for nodes in calls.values()]
        if len(found) != self.trace.calls.get(owner, 1) or any(counts != found[0] for counts in found):
            return None
        # A quantizer computes one activation.
        functions = [[n.op.rstrip("_") for n in nodes if n.kind in ("relu", "gate")] for nodes in calls.values()]
        return None if any(one != functions[0] for one in functions) else found[0]

    @cached_property
    def together(self) -> dict[tuple[str, str], list[TracedNode]]:
        """(module, child) -> the nodes behind which this quantizer would stand: one in each call of the module."""
        found: dict[tuple[str, str], list[TracedNode]] = defaultdict(list)
        for node in self.trace.nodes:
            place = self.place(node)
            if place is not None:
                found[place[:2]].append(node)
        return found

    def index(self, node: TracedNode, owner: str) -> int:
        """The position of `node` among the operations of its kind in one call of its owner."""
        for nodes in self._own_nodes(owner).values():
            if node in nodes:
                return [n.name for n in nodes if n.kind == node.kind].index(node.name)
        raise AssertionError(node.name)
