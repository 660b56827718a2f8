"""Operations in a user's own forward: adds, products, concatenations, activations, pools, quantized where they stand.

The module whose forward they stand in is converted to a class that watches the functions it calls. The first call that
computes as many of each kind as the trace gives them their numbers, by their order; from then on each is known by the
place in the user's code that calls it, so that what training alone computes (auxiliary heads, losses) changes nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, wraps
from types import MappingProxyType
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor, nn, overrides
from torch.nn import functional as F

from sparsify.errors import SparsifyWarning
from sparsify.model.made_weights import is_in_use
from sparsify.model.targets import named_modules
from sparsify.model.trace import is_idle, is_image_mean
from sparsify.model.written_activations import WRITTEN, activation_of
from sparsify.quantization import attention_products, read_weights
from sparsify.quantization.attention_products import MATMUL
from sparsify.quantization.calling_places import calling_place
from sparsify.quantization.conversion import convert_, is_norm_and_more, is_weighted
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.fixed_and_shared import SameGrid
from sparsify.quantization.folding import AffineNorm
from sparsify.quantization.layers import QuantizedLayer, QuantizedNorm
from sparsify.quantization.wiring import Converted, Wiring, overwrite, wiring_of

__all__: list[str] = []

KINDS: tuple[str, ...] = ("add", "multiply", "concat", "relu", "gate", "average_pool")
"""The kinds of operations whose results are quantized, by their names in a trace."""
COUNTED = (*KINDS, MATMUL)
"""Those that are watched: of a matmul the operands are quantized."""
PLACED = frozenset(COUNTED)
"""Those that are known by their places."""
NORM = "batch_norm"
"""Counted in a BatchNorm that computes more than that (see `WatchedNorm`)."""
LAYER = "layer"
"""Counted in a layer of a user's class: the operation on its weight (see `WatchedLayer`)."""

_ADDS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_PRODUCTS = (
    *(torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.mul_, Tensor.multiply_),
    *(Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__),
)
_RELUS = (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6)
_SIGMOIDS = (torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_, torch.special.expit)
_TANHS = (torch.tanh, torch.tanh_, Tensor.tanh, Tensor.tanh_)
_GATES = (F.silu, F.hardswish, F.hardsigmoid)
_MEANS = (torch.mean, Tensor.mean)
_HARDTANH = "hardtanh"
"""A ReLU6 by another name, where its limits say so."""
_KIND_OF: dict[Callable[..., Any], str] = {
    **dict.fromkeys(_ADDS, "add"),
    **dict.fromkeys(_PRODUCTS, "multiply"),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "concat"),
    **dict.fromkeys(attention_products.FUNCTIONS, MATMUL),
    **dict.fromkeys(_RELUS, "relu"),
    **dict.fromkeys((*_SIGMOIDS, *_TANHS, *_GATES), "gate"),
    **dict.fromkeys(
        (F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, torch.adaptive_avg_pool1d, *_MEANS),
        "average_pool",
    ),
    F.batch_norm: NORM,
    F.hardtanh: _HARDTANH,
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d, torch.addmm), LAYER),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), LAYER),
}
"""Function -> the kind of its operation, which says what is done with it in `_BY_KIND`."""
_WRITES: frozenset[Any] = frozenset(
    (
        *(Tensor.add_, Tensor.__iadd__, torch.relu_, Tensor.relu_, torch.sigmoid_, Tensor.sigmoid_),
        *(Tensor.mul_, Tensor.multiply_, Tensor.__imul__, torch.tanh_, Tensor.tanh_),
    )
)


def child_name(kind: str, index: int) -> str:
    """The name of the quantizer of the `index`-th operation of a kind in its module."""
    return f"{kind}_{index}_quantizer"


