"""Which tensors of a model are quantized, and where their quantizers stand: a trace and a scheme in, a plan out.

One quantizer per tensor. In convolutional blocks it stands where the tensor is made: behind every ReLU, behind what
feeds another activation or an add or product of tensors, behind these themselves, concatenations and average pools; all
readers share it. Elsewhere, as in attention blocks, only what a layer reads is quantized, by one quantizer that the
layers share, and other readers see floats: few quantized tensors are the fastest there.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from sparsify.model.channel_affine import AFFINE
from sparsify.model.sharding import class_before_sharding
from sparsify.model.trace import Trace, TracedNode
from sparsify.quantization.attention import SLOW
from sparsify.quantization.attention_products import ATTENTION, MATMUL, OPERANDS, operand
from sparsify.quantization.conversion import is_channel_affine, is_norm_and_more
from sparsify.quantization.fixed_and_shared import FIXED
from sparsify.quantization.forward_ops import COUNTED, LAYER, NORM
from sparsify.quantization.insertion_points import InsertionPoints, QuantizerRole
from sparsify.quantization.layer_selection import QuantizedLayers
from sparsify.quantization.layers import NORMS, PROJECTION, WEIGHTED
from sparsify.quantization.plan import LayerPlan, NormPlan, QuantizationPlan, QuantizerSite, Unquantized
from sparsify.quantization.recurrent import RECURRENT_FORMS, is_recurrent
from sparsify.quantization.scheme import ActivationScheme, QuantizationSettings, Scheme
from sparsify.quantization.straight_through import GATES
from sparsify.quantization.weight_grid import TRANSPOSED, channel_axis, stores_transposed
from sparsify.quantization.weight_readers import CONTAINERS

__all__: list[str] = []


def make_plan(model: nn.Module, trace: Trace, settings: QuantizationSettings) -> QuantizationPlan:
    """The plan of what is quantized in `model` by `settings`; changes nothing.

    Args:
        model: in float.
        trace: of `model`.
        settings: as the recipe says.

    Raises:
        TargetError: a name in `settings` matches nothing.
    """
    return _Planner(model, trace, settings).plan()


class _Planner:
    def __init__(self, model: nn.Module, trace: Trace, settings: QuantizationSettings) -> None:
        chosen = QuantizedLayers(model, trace, settings)
        self.trace = trace
        self.settings = settings
        self.chosen = chosen
        self.modules, self.layers, self.folds = chosen.modules, chosen.layers, chosen.folds
        # BatchNorms that become layers of their own, and what stays in float, are found while tensors are chosen.
        self.nodes, self.ends, self.left = dict(chosen.nodes), dict(chosen.ends), list(chosen.left)
        self.points = InsertionPoints(trace, chosen, self.nodes, self.ends)
        # Tensors, by the nodes that give them: those that layers read, with the layers; those that are quantized where
        # they are made; those that hold integers in convolutional blocks.
        self.demands: dict[str, list[tuple[str, ActivationScheme]]] = defaultdict(list)
        self.required: dict[str, ActivationScheme] = {}
        self.blocks: set[str] = set()
        self.alone: dict[str, TracedNode] = {}
        # Layers that are called more than once, or read what is no float.
        self.own: list[tuple[str, ActivationScheme]] = []

    # Which tensors are quantized

    def plan(self) -> QuantizationPlan:
        """The tensors first, then their quantizers, then what stands around them."""
        self._ask_layers()
        self._follow_blocks()
        self._give_integers()
        self._agree()
        grids = self._share()
        sites, source = self._sites()
        sites = _on_one_grid(sites, grids.values())
        source.update((name, places[0]) for name, places in grids.items())
        sites += self._product_sites()
        return QuantizationPlan(
            layers=tuple(self._layer(name, scheme, source.get(name)) for name, scheme in self.layers.items()),
            sites=tuple(sites),
            watched=self._watched(sites, [*self.folds.values(), *self.alone]),
            norms=tuple(name for name in self.modules if self._is_norm(name)),
            slow=self._slow(),
            left=tuple(dict.fromkeys(left for left in self.left if left.what not in self.alone)),
            attentions=tuple(self.chosen.attentions),
            reads=self.chosen.reads,
            alone=tuple(
                NormPlan(
                    name,
                    source[name],
                    len(node.shape or ()),
                    63 if self.settings.reduce_range else 127,
                    (node.shape or (0, 0))[1] if node.op == AFFINE else 0,
                )
                for name, node in self.alone.items()
            ),
        )

    def _ask_layers(self) -> None:
        """Notes the tensors that layers read, and those layer outputs that the recipe wants quantized."""
        for name, scheme in self.layers.items():
            if scheme.output_activations is not None:
                for end in (end for end, layer in self.ends.items() if layer == name):
                    self.required[end] = scheme.output_activations
            args = scheme.input_activations
            nodes = [node for node in self.nodes[name] if node.kind != "embedding"]
            if args is None or not nodes:
                continue
            # Of a layer that reads a parameter, as learned queries, there is no node.
            read = [self.trace.root(node.inputs[0]) for node in nodes if node.inputs]
            if len(read) != 1 or len(nodes) > 1 or not self.trace.by_name[read[0]].is_float:
                self.own.append((name, args))
            else:
                self.demands[read[0]].append((name, args))

    def _follow_blocks(self) -> None:
        """Goes along from convolutions, through all that can compute with integers."""
        base = self.settings.scheme.input_activations
        for end, name in self.ends.items():
            layer = self.trace.by_name[self._layer_node(end)]
            if self.layers[name].input_activations is not None and layer.kind == "conv":
                self.blocks.add(end)
        adds: list[str] = []
        for node in self.trace.nodes:
            if base is None or not node.is_float or not node.inputs:
                continue
            roots = [self.trace.root(read) for read in node.inputs]
            if node.kind == "add" and any(root in self.blocks for root in roots):
                why = self._why_no_add(node, roots)
                if why is None:
                    adds.append(node.name)
                    self._take(node, roots, base, itself=False)
                else:
                    self.left.append(Unquantized(f"{node.owner or 'the model'}: {node.op}", why))
            elif roots[0] in self.blocks:
                self._follow(node, roots, base)
        # An add is quantized behind its ReLU where that is all that reads it.
        for name in adds:
            readers = self.trace.readers[name]
            behind = len(readers) == 1 and readers[0].kind == "relu" and readers[0].name in self.required
            if behind:
                self.required.pop(name, None)
            elif base is not None:
                self.required.setdefault(name, base)

    def _follow(self, node: TracedNode, roots: list[str], base: ActivationScheme) -> None:
        """Decides whether the result of `node` is in integers like its first operand; sums are decided elsewhere."""
        inside, placed = all(root in self.blocks for root in roots), self.points.place(node) is not None
        users = self.trace.users(node.name)
        if self._stands_alone(node):
            self._take_alone(node, roots[0], base)
        elif node.name in self.ends and node.kind == "linear":
            # Squeeze-and-excitation and classifiers with a gate: the gate would stand between floats.
            if placed and users and all(user.kind == "gate" for user in users):
                self.blocks.add(node.name)
        elif node.kind == "relu":
            if placed and self.trace.by_name[roots[0]].kind != "relu":
                self._take(node, (), base)
        elif node.kind == "multiply":
            # The gate of squeeze-and-excitation.
            if placed and inside and len(roots) == 2:
                self._take(node, roots, base)
        elif node.kind == "concat":
            # In a container there is no place for a quantizer; BatchNorms bring their own.
            if inside and users and (placed or all(map(self._stands_alone, users))):
                self._take(node, roots, base, itself=placed)
        elif node.kind in ("average_pool", "gate") and placed and not self._is_norm_by_hand(node):
            self._take(node, roots[:1], base)
        elif node.kind in ("activation", "gate"):
            # Without it the convolution that gives what the activation reads would run in float.
            self.required.setdefault(roots[0], base)

    def _take_alone(self, node: TracedNode, root: str, base: ActivationScheme) -> None:
        """One call of a BatchNorm that is a layer of its own."""
        if node.owner not in self.alone:
            self.alone[node.owner] = node
            self.nodes[node.owner] = self._calls_of(node)
            self.ends.update((each.name, node.owner) for each in self.nodes[node.owner])
            if len(self.nodes[node.owner]) > 1:
                self.own.append((node.owner, base))
            self.blocks.update(each.name for each in self.nodes[node.owner])
        if len(self.nodes[node.owner]) == 1:
            self.demands[root].append((node.owner, base))
        if self.points.place(self.trace.by_name[root]) is not None:
            self.required.setdefault(root, base)

    def _take(self, node: TracedNode, roots: Iterable[str], base: ActivationScheme, itself: bool = True) -> None:
        """`node` computes with integers: what it reads is quantized, and what it gives by `itself`."""
        self.blocks.add(node.name)
        if itself:
            self.required[node.name] = base
        for root in roots:
            self.required.setdefault(root, base)

    def _sites(self) -> tuple[list[QuantizerSite], dict[str, str]]:
        """The quantizers, and {layer: the name of that which it reads}."""
        sites: dict[str, QuantizerSite] = {}
        source: dict[str, str] = {}

        def stands(site: QuantizerSite, layers: Iterable[str]) -> None:
            known = sites.setdefault(site.name, site)
            if (known.in_place, known.producer) != (site.in_place, site.producer):
                # In another call somebody else keeps the tensor.
                sites[site.name] = dataclasses.replace(known, in_place=False, producer=None)
            source.update(dict.fromkeys(layers, site.name))

        for node in self.trace.nodes:
            wanted = self.demands.get(node.name, [])
            if node.name not in self.required and not wanted:
                continue
            place = self.points.place(node)
            asked = {name for name, _ in wanted}
            # Of a function with a grid of its own a reader sees the range, where nothing around it is in integers.
            alone_in_float = node.op.rstrip("_") in FIXED and not self._reads_integers(node)
            if place is not None and (node.name in self.required or not (alone_in_float or self._in_float(place[:2]))):
                site = self._site(node, place, self.required.get(node.name) or wanted[0][1])
                stands(dataclasses.replace(site, fixed=None) if alone_in_float else site, asked)
                continue
            groups: dict[tuple[int, bool, str], list[tuple[str, ActivationScheme]]] = defaultdict(list)
            for name, args in wanted:
                groups[args.num_bits, args.symmetric, args.observer].append((name, args))
            for (first, args), *rest in groups.values():
                readers = [name for name, _ in rest]
                stands(_site_at(first, "input_quantizer", args, readers=readers), [first, *readers])
        for name, args in self.own:
            stands(_site_at(name, "input_quantizer", args), [name])
        return list(sites.values()), source

    def _in_float(self, place: tuple[str, str]) -> bool:
        """True if, in some call, who reads what would be quantized at `place` reads floats."""
        for node in self.points.together[place]:
            asked = {name for name, _ in self.demands.get(node.name, [])}
            others = [user for user in self.trace.users(node.name) if self.chosen.caller(user) not in asked]
            if others or self.trace.leaves(node.name):
                return True
        return False

    def _share(self) -> dict[str, list[str]]:
        """Layers that are called more than once have one scale for all that they read.

        Gives {layer: the sites that share one grid}; what is left in `own` brings a quantizer of its own.
        """
        own: list[tuple[str, ActivationScheme]] = []
        shared: dict[str, list[str]] = {}
        for name, args in self.own:
            nodes = [node for node in self.nodes[name] if node.kind != "embedding"]
            roots = [self.trace.by_name[self.trace.root(n.inputs[0])] for n in nodes if n.inputs]
            places = [self.points.place(root) for root in roots]
            if len(roots) == len(nodes) and all(root.name in self.blocks for root in roots) and all(places):
                sites = [self._site(root, place, args) for root, place in zip(roots, places, strict=True) if place]
                alike = {(site.fused_relu, site.ceiling, site.gate, site.fixed) for site in sites}
                if len(alike) == 1 and all(self.required.get(root.name, args) == args for root in roots):
                    shared[name] = list(dict.fromkeys(site.name for site in sites))
                    self.required.update((root.name, args) for root in roots)
                    continue
            own.append((name, args))
            for root in roots:
                if root.name in self.required and all(
                    self.chosen.caller(user) == name for user in self.trace.users(root.name)
                ):
                    # Its own quantizer stands right behind what makes the tensor; of a ReLU, which is no part of that,
                    # what it reads is quantized, or the convolution before it would run in float.
                    self.required.pop(root.name)
                    made = self.trace.root(root.inputs[0])
                    if root.kind == "relu" and made in self.ends and made in self.blocks:
                        self.required.setdefault(made, args)
        self.own = own
        return shared

    def _reads_integers(self, node: TracedNode) -> bool:
        """True if all that `node` reads is quantized where it is made."""
        return all(self.trace.root(name) in self.required for name in node.inputs)

    def _give_integers(self) -> None:
        """Quantizes the output of a Conv even without a quantized reader: it would run in float.

        onnxruntime has no integer Conv with float output, as MatMulIntegerToFloat is for matrices
        (https://github.com/microsoft/onnxruntime/issues/9410, seen in 1.31.1); needless once it has one.
        """
        base = self.settings.scheme.input_activations
        for end in self.ends:
            if base is None or end not in self.blocks or self.points.place(self.trace.by_name[end]) is None:
                continue
            readers = self.trace.users(end)
            fused = len(readers) == 1 and readers[0].kind == "relu" and readers[0].name in self.required
            if not fused:
                self.required.setdefault(end, base)

    def _agree(self) -> None:
        """Quantizes a tensor in every call of its module where it is quantized in one: the quantizer is the same."""
        for nodes in self.points.together.values():
            wanted = next((self.required[node.name] for node in nodes if node.name in self.required), None)
            if wanted is not None:
                self.required.update((node.name, self.required.get(node.name, wanted)) for node in nodes)
                self.blocks.update(node.name for node in nodes)

    def _is_norm_by_hand(self, node: TracedNode) -> bool:
        """True for a mean over the last of three dimensions of a moved tensor: of features, as in a norm, not time."""
        made = self.trace.by_name[node.inputs[0]]
        return node.op == "mean" and made.kind == "move" and made.shape is not None and len(made.shape) == 3

    def _stands_alone(self, node: TracedNode) -> bool:
        """True for a BatchNorm that no layer takes in: it is a layer of its own where it reads integers."""
        norm: Any = self.modules.get(node.owner)
        if node.kind != "batch_norm" or self.ends.get(node.name, node.owner) != node.owner:
            return False
        calls = self._calls_of(node)
        if len(calls) != self.trace.calls.get(node.owner) or len({len(call.shape or ()) for call in calls}) != 1:
            return False
        affine = node.op == AFFINE and is_channel_affine(norm)
        known = affine or type(norm) in NORMS or (norm is not None and is_norm_and_more(norm))
        scheme = self.settings.per_layer(self.modules[""], [node.owner])[node.owner]
        return (
            known
            and (affine or norm.running_mean is not None)
            and scheme is not None
            and scheme.weights is not None
            and node.shape is not None
            and 3 <= len(node.shape) <= 5
            and not self.chosen.ignores(node)
        )

    def _is_norm(self, name: str) -> bool:
        """True for a BatchNorm, and for what takes the place of one."""
        module = self.modules[name]
        taken = name in self.alone or name in self.folds.values()
        return type(module) in NORMS or is_norm_and_more(module) or (taken and self.trace.is_affine(name))

    def _calls_of(self, node: TracedNode) -> list[TracedNode]:
        """`node` and what its module computes of that kind in its other calls."""
        return [each for each in self.trace.of_module(node.owner) if each.kind == node.kind]

    def _layer_node(self, end: str) -> str:
        return next(node.name for node in self.nodes[self.ends[end]])

    def _product_sites(self) -> Iterator[QuantizerSite]:
        """The quantizers of the operands of products of two activations, where the recipe wants any."""
        done: set[tuple[str, int]] = set()
        names: tuple[str, ...]
        for node in self.trace.nodes:
            if node.kind != MATMUL or not node.is_float or node.parameters or len(node.inputs) < 2:
                continue
            if any(node is each.node for each in self.chosen.products):
                continue
            owner = self.points.watched_owner(node)
            scheme = self.settings.per_layer(self.modules[""], [owner])[owner]
            args = None if scheme is None else scheme.matmul_activations
            if args is None:
                continue
            if owner in self.chosen.attentions:
                names, index = ATTENTION, 0
            elif (
                node.op not in OPERANDS
                or isinstance(self.modules[owner], CONTAINERS)
                or self.points.counts(owner) is None
            ):
                why = f"a product of {node.op} cannot be watched; write it as a matmul in a module's own forward"
                self.left.append(Unquantized(f"{owner or 'the model'}: {node.op}", why))
                continue
            else:
                names, index = OPERANDS[node.op], self.points.index(node, owner)
            # A product in every call of a module, and both of an attention, are one place.
            if (owner, index) not in done:
                done.add((owner, index))
                yield from (_site_at(owner, operand(name, index), args) for name in names)

    def _why_no_add(self, node: TracedNode, roots: list[str]) -> str | None:
        trace = self.trace
        if len(roots) == 1 and not node.parameters and roots[0] in self.blocks and self.points.place(node) is not None:
            # Of a tensor and a number; one more rounding pays where integers go on.
            users = trace.users(node.name)
            return None if users and all(user.kind in _GO_ON for user in users) else "its result goes on in float"
        if len(roots) != 2 or self.points.place(node) is None:
            return "not an add of two tensors that can be watched"
        shapes = {trace.by_name[read].shape for read in node.inputs}
        if len(shapes) != 1:
            return f"its operands have the shapes {' and '.join(map(str, shapes))}"
        for root in roots:
            if root not in self.blocks and (
                self.points.place(trace.by_name[root]) is None or trace.by_name[root].kind == "linear"
            ):
                return f"{trace.by_name[root].op} in {trace.by_name[root].owner or 'the model'} stays in float"
        return None

    def _site(self, node: TracedNode, place: tuple[str, str, QuantizerRole], args: ActivationScheme) -> QuantizerSite:
        module, child, role = place
        relu = node.kind == "relu"
        in_place, producer = True, None
        op = node.op.rstrip("_")
        if op in ("sigmoid", "tanh"):
            # Its backward keeps what it gave.
            in_place = False
        if relu:
            made = self.trace.by_name[node.inputs[0]]
            alone = len(self.trace.readers[made.name]) == 1 and made.name not in self.trace.outputs
            # These do not keep their results for their own backward; of other operations it is not known.
            in_place = alone and made.kind in ("conv", "linear", "batch_norm", "add")
            writes = node.op.endswith("_")
            producer = None if writes or made.kind == "add" else made.owner
            if not writes and role == "function" and made.kind == "add":
                in_place = False
        return dataclasses.replace(
            _site_at(module, child, args),
            fused_relu=relu,
            ceiling=6.0 if node.op.startswith("relu6") else None,
            in_place=in_place,
            producer=producer,
            gate=op if op in GATES and not args.symmetric else None,
            fixed=op if op in FIXED and not args.symmetric and args.num_bits == 8 else None,
        )

    def _layer(self, name: str, scheme: Scheme, source: str | None) -> LayerPlan:
        weights = scheme.weights
        module = self.modules[name]
        if weights is None:
            return LayerPlan(name, None, 0, source, None)
        fewer = self.settings.reduce_range or bool(weights.kwargs.get("reduce_range"))
        bits = weights.num_bits - (1 if fewer and weights.num_bits == 8 else 0)
        per_channel = weights.strategy != "tensor"
        if isinstance(module, TRANSPOSED) and module.groups > 1:
            per_channel = False
        axis = channel_axis(module) if per_channel else None
        learned = weights.observer == "lsq" and not is_recurrent(module)
        linear = isinstance(module, nn.Linear) or stores_transposed(module)
        block = (weights.block_size or 0) if linear else 0
        affine = not weights.symmetric
        return LayerPlan(name, axis, 2 ** (bits - 1) - 1, source, self.folds.get(name), learned, block, affine)

    def _watched(self, sites: list[QuantizerSite], norms: Iterable[str]) -> dict[str, dict[str, int]]:
        """The modules with quantized operations of their own, and those below them that compute such operations too."""
        own = {"input_quantizer", "output_quantizer"}
        owners = {site.module for site in sites if site.child not in own} - set(self.chosen.attentions)
        watched = {owner: dict(self.points.counts(owner) or {}) for owner in owners}
        for owner, counts in watched.items():
            found = {site.child.rsplit("_", 2)[0] for site in sites if site.module == owner}
            for kind in ("multiply", "gate", MATMUL):
                # Products by numbers are everywhere, and come another way in training as soon as there is a dropout.
                if not any(one == kind or one.startswith(f"{kind}_") for one in found):
                    counts.pop(kind, None)
        for name in self.layers:
            if (
                class_before_sharding(self.modules[name]) not in (*WEIGHTED, *RECURRENT_FORMS)
                and type(self.modules[name]).__name__ != PROJECTION
            ):
                watched.setdefault(name, {})[LAYER] = 1
        for read in self.chosen.reads:
            if read.module is not None:
                watched.setdefault(read.module, {})
        for norm in norms:
            if is_norm_and_more(self.modules[norm]):
                # A BatchNorm whose forward does not go along with it computes as ever.
                watched.setdefault(norm, {})[NORM] = 1
        taken = {*self.folds.values(), *self.alone}
        for node in self.trace.nodes:
            if node.op == AFFINE and node.owner not in taken:
                # Its operations are none of whom calls it.
                watched.setdefault(node.owner, {})
        placed = {site.module for site in sites}
        for node in self.trace.nodes:
            if (
                node.kind in COUNTED
                and node.is_float
                and not (self.points.is_own_module(node) and node.owner in placed)
            ):
                # A ReLU or a pool that stays in float is seen by who calls it, and is not the caller's operation.
                path = node.owner if self.points.is_own_module(node) else self.points.watched_owner(node)
                above = {call.path for call in node.stack} - {path}
                if path not in watched and above & owners:
                    watched[path] = {}
        return dict(sorted(watched.items()))

    def _slow(self) -> tuple[str, ...]:
        changed = tuple(self.layers)
        return tuple(
            name
            for name, module in self.modules.items()
            if type(module) in SLOW and any(not name or layer.startswith(f"{name}.") for layer in changed)
        )


_GO_ON = frozenset({"conv", "linear", "relu", "add", "multiply", "concat", "gate", "average_pool"})
"""Kinds of operations that compute with integers."""


def _on_one_grid(sites: Iterable[QuantizerSite], grids: Iterable[list[str]]) -> list[QuantizerSite]:
    """`sites` in which those that are named together in `grids` leave the work to the first of them."""
    together: dict[str, set[str]] = {}
    for names in grids:
        joined = set(names).union(*(together.get(name, ()) for name in names))
        together.update(dict.fromkeys(joined, joined))
    first: dict[int, str] = {}
    found: list[QuantizerSite] = []
    for site in sites:
        group = together.get(site.name)
        if group is not None and len(group) > 1:
            owner = first.setdefault(id(group), site.name)
            shared_with = None if owner == site.name else owner
            site = dataclasses.replace(site, in_place=False, producer=None, shared_with=shared_with)
        found.append(site)
    return found


def _site_at(module: str, child: str, args: ActivationScheme, readers: Iterable[str] = ()) -> QuantizerSite:
    constant = float(args.kwargs.get("averaging_constant", 0.01))
    percentile = float(args.kwargs.get("percentile", 99.99))
    return QuantizerSite(
        module,
        child,
        args.num_bits,
        args.symmetric,
        constant,
        tuple(readers),
        observer=args.observer,
        percentile=percentile,
    )
