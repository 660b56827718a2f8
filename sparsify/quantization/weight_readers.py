"""Finds who reads the parameters of layers outside of their own forward: products with a weight, and all else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sparsify.model.trace import Trace, TracedNode
from sparsify.model.wrappers import clean_name
from sparsify.quantization.conversion import is_weighted
from sparsify.quantization.read_weights import computes

__all__: list[str] = []

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that run or list their children, so that a quantizer can be no child of theirs."""


def watched_owner(modules: Mapping[str, nn.Module], node: TracedNode) -> str:
    """The user's module in whose forward the node stands: modules of torch without children are looked through."""
    for call in reversed(node.stack):
        module = modules.get(call.path)
        if module is None:
            continue
        plain = type(module).__module__.startswith("torch.nn.")
        if not plain or (any(True for _ in module.children()) and not isinstance(module, CONTAINERS)):
            return call.path
    return ""


@dataclass(frozen=True)
class ProductOfWeight:
    """A product in somebody's forward with the weight of a layer.

    Attributes:
        node: the product.
        layer: whose weight it is.
        like: whether it is the layer's own product, so that it is quantized like a call of it.
        modules: paths of the modules in whose forwards it stands, and the weight is moved for it.
    """

    node: TracedNode
    layer: str
    like: bool
    modules: tuple[str, ...]


class WeightReaders:
    """Who reads the parameters of layers outside of their own forward.

    Attributes:
        products: with their weights.
        read: names of the layers, BatchNorms too, of which parameters are read in some way.
    """

    def __init__(self, modules: Mapping[str, nn.Module], trace: Trace) -> None:
        self.trace = trace
        self.holders = _holders(modules)
        self.modules = modules
        self.products: list[ProductOfWeight] = []
        self.read: set[str] = set()
        for node in trace.nodes:
            for parameter in node.parameters:
                names, key = self.holders.get(parameter, ([], ""))
                if names and node.owner not in names:
                    self.read.update(names)
                    if key == "weight":
                        self._follow(node, parameter, names)

    def _follow(self, node: TracedNode, parameter: str, names: list[str]) -> None:
        """Notes the product that `node` is, or those that read what it moves."""
        if node.kind in _PRODUCT_KINDS:
            self._add(node, names, node.parameters[0] == parameter and node.kind in ("conv", "linear"), node)
        elif node.kind == "move":
            for user in self.trace.users(node.name):
                if user.kind in _PRODUCT_KINDS:
                    turned = (
                        user.op in ("matmul", "mm") and user.inputs[1:] == (node.name,) and self._turns(node, names)
                    )
                    self._add(user, names, turned, node)

    def _add(self, product: TracedNode, names: list[str], like: bool, source: TracedNode) -> None:
        """`names`: layers that share the weight; a product that could be that of one of them is."""
        fitting = [name for name in names if like and bool(product.inputs) and _has_kind(self.modules[name], product)]
        modules = tuple(dict.fromkeys(watched_owner(self.modules, each) for each in (product, source)))
        for name in fitting[:1] or names:
            self.products.append(ProductOfWeight(product, name, bool(fitting), modules))

    def _turns(self, node: TracedNode, names: list[str]) -> bool:
        weight: Any = self.modules[names[0]]._parameters["weight"]
        return node.op in _TURNS and not node.inputs and weight.dim() == 2 and node.shape == tuple(weight.shape)[::-1]


_PRODUCT_KINDS = ("conv", "linear", "matmul", "embedding")
_TURNS = ("t", "numpy_T", "mT", "transpose", "permute", "swapaxes", "movedim")


def _has_kind(layer: nn.Module, product: TracedNode) -> bool:
    """True if a layer of this type computes such a product."""
    function = F.linear if product.op in ("linear", "matmul", "mm") else getattr(F, product.op, None)
    return computes(layer, cast(Any, function))


def _holders(modules: Mapping[str, nn.Module]) -> dict[str, tuple[list[str], str]]:
    """{parameter: (names of the layers that hold it, by what name)}, of layers with a weight."""
    first = {id(p): name for name, p in modules[""].named_parameters()}
    found: dict[str, tuple[list[str], str]] = {}
    for name, module in modules.items():
        if is_weighted(module) or isinstance(module, _BatchNorm):
            for key, parameter in module._parameters.items():
                if parameter is not None and key in ("weight", "bias"):
                    found.setdefault(clean_name(first[id(parameter)]), ([], key))[0].append(name)
    return found
