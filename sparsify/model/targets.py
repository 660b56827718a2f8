"""Names in a recipe -> the parameters and layers of a model that they mean.

A name is exact ("layer1.0.conv1", "layer1.0.conv1.weight"), a pattern ("re:layer1.*weight", matched from the start),
the type of a layer ("Linear"), `__ALL__`, or `__ALL_PRUNABLE__`. Prefixes that wrappers add are transparent, and a tied
parameter is one parameter, found under each of its names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsify.errors import DataError, SparsifyWarning, TargetError
from sparsify.model.wrappers import WRAPPER_PARTS, by_clean_name, clean_name

__all__: list[str] = []

ALL = "__ALL__"
ALL_PRUNABLE = "__ALL_PRUNABLE__"

_PRUNABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under its clean name, in the model's order; a tied one once, under its first name."""
    return by_clean_name(model.named_parameters(remove_duplicate=True))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module below `model` under its clean name; a shared one once, under its first. Wrappers are left out."""
    return {name: module for name, module in by_clean_name(model.named_modules(remove_duplicate=True)).items() if name}


def resolve_parameters(
    model: nn.Module, names: str | Iterable[str], *, where: str, strict: bool = True, ignore: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """The parameters that `names` mean, under their clean names, in the model's order.

    A layer's name or type means its weight; a pattern is matched against the names of parameters and, where it matches
    none, of layers.

    Args:
        model: the model whose parameters they are.
        names: one or several names, in the forms that the top of this file tells.
        where: the field that the names were written in, "GMPruningModifier.params"; errors begin with it.
        strict: False warns of a name that matches nothing instead of raising.
        ignore: names, in the same forms, that are taken out again; they may match nothing.

    Raises:
        TargetError: a name matches nothing, or a layer whose weight is not a parameter of its own.
    """
    parameters = named_parameters(model)
    first = {id(parameter): name for name, parameter in parameters.items()}
    aliases = {
        name: first[id(parameter)]
        for name, parameter in by_clean_name(model.named_parameters(remove_duplicate=False)).items()
    }
    modules = _aliased_modules(model)
    # The model itself has no name, but may be a layer of a type.
    layers = {name: module for name, module in modules.items() if name}

    def weight_of(name: str) -> str | None:
        own = getattr(modules[name], "weight", None)
        return first.get(id(own)) if isinstance(own, nn.Parameter) else None

    def find(name: str) -> list[str]:
        if name == ALL:
            return list(parameters)
        exact = name if name in aliases or name in layers else clean_name(name)
        if exact in aliases:
            return [aliases[exact]]
        if exact in layers:
            weight = weight_of(exact)
            _refuse_recomputed(model, exact, layers[exact], where)
            if weight is None:
                raise TargetError(
                    f"{where}: {name!r} is a {type(layers[exact]).__name__} without a weight of its own. Name one "
                    f"of its parameters{_listing(p for p in parameters if p.startswith(exact + '.'))}."
                )
            return [weight]
        if name.startswith("re:"):
            found = [aliases[alias] for alias in _matching(name, aliases, where)]
            return found or [w for layer in _matching(name, layers, where) if (w := weight_of(layer)) is not None]
        of_type = [layer for layer, module in modules.items() if _is(module, name)]
        for layer in of_type:
            _refuse_recomputed(model, layer or type(modules[layer]).__name__, modules[layer], where)
        if not of_type and "." in exact:
            owner = exact.rpartition(".")[0]
            if owner in layers:
                _refuse_recomputed(model, owner, layers[owner], where)
        return [w for layer in of_type if (w := weight_of(layer)) is not None]

    chosen = _choose(model, names, find, (*aliases, *layers), where=where, strict=strict, ignore=ignore)
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def resolve_layers(
    model: nn.Module, names: str | Iterable[str], *, where: str, strict: bool = True, ignore: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The layers that `names` mean, under their clean names, in the model's order.

    The name of a parameter means its layer; `__ALL__` means the layers without children, and the prunable ones whatever
    they hold. Arguments and errors as in `resolve_parameters`.
    """
    modules = named_modules(model)
    first = {id(module): name for name, module in modules.items()}
    layers = {name: module for name, module in _aliased_modules(model).items() if name}
    parameters = set(by_clean_name(model.named_parameters(remove_duplicate=False)))

    def find(name: str) -> list[str]:
        if name == ALL:
            whole = [n for n, module in modules.items() if is_prunable_layer(module)]
            inside = tuple(f"{n}." for n in whole)
            leaves = [n for n, m in modules.items() if not any(m.children()) and not n.startswith(inside)]
            return [*whole, *leaves]
        exact = name if name in layers else clean_name(name)
        if exact in layers:
            return [first[id(layers[exact])]]
        if exact in parameters and (owner := exact.rpartition(".")[0]) in layers:
            return [first[id(layers[owner])]]
        if name.startswith("re:"):
            return [first[id(layers[layer])] for layer in _matching(name, layers, where)]
        return [first[id(module)] for module in layers.values() if _is(module, name)]

    chosen = _choose(model, names, find, tuple(layers), where=where, strict=strict, ignore=ignore)
    return {name: module for name, module in modules.items() if name in chosen}


def is_prunable_layer(module: nn.Module) -> bool:
    """True if `__ALL_PRUNABLE__` means this layer: Linear, convolutions, Embedding, transformers' Conv1D, and what was
    derived from them (a quantized layer is a subclass)."""
    # transformers' Conv1D by name: importing transformers for an isinstance costs seconds.
    return isinstance(module, _PRUNABLE) or _is(module, "Conv1D")


