"""Which layers of a model are quantized, which BatchNorms are folded into them, and what stays in float and why."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from sparsify.model.targets import named_modules
from sparsify.model.trace import Trace, TracedNode
from sparsify.quantization.attention import FORMS
from sparsify.quantization.conversion import is_channel_affine, is_norm_and_more, is_weighted
from sparsify.quantization.layers import NORMS, PROJECTION, WEIGHTED
from sparsify.quantization.plan import Unquantized, WeightRead
from sparsify.quantization.recurrent import RECURRENT_FORMS, is_recurrent, weight_names
from sparsify.quantization.scheme import QuantizationSettings, Scheme, below
from sparsify.quantization.weight_grid import TRANSPOSED
from sparsify.quantization.weight_readers import ProductOfWeight, WeightReaders

__all__: list[str] = []

LEFT_OUT = "left out by the recipe"
NOT_CALLED = "was not called on the example inputs"
"""Then it computes nothing, in float or otherwise."""
UNSUPPORTED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase, nn.EmbeddingBag, nn.Bilinear)
"""Modules of torch with weights that are named, with a reason, where they stay in float."""


class QuantizedLayers:
    """The layers of `model` that are quantized by `settings`.

    Attributes:
        trace: of the model.
        settings: as the recipe says.
        modules: clean name -> module; "" is the model.
        layers: name -> the scheme of a layer that is quantized.
        nodes: name -> its operations in the trace.
        attentions: MultiheadAttentions whose projections are among the layers.
        folds: layer -> the BatchNorm that is folded into it.
        ends: the node that makes the output of a layer, that of its BatchNorm where one is folded -> the layer.
        left: what stays in float, and why.
        products: with the weights of layers, in other forwards than theirs.
        reads: whose parameters are read elsewhere, and where.

    Raises:
        TargetError: a name in `settings` matches nothing.
    """

    def __init__(self, model: nn.Module, trace: Trace, settings: QuantizationSettings) -> None:
        self.trace = trace
        self.settings = settings
        self.modules = {"": model, **named_modules(model)}
        self.out = settings.left_out(model)
        self.left: list[Unquantized] = []
        candidates = [name for name, module in self.modules.items() if is_weighted(module)]
        self.schemes = settings.per_layer(model, candidates)
        self.readers = WeightReaders(self.modules, trace)
        self.layers: dict[str, Scheme] = {}
        self.nodes: dict[str, list[TracedNode]] = {}
        for name in candidates:
            why = self._why_not(name)
            if why is None:
                self.layers[name] = self.schemes[name] or settings.scheme
            else:
                self._leave(name, why)
        self.attentions: list[str] = []
        for name, module in list(self.modules.items()):
            kind = type(module).__name__
            if is_weighted(module) or kind == PROJECTION or not isinstance(module, (*WEIGHTED, *UNSUPPORTED)):
                continue
            if type(module) is nn.MultiheadAttention:
                why = self._why_no_attention(name, module)
            elif settings.per_layer(model, [name])[name] is None:
                why = LEFT_OUT
            elif isinstance(module, nn.RNNBase):
                why = self._why_not_recurrent(name, module)
            elif isinstance(module, nn.RNNCellBase):
                why = f"{kind} computes one step; an nn.{kind.removesuffix('Cell')} over all of them could be quantized"
            else:
                why = f"{kind} is not one of {', '.join(cls.__name__ for cls in WEIGHTED)} exactly"
            if why is not None:
                self._leave(name, why)
        self.products = [each for each in self.readers.products if self._quantizes(each)]
        self.callers = {each.node.name: each.layer for each in self.products if self._is_call(each)}
        self._leave_bare_weights()
        self.folds = self._find_folds()
        self.reads = self._find_reads()
        # The node that makes the output of a layer: its BatchNorm where that is folded.
        self.ends: dict[str, str] = {}
        for name in self.layers:
            for node in self.nodes[name]:
                if node.kind != "embedding":
                    last = self.folds.get(name)
                    self.ends[self.norm_node(node, last) if last else node.name] = name

    def _leave(self, what: str, why: str) -> None:
        self.left.append(Unquantized(what, why, unasked=why not in (LEFT_OUT, NOT_CALLED)))

    def _leave_bare_weights(self) -> None:
        """Names products with weights that no layer of a known type holds."""
        known = [*self.layers, *self.attentions, *(left.what for left in self.left)]
        for node in self.trace.nodes:
            if not node.parameters or node.kind not in ("conv", "linear", "matmul", "embedding") or not node.is_float:
                continue
            # Those with the weight of a layer are quantized with it, or named as it is.
            if not below(node.owner, known) and all(node is not each.node for each in self.readers.products):
                why = f"{node.parameters[0]} is not the weight of a layer; an nn.Linear or nn.Conv2d could be quantized"
                self._leave(f"{node.owner or 'the model'}: {node.op}", LEFT_OUT if self.ignores(node) else why)

    def _why_no_attention(self, name: str, module: nn.MultiheadAttention) -> str | None:
        """Takes the projections of an attention as layers; or says why not."""
        if not name:
            return "it is the whole model, and its projections have no names; put it into an nn.Sequential"
        names = [f"{name}.in_proj", f"{name}.out_proj"]
        schemes = self.settings.per_layer(self.modules[""], names)
        scheme = schemes[names[0]]
        if (
            scheme is None
            or schemes[names[1]] != scheme
            or (scheme.weights is None and scheme.input_activations is None)
        ):
            return LEFT_OUT
        if name not in self.trace.calls:
            return NOT_CALLED
        if module.bias_k is not None or module.add_zero_attn:
            return "bias_k and add_zero_attn are not supported"
        weights = [module._parameters.get(f"{one}_weight") for one in ("in_proj", *FORMS[2])]
        if weights[0] is None and None in weights[1:]:
            return "its weights are recomputed before every forward"
        calls: dict[int, list[TracedNode]] = defaultdict(list)
        for node in self.trace.of_module(name):
            if node.kind == "linear" and node.is_float:
                calls[node.stack[-1].number].append(node)
        counts = {len(nodes) for nodes in calls.values()}
        if len(calls) != self.trace.calls[name] or len(counts) != 1 or not counts <= {2, 3, 4}:
            return "its query, key and value are one tensor in some of its calls, and others in others"
        self.attentions.append(name)
        for at, one in enumerate((*FORMS[counts.pop() - 2], "out_proj")):
            layer = f"{name}.{one}"
            if layer not in self.modules:
                # The layer that `plan.apply_plan` makes; here only its type counts.
                self.modules[layer] = nn.Linear(1, 1, device="meta")
            self.nodes[layer], self.layers[layer] = [nodes[at] for nodes in calls.values()], scheme
        return None

    def _why_not_recurrent(self, name: str, module: nn.RNNBase) -> str | None:
        """Takes a recurrent layer; or says why not."""
        scheme = self.settings.per_layer(self.modules[""], [name])[name]
        if scheme is None or scheme.weights is None:
            return LEFT_OUT
        if type(module) is nn.RNN:
            return "RNN is written step by step, and would be turned to float at each; an nn.GRU or nn.LSTM is not"
        if not is_recurrent(module):
            return f"{type(module).__name__} is not one of {', '.join(cls.__name__ for cls in RECURRENT_FORMS)} exactly"
        if name not in self.trace.calls:
            return NOT_CALLED
        weights = [module._parameters.get(weight) for weight in weight_names(module)]
        if any(weight is None for weight in weights):
            return "its weights are recomputed before every forward (weight_norm or a parametrization)"
        own = {id(weight) for weight in weights}
        others = [one for path, one in self.modules.items() if path != name]
        tied = any(id(parameter) in own for one in others for parameter in one._parameters.values())
        full = {f"{name}.{weight}" if name else weight for weight in weight_names(module)}
        read = any(full & set(node.parameters) and node.owner != name for node in self.trace.nodes)
        if tied or read:
            return "others read its weights"
        self.layers[name], self.nodes[name] = scheme, []
        return None

    def _why_not(self, name: str) -> str | None:
        scheme = self.schemes[name]
        module: Any = self.modules[name]
        if scheme is None or (scheme.weights is None and scheme.input_activations is None):
            return LEFT_OUT
        others = [each for each in self.readers.products if each.layer == name and not self.ignores(each.node)]
        calls = [each.node for each in others if self._is_call(each)]
        if name not in self.trace.calls and not calls:
            if name not in self.readers.read:
                return NOT_CALLED
            if not others:
                return "it is not called; others read its weight in float"
            product = others[0].node
            where = f"{product.op} in {product.owner or 'the model'}"
            return f"it is not called; its weight goes into {where}, which is not what {type(module).__name__} computes"
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is recomputed before every forward (weight_norm or a parametrization)"
        if not weight.is_floating_point():
            return f"its weight is {weight.dtype}"
        kinds = ("embedding",) if isinstance(module, nn.Embedding) else ("conv", "linear", "matmul")
        self.nodes[name] = [node for node in self.trace.of_module(name) if node.kind in kinds and node.is_float]
        if len(self.nodes[name]) != self.trace.calls.get(name, 0):
            return "its forward is not the one of its class"
        own = sum(module._parameters.get(key) is not None for key in ("weight", "bias"))
        if type(module) not in WEIGHTED and any(
            len(node.inputs) != 1 or len(node.parameters) != own for node in self.nodes[name]
        ):
            return f"what {type(module).__name__} computes is not one operation on its weight and bias"
        if isinstance(module, nn.Embedding) and scheme.weights is None:
            return LEFT_OUT
        self.nodes[name] += calls
        return None

    def _is_call(self, product: ProductOfWeight) -> bool:
        """True if a product is computed as a call of the layer whose weight it has."""
        return product.like and all(pair.layer != product.layer or pair.why_not for pair in self.trace.pairs)

    def _quantizes(self, product: ProductOfWeight) -> bool:
        """True if a product in somebody's forward sees the rounded weight."""
        scheme = self.layers.get(product.layer)
        return scheme is not None and scheme.weights is not None and not self.ignores(product.node)

    def _find_reads(self) -> tuple[WeightRead, ...]:
        """Who reads parameters of quantized layers and of folded BatchNorms; each layer at least once."""
        called = self.trace.calls
        found = [WeightRead(each.layer, m, each.layer not in called) for each in self.products for m in each.modules]
        known = {*self.layers, *self.folds.values()} & self.readers.read - {each.layer for each in found}
        return tuple(dict.fromkeys([*found, *(WeightRead(name, None) for name in sorted(known))]))

    def computing(self, name: str) -> list[TracedNode]:
        """The products of a layer; of an Embedding those that somebody else computes with its weight."""
        return [node for node in self.nodes[name] if node.kind != "embedding"]

    def is_lent(self, name: str) -> bool:
        """True for a layer that nobody calls, and whose output the recipe does not want quantized by itself."""
        lent = name not in self.trace.calls and any(each.layer == name for each in self.products)
        return lent and self.layers[name].output_activations is None

    def caller(self, node: TracedNode) -> str:
        """The layer that computes `node`: the module that it stands in, or the one whose weight it multiplies with."""
        return self.callers.get(node.name, node.owner)

    def _find_folds(self) -> dict[str, str]:
        folds: dict[str, str] = {}
        for pair in self.trace.pairs:
            if pair.layer not in self.layers:
                continue
            why = pair.why_not
            norm: Any = self.modules.get(pair.norm)
            layer: Any = self.modules[pair.layer]
            affine = self.trace.is_affine(pair.norm) and is_channel_affine(norm)
            if why is None and type(norm) not in NORMS and not is_norm_and_more(norm) and not affine:
                why = f"{type(norm).__name__} is not a BatchNorm of torch"
            elif why is None and not affine and norm.running_mean is None:
                why = "it has no running statistics"
            elif why is None and isinstance(layer, TRANSPOSED) and layer.groups > 1:
                why = f"output channels of a grouped {type(layer).__name__} share scales"
            elif why is None and self.layers[pair.layer].weights is None:
                why = "its layer's weights stay in float"
            if why is None:
                folds[pair.layer] = pair.norm
            else:
                self.left.append(Unquantized(pair.norm, f"not folded into {pair.layer}: {why}"))
        return folds

    def norm_node(self, node: TracedNode, norm: str) -> str:
        return next(reader.name for reader in self.trace.readers[node.name] if reader.owner == norm)

    def ignores(self, node: TracedNode) -> bool:
        """True if the recipe leaves out the module that computes `node`."""
        return any(self.out(call.path) for call in node.stack if call.path) or (
            not any(call.path for call in node.stack) and self.settings.within is not None
        )