class Watched(Converted):
    """A module whose own operations are counted, and quantized where it holds a quantizer for them."""

    _counts: dict[str, int]
    """How many operations of each kind the trace has; empty: it only keeps its operations from those who call it."""
    _places: dict[str, dict[str, int]]
    """{kind: {place in the code: which operation of the trace}}; a kind is missing until a call came as traced."""
    _asleep: list[str]
    """The quantizers of operations that training did not come to so far; these are in float."""
    _form: type[Watched]
    """What it is made of besides the user's class."""
    _reads: tuple[Converted, ...] = ()
    """Other layers, whose weights its forward reads."""
    _off: bool = False
    """Whether the trace and the calls disagreed: everything in float since."""

    @property
    def counts_operations(self) -> bool:
        """True if the trace has operations of its own that are quantized."""
        return bool(self._counts)

    @property
    def operation_counts(self) -> dict[str, int]:
        """The number of operations of each kind that the trace has."""
        return dict(self._counts)

    @property
    def operation_places(self) -> dict[str, dict[str, int]]:
        """{kind: {place in the code: which operation of the trace}}, as far as they are known."""
        return {kind: dict(places) for kind, places in self._places.items()}

    def _watch(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of the user's `forward`, its operations watched."""
        watch = _ForwardMode(self)
        stack: Any = overrides._get_current_function_mode_stack
        above = [mode for mode in stack() if isinstance(mode, _ForwardMode)]
        for mode in above:
            mode.depth += 1
        try:
            with watch:
                result = forward(self, *args, **kwargs)
        finally:
            for mode in above:
                mode.depth -= 1
        if not self._off and self._counts:
            self._compare(watch)
        return result

    def _compare(self, watch: _ForwardMode) -> None:
        """Looks at a call that is through: which operations it had, and where."""
        known = not watch.compiled and self._places.keys() >= watch.came.keys()
        counted = {NORM, LAYER} if known else {*self._counts, *watch.seen}
        if any(watch.seen.get(kind, 0) != self._counts.get(kind, 0) for kind in counted):
            self.disagree(watch.seen)
            return
        if watch.compiled:
            return
        missing: list[tuple[str, int]] = []
        for kind, came in watch.came.items():
            places = self._places.setdefault(kind, {})
            there = {places[place] for place in came if place in places}
            gone = [index for index in range(self._counts[kind]) if index not in there]
            other = [place for place in came if place not in places]
            if len(other) == len(gone):
                # As many as the trace has: the first call, or code that computes the same another way.
                places.update(zip(other, gone, strict=True))
            else:
                missing += [(kind, index) for index in gone]
        if missing and self.training:
            self._put_to_sleep(missing)

    def _put_to_sleep(self, operations: Iterable[tuple[str, int]]) -> None:
        """Leaves operations in float that training did not compute so far; one that it comes to is quantized again."""
        said: list[str] = []
        for kind, index in operations:
            found = self._quantizers(kind, index)
            never = [name for name, quantizer in found.items() if quantizer.enabled and not quantizer.batches]
            self._sleep(never)
            said += [f"{kind.replace('_', ' ')} {index}"] if never else []
        if said:
            warnings.warn(
                f"{wiring_of(self).original.__name__}.forward did not compute {', '.join(said)} (counted from 0) of "
                "its trace in training: in float until training comes there. Give sample_inputs that take the same way "
                "through the model as training does.",
                SparsifyWarning,
                stacklevel=4,
            )

    def _quantizers(self, kind: str, index: int) -> dict[str, FakeQuantize]:
        """Those of one operation that are its own."""
        names = attention_products.operands(index) if kind == MATMUL else [child_name(kind, index)]
        found = {name: self._modules.get(name) for name in names}
        return {name: quantizer for name, quantizer in found.items() if isinstance(quantizer, FakeQuantize)}

    def _sleep(self, names: Iterable[str]) -> None:
        for name in names:
            quantizer = self._modules.get(name)
            if isinstance(quantizer, FakeQuantize):
                quantizer.enabled = False
                self._asleep.append(name)

    def _wake(self, kind: str, index: int | None) -> None:
        """Quantizes an operation again that training has come to."""
        if self._asleep and self.training and index is not None:
            for name, quantizer in self._quantizers(kind, index).items():
                if name in self._asleep:
                    self._asleep.remove(name)
                    quantizer.enabled = True

    def disagree(self, seen: dict[str, int]) -> None:
        """Leaves its operations in float from now on, with one warning."""
        switch_off(self)
        others = [kind for kind in {**self._counts, **seen} if seen.get(kind, 0) != self._counts.get(kind, 0)]
        came, traced = (_name_list({kind: counts.get(kind, 0) for kind in others}) for counts in (seen, self._counts))
        warnings.warn(
            f"{wiring_of(self).original.__name__}.forward computed {came}, where its trace has {traced}. Its own "
            "operations stay in float from now on. Give sample_inputs that take the same way through the model as "
            "training does.",
            SparsifyWarning,
            stacklevel=3,
        )

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # The class is made at run time: a pickle names the class that it was made of.
        made, (_, *rest), *state = cast(Any, super().__reduce_ex__(2))
        del made, rest
        return (_unpickled, (wiring_of(self).original, self._form), *state)


class WatchedNorm(Watched, QuantizedNorm):
    """A user's subclass of BatchNorm: of its forward, what F.batch_norm computes is treated as a BatchNorm's output.

    timm's BatchNormAct2d (EfficientNet, RegNet, MobileNetV3) is one: BatchNorm, dropout and activation in one forward.
    """


class WatchedAffine(Watched, QuantizedNorm, AffineNorm):
    """A module that scales and shifts channels: FrozenBatchNorm2d, a learned scale and bias.

    It has the place of a BatchNorm: folded into the layer before it, or a layer of its own between integers.
    """

    def _watch(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (x,) = (*args, *kwargs.values())
        # Not the operations of whom calls it.
        with torch._C.DisableTorchFunction():
            return self._normed(x, lambda y: forward(self, y))

    @torch.no_grad()
    def factor_and_offset(self) -> tuple[Tensor, Tensor]:
        own = (*self.parameters(recurse=False), *self.buffers(recurse=False))
        held = [each for each in own if each.is_floating_point()]
        channels = max(each.numel() for each in held)
        # In float64 its numbers come out as they are: it computes with nothing else.
        # Numbers of shape (C, 1) or (1, C, 1) are those of a tensor of three dimensions.
        ranks = [each.dim() + (each.shape[0] != 1) for each in held if each.dim() > 1]
        rank = self._wiring.rank or max(ranks, default=4)
        ends = held[0].new_tensor([0.0, 1.0], dtype=torch.float64).reshape(2, 1, *[1] * (rank - 2))
        with torch._C.DisableTorchFunction():
            given = wiring_of(self).original.forward(self, ends.expand(2, channels, *ends.shape[2:]))
        offset, whole = given.reshape(2, channels)
        return (whole - offset).float(), offset.float()


class WatchedActivation(Watched):
    """A user's module that writes out an activation of torch (see `written_activations`), with a quantizer for it.

    It computes that activation by torch's function, of which the file has one operator.
    """

    _function: Callable[[Tensor], Tensor]

    def _watch(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        (x,) = (*args, *kwargs.values())
        quantizer: Any = self._modules.get("output_quantizer")
        if quantizer is not None and quantizer.gate is not None:
            return self._output(x)
        # Not the operations of whom calls it.
        with torch._C.DisableTorchFunction():
            y = self._function(x)
        return self._output(y)


class WatchedLayer(Watched, QuantizedLayer):
    """A layer of a user's class: of its forward, the operation on its weight is that of a quantized layer.

    A subclass of Linear or of a convolution (timm's Linear and Conv2dSame), or transformers' Conv1D.
    """

    def _operated(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The result of `func` with quantized weight and input; None if it is not called with this layer's weight."""
        names = _OPERATIONS[func]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, bias = (names[i] for i in ((1, 2, 0) if func is torch.addmm else (0, 1, 2)))
        if not self._is_own(given.get(weight)):
            return None
        given[x] = self._input(given[x])
        given[weight], given[bias] = self._weights()
        first = [given.pop(name) for name in names]
        return self._output(func(*first, *args[len(names) :], **given))

    def _is_own(self, weight: object) -> bool:
        return is_in_use(self, "weight", weight)


_OPERATIONS: dict[Any, tuple[str, str, str]] = {
    **dict.fromkeys((F.linear, F.conv1d, F.conv2d, F.conv3d), ("input", "weight", "bias")),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), ("input", "weight", "bias")),
    torch.addmm: ("input", "mat1", "mat2"),
}


class _ForwardMode(overrides.TorchFunctionMode):
    """One call of a `Watched` module's forward.

    `depth` counts the watched modules that are at work inside: their operations are not ours.
    """

    def __init__(self, module: Watched) -> None:
        super().__init__()
        self.module = module
        self.depth = 0
        self.seen: dict[str, int] = dict.fromkeys(module._counts, 0)
        # A compiler follows no frames: there operations are known by their order alone.
        self.compiled = torch.compiler.is_dynamo_compiling()
        self.came: dict[str, list[str]] = {kind: [] for kind in module._counts if kind in PLACED}
        self.times: dict[tuple[str, str], int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        kind = _KIND_OF.get(func)
        if self.depth or self.module._off:
            return func(*args, **kwargs)
        if self.module._reads:
            found = read_weights.operated(self.module._reads, func, args, kwargs)
            if found is not None:
                if kind in self.came:
                    self.count(kind, self.which(kind)[1])
                return found[0]
        if kind is None:
            return func(*args, **kwargs)
        return _BY_KIND[kind](self, kind, func, args, kwargs)

    def which(self, kind: str) -> tuple[int | None, str]:
        """(which operation of the trace is the one of this kind that is called now; None: none of them. Its place)."""
        order = self.seen[kind]
        if self.compiled:
            return order, ""
        place = calling_place(Watched._watch.__code__)
        times = self.times.get((kind, place), 0)
        place = f"{place} ({times})" if times else place
        known = self.module._places.get(kind)
        return (order if known is None else known.get(place)), place

    def count(self, kind: str, place: str) -> None:
        """Notes that an operation was computed."""
        self.seen[kind] += 1
        if not self.compiled:
            self.came[kind].append(place)
            first = place.partition(" (")[0]
            self.times[kind, first] = self.times.get((kind, first), 0) + 1

    def layer(self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation on a weight: that of a layer of a user's class, if the weight is its own."""
        operated = self.module._operated(func, args, kwargs) if isinstance(self.module, WatchedLayer) else None
        if operated is None:
            return func(*args, **kwargs)
        self.seen[kind] = self.seen.get(kind, 0) + 1
        return operated

    def norm(self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """F.batch_norm: that of a user's subclass of BatchNorm."""
        if not isinstance(self.module, WatchedNorm):
            return self.result(kind, func, args, kwargs)
        first, *others = args or (kwargs.pop("input"),)
        if kind in self.seen:
            self.seen[kind] += 1
        return self.module._normed(first, lambda x: func(x, *others, **kwargs))

    def hardtanh(self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """F.hardtanh: a ReLU where it is a ReLU6."""
        if (*args[1:3], *kwargs.values())[:2] != (0.0, 6.0):
            return func(*args, **kwargs)
        return self.result("relu", func, args, kwargs)

    def sum_or_product(self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An add or a product; one that changes nothing is none."""
        if is_idle("add" if kind == "add" else "mul", args):
            return func(*args, **kwargs)
        return self.result(kind, func, args, kwargs)

    def pool(self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An average pool; a mean is one if it is taken over the pixels of images."""
        if func in _MEANS and kind in self.seen:
            pooled = func(*args, **kwargs)
            if not is_image_mean((args[0] if args else kwargs["input"]).shape, pooled.shape):
                return pooled
        return self.result(kind, func, args, kwargs)

    def matmul(self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A product of two activations, of which the operands are quantized."""
        if kind not in self.seen:
            return func(*args, **kwargs)
        index, place = self.which(kind)
        self.count(kind, place)
        quantize = None if index is None else attention_products.quantize_of(self.module, index)
        if quantize is None:
            return func(*args, **kwargs)
        self.module._wake(kind, index)
        return attention_products.product(quantize, func, args, kwargs)

    def result(self, kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation whose result is quantized, if the module holds a quantizer for it."""
        if kind not in self.seen:
            return func(*args, **kwargs)
        index, place = self.which(kind)
        name = None if index is None else child_name(kind, index)
        quantizer = None if name is None else cast("FakeQuantize | SameGrid | None", self.module._modules.get(name))
        if quantizer is None:
            result = func(*args, **kwargs)
            # An add of integers (BatchNorm's counter) is not counted.
            if isinstance(result, Tensor) and result.is_floating_point():
                self.count(kind, place)
            return result
        self.module._wake(kind, index)
        target = _written_to(kind, func, args, kwargs)
        if target is not None and not target.is_floating_point():
            return func(*args, **kwargs)
        if kind == "relu" or quantizer.gate is not None:
            given = args[0] if args else kwargs["input"]
            # The backward of a gate keeps what it reads, and where a target is given that is about to be written.
            result = quantizer(given.clone() if target is not None and quantizer.gate is not None else given)
        else:
            # Out of place, whatever was written: the quantizer may keep what it gets, which must not change below.
            kwargs = {name: value for name, value in kwargs.items() if name not in ("out", "inplace")}
            if target is not None and func in _GATES:
                # Their backward keeps what they read, and that is about to be written.
                args, kwargs = (target.clone(),), {}
            result = _computed(kind, func, args, kwargs)
            if not result.is_floating_point():
                return result if target is None else target.copy_(result)
            result = quantizer(result)
        self.count(kind, place)
        # x.add_(y) as a statement: its result is not used, x is.
        return result if target is None or result is target else target.copy_(result)


_BY_KIND: dict[str, Callable[[_ForwardMode, str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]] = {
    **dict.fromkeys(("concat", "relu", "gate"), _ForwardMode.result),
    **dict.fromkeys(("add", "multiply"), _ForwardMode.sum_or_product),
    "average_pool": _ForwardMode.pool,
    MATMUL: _ForwardMode.matmul,
    NORM: _ForwardMode.norm,
    LAYER: _ForwardMode.layer,
    _HARDTANH: _ForwardMode.hardtanh,
}


def _written_to(kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that an operation writes to; None: it makes a new one."""
    positional = (kind == "relu" and len(args) in (2, 4)) or (func in _GATES and len(args) == 2)
    if func in _WRITES or kwargs.get("inplace") or (positional and args[-1]):
        return cast(Tensor, args[0])
    return kwargs.get("out")


def _computed(kind: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The result of an operation, out of place."""
    if kind == "add":
        return torch.add(*args, **kwargs)
    if kind == "multiply":
        return torch.mul(*args, **kwargs)
    if func in _SIGMOIDS:
        return torch.sigmoid(*args, **kwargs)
    if func in _TANHS:
        return torch.tanh(*args, **kwargs)
    result: Tensor = func(*(args[:1] if func in _GATES else args), **kwargs)
    return result


def reads_of(module: nn.Module) -> tuple[Converted, ...]:
    """Other layers whose weights the forward of a watched module reads."""
    return module._reads if isinstance(module, Watched) else ()


def note_reads(module: Watched, layers: tuple[Converted, ...]) -> None:
    """Has a watched module see where its forward reads the weights of `layers`, which keep them when deployed."""
    overwrite(module, "_reads", layers)


def watch(
    module: nn.Module,
    counts: Mapping[str, int],
    places: Mapping[str, Mapping[str, int]] = MappingProxyType({}),
    form: type[Watched] | None = None,
) -> Wiring:
    """Converts a user's module, in place, to one that counts its operations."""
    wiring = convert_(module, watching_class(type(module), form or _form(module)))
    overwrite(module, "_counts", dict(counts))
    overwrite(module, "_places", {kind: dict(known) for kind, known in places.items()})
    overwrite(module, "_asleep", [])
    return wiring


def watch_activation(module: nn.Module) -> None:
    """Converts a user's module that writes out an activation, in place."""
    name = activation_of(module.forward)
    assert name is not None, type(module).__name__
    watch(module, {}, form=WatchedActivation)
    overwrite(module, "_function", WRITTEN[name])


def operation_places(model: nn.Module) -> dict[str, dict[str, dict[str, int]]]:
    """{module: its `operation_places`}, of the modules below `model` whose operations are watched."""
    modules = {"": model, **named_modules(model)}
    found = {name: module.operation_places for name, module in modules.items() if isinstance(module, Watched)}
    return {name: places for name, places in found.items() if places}


def switch_off(module: Watched) -> None:
    """Leaves the operations of this module in float; layers that read them have float inputs from now on."""
    overwrite(module, "_off", True)
    wiring = wiring_of(module)
    if wiring.layer is not None:
        # Its forward is unknown, and so is what it does with a BatchNorm that passes through.
        wiring_of(wiring.layer).norm = None
        wiring.layer = None
    if wiring.norm is not None:
        wiring_of(wiring.norm).layer = None
        wiring.norm = None
    for each in (module, *(layer for layer in module._reads if wiring_of(layer).lent)):
        wiring_of(each).enabled = False
        for child in each._modules.values():
            if isinstance(child, FakeQuantize):
                child.enabled = False


def switched_off(model: nn.Module) -> list[str]:
    """Clean names of the modules whose own operations compute in float since trace and calls disagreed."""
    modules = {"": model, **named_modules(model)}
    return [name for name, module in modules.items() if isinstance(module, Watched) and module._off]


def switch_off_all(model: nn.Module, names: Iterable[str]) -> None:
    """`switch_off` for the modules of these names."""
    modules = {"": model, **named_modules(model)}
    for name in names:
        module = modules.get(name)
        if isinstance(module, Watched):
            switch_off(module)


def asleep(model: nn.Module) -> list[str]:
    """Clean names of the quantizers of operations that training did not come to, which are in float therefore."""
    modules = {"": model, **named_modules(model)}
    watched = {name: module for name, module in modules.items() if isinstance(module, Watched) and not module._off}
    return [f"{name}.{child}" if name else child for name, module in watched.items() for child in module._asleep]


def put_to_sleep(model: nn.Module, names: Iterable[str]) -> None:
    """Leaves the operations with the quantizers of these names in float until training comes to them."""
    modules = {"": model, **named_modules(model)}
    for name in names:
        path, _, child = name.rpartition(".")
        module = modules.get(path)
        if isinstance(module, Watched) and child not in module._asleep:
            module._sleep([child])


def _form(module: nn.Module) -> type[Watched]:
    if is_norm_and_more(module):
        return WatchedNorm
    return WatchedLayer if is_weighted(module) else Watched


def watching_class(original: type[nn.Module], form: type[Watched]) -> type[Watched]:
    """The watched form of a user's class: a subclass of it and of `form`, made once."""
    return _made_once(cast(Any, original), cast(Any, form))


@cache
def _made_once(original: type[nn.Module], form: type[Watched]) -> type[Watched]:
    inner = original.forward

    # The signature is that of the user's: torch.export and trainers look at it.
    @wraps(inner)
    def forward(self: Watched, *args: Any, **kwargs: Any) -> Any:
        return self._watch(inner, args, kwargs)

    made: Callable[..., type[Watched]] = type
    return made(
        f"Quantized{original.__name__}",
        (form, original),
        {"__module__": __name__, "__doc__": original.__doc__, "forward": forward, "_form": form},
    )


def _unpickled(original: type[nn.Module], form: type[Watched]) -> nn.Module:
    cls = watching_class(original, form)
    return cls.__new__(cls)


def _name_list(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind.replace('_', ' ')}{'' if count == 1 else 's'}" for kind, count in counts.items())