def input_dim(module: nn.Module) -> int:
    """The dimension of the weight of `module` along which its input channels lie."""
    transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return 0 if transposed or _is(module, "Conv1D") else 1


def owners(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The clean name of every parameter, the module that holds it, and what it is called there."""
    held: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for own, parameter in module._parameters.items():
            if parameter is not None:
                held.setdefault(id(parameter), (module, own))
    for name, parameter in named_parameters(model).items():
        yield name, *held[id(parameter)]


class Held:
    """Some parameters of a model, looked up at each call of `now`: a loaded checkpoint may have replaced the objects.

    >>> Held(nn.Linear(2, 1), ["weight"]).now().keys()
    dict_keys(['weight'])
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self._model = model
        self._names = set(names)
        self._places: list[tuple[str, nn.Module, str]] = []
        self.refresh()

    def refresh(self) -> None:
        """Looks the places up again, for a model in which modules were replaced."""
        self._places = [place for place in owners(self._model) if place[0] in self._names]

    def now(self) -> dict[str, nn.Parameter]:
        """The parameters by name, in the model's order. Costs a dictionary's look-up for each."""
        found = ((name, module._parameters.get(own)) for name, module, own in self._places)
        return {name: parameter for name, parameter in found if parameter is not None}


def refuse_unusable(parameters: Mapping[str, Tensor], *, where: str, values: bool = True) -> None:
    """Checks that weights can be ranked and masked.

    Raises:
        TargetError: a parameter without a shape yet, or of a dtype that cannot be ranked.
        DataError: with `values`, a parameter that holds NaN or infinity.
    """
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise TargetError(
                f"{where}: {name!r} has no shape yet (a lazy module). Run one batch through the model before modify()."
            )
        if parameter.dtype not in _FLOATS:
            raise TargetError(
                f"{where}: {name!r} is {str(parameter.dtype).removeprefix('torch.')}; only float16, bfloat16, "
                "float32 and float64 weights can be pruned. Leave it out."
            )
        if values and not parameter.is_meta and not is_finite(parameter):
            raise DataError(
                f"{where}: {name!r} holds NaN or infinity, which cannot be ranked. Load weights that are finite, or "
                "find the step at which training diverged."
            )


def is_finite(tensor: Tensor) -> bool:
    """True if no value is NaN or infinite."""
    values = tensor.detach()
    if not values.is_floating_point():
        return bool(values.isfinite().all())
    # A sum is several times faster than isfinite().all(), and finite unless a value is not, or it overflows: then look.
    return bool(values.sum(dtype=torch.float64).isfinite()) or bool(values.isfinite().all())


def _aliased_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under each of its clean names, the model itself under ""."""
    return by_clean_name(model.named_modules(remove_duplicate=False))


def _is(module: nn.Module, type_name: str) -> bool:
    """True if `type_name` is the class of `module`, or one that it was derived from, below nn.Module."""
    if type_name == ALL_PRUNABLE:
        return is_prunable_layer(module)
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return False
        if cls.__name__ == type_name:
            return True
    return False


def _matching(name: str, known: Iterable[str], where: str) -> list[str]:
    """Those that the pattern `name` matches from the start; one that was written for a wrapped model too."""
    text = name.removeprefix("re:")
    try:
        match = re.compile(text).match
    except re.error as error:
        raise TargetError(f"{where}: {name!r} is no regular expression: {error}.") from None
    found = [one for one in known if match(one)]
    # "re:module.conv.*": only where the wrapper's whole name is written, or a pattern like "re:m" would mean all.
    wrapper = re.match(r"\w+", text)
    if not found and wrapper and wrapper.group() in WRAPPER_PARTS:
        found = [one for one in known if match(f"{wrapper.group()}.{one}")]
    return found


def _refuse_recomputed(model: nn.Module, name: str, module: nn.Module, where: str) -> None:
    by_parametrization = "weight" in getattr(module, "parametrizations", {})
    by_hook = isinstance(getattr(module, "weight", None), Tensor) and (
        "weight_g" in module._parameters or "weight_orig" in module._parameters
    )
    if by_parametrization or by_hook:
        kind = "a parametrization" if by_parametrization else "a hook (weight_norm, torch's own pruning)"
        raise TargetError(
            f"{where}: the weight of {name!r} is recomputed before every forward by {kind}, so zeros in it would "
            "not last. Remove it first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm), or "
            "leave the layer out."
        )


def _choose(
    model: nn.Module,
    names: str | Iterable[str],
    find: Callable[[str], list[str]],
    known: Iterable[str],
    *,
    where: str,
    strict: bool,
    ignore: Iterable[str],
) -> set[str]:
    chosen: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        found = find(name)
        if not found:
            message = _nothing(model, name, known, where)
            if strict:
                raise TargetError(message)
            warnings.warn(message, SparsifyWarning, stacklevel=4)
        chosen.update(found)
    for name in [ignore] if isinstance(ignore, str) else ignore:
        chosen.difference_update(find(name))
    return chosen


def _nothing(model: nn.Module, name: str, known: Iterable[str], where: str) -> str:
    text = f"{where}: {name!r} matches nothing in {type(model).__name__}."
    types = {type(module).__name__ for module in model.modules()}
    near = get_close_matches(name.removeprefix("re:"), [*known, *types, ALL, ALL_PRUNABLE], n=3, cutoff=0.5)
    hint = "" if name.startswith("re:") else " Use 're:...' for a regular expression."
    return f"{text}\n  Closest: {', '.join(map(repr, near))}.{hint}" if near else f"{text}{hint}"


def _listing(names: Iterable[str]) -> str:
    first = list(names)[:3]
    return f", like {', '.join(map(repr, first))}" if first else ""
