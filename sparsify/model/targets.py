"""Names in a recipe -> the parameters and layers of a model that they mean.

A name is exact ("layer1.0.conv1", "layer1.0.conv1.weight"), a pattern ("re:layer1.*weight", matched from the start),
the type of a layer ("Linear"), `__ALL__`, or `__ALL_PRUNABLE__`. Prefixes that wrappers add are transparent, and a tied
parameter is one parameter, found under each of its names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparsify.errors import DataError, SparsifyWarning, TargetError
from sparsify.model.adapters import names_without_adapters
from sparsify.model.experts import expert_stacks
from sparsify.model.recomputed import Recomputed, recomputed_weights
from sparsify.model.sharding import is_sharded, local, totals
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
    model: nn.Module,
    names: str | Iterable[str],
    *,
    where: str,
    strict: bool = True,
    ignore: Iterable[str] = (),
    to_mask: bool = False,
) -> dict[str, nn.Parameter]:
    """The parameters that `names` mean, under their clean names, in the model's order.

    A layer's name or type means its weight, and `__ALL_PRUNABLE__` stacked experts too; a pattern is matched against
    the names of parameters and, where it matches none, of layers. A weight that is recomputed before every forward
    (weight_norm) means the parameter that holds its direction. Names from before peft put adapters in are known too.

    Args:
        model: the model whose parameters they are.
        names: one or several names, in the forms that the top of this file tells.
        where: the field that the names were written in, "GMPruningModifier.params"; errors begin with it.
        strict: False warns of a name that matches nothing instead of raising.
        ignore: names, in the same forms, that are taken out again; they may match nothing.
        to_mask: True where zeros are to last in what is found: a pattern leaves out the norms of recomputed weights,
            and what zeros do not last in is refused.

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
    recomputed = recomputed_weights(model)
    aliases |= {name: made.direction for name, made in recomputed.items() if made.direction is not None}
    norms = {norm for made in recomputed.values() if made.direction is not None for norm in made.others}
    lost = {own: made for made in recomputed.values() if made.direction is None for own in made.others}

    def weight_of(name: str) -> str | None:
        made = recomputed.get(f"{name}.weight" if name else "weight")
        if made is not None:
            return made.direction
        own = getattr(modules[name], "weight", None)
        return first.get(id(own)) if isinstance(own, nn.Parameter) else None

    def refuse_lost(name: str) -> None:
        made = recomputed.get(f"{name}.weight" if name else "weight")
        if made is not None and made.direction is None:
            _refuse_recomputed(model, made, where)

    def find(name: str) -> list[str]:
        if name == ALL:
            return [found for found in parameters if not (to_mask and found in norms)]
        exact = name if name in aliases or name in layers else clean_name(name)
        if exact in aliases:
            return [aliases[exact]]
        if exact in layers:
            weight = weight_of(exact)
            refuse_lost(exact)
            if weight is None:
                raise TargetError(
                    f"{where}: {name!r} is a {type(layers[exact]).__name__} without a weight of its own. "
                    f"{_way_in(model, [exact])}"
                )
            return [weight]
        if name.startswith("re:"):
            found = [aliases[alias] for alias in _matching(name, aliases, where)]
            if to_mask and not norms.issuperset(found):
                found = [one for one in found if one not in norms]
            return found or [w for layer in _matching(name, layers, where) if (w := weight_of(layer)) is not None]
        of_type = [layer for layer, module in modules.items() if _is(module, name)]
        for layer in of_type:
            refuse_lost(layer)
        if not of_type and "." in exact:
            refuse_lost(exact.rpartition(".")[0])
        stacks = [aliases[stack] for stack in expert_stacks(model)] if name == ALL_PRUNABLE else []
        return [w for layer in of_type if (w := weight_of(layer)) is not None] + stacks

    for other, name in names_without_adapters(model, list(aliases)):
        aliases.setdefault(other, aliases[name])
    for other, name in names_without_adapters(model, list(layers)):
        modules.setdefault(other, modules[name])
        layers.setdefault(other, layers[name])
    chosen = _choose(model, names, find, (*aliases, *layers), where=where, strict=strict, ignore=ignore)
    for name in chosen if to_mask else ():
        if name in lost:
            _refuse_recomputed(model, lost[name], where)
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
    for other, name in names_without_adapters(model, list(layers)):
        layers.setdefault(other, layers[name])

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


def still_there(parameters: Mapping[str, nn.Parameter], names: Iterable[str], *, where: str) -> dict[str, nn.Parameter]:
    """Those of `parameters` that were resolved as `names` before.

    Raises:
        TargetError: one is no longer among them.
    """
    names = list(names)
    for name in names:
        if name not in parameters:
            raise TargetError(
                f"{where}: {name!r} is no longer a parameter of the model: its layer was replaced since modify(). Call "
                "finalize() before layers are replaced, and modify() afterwards."
            )
    return {name: parameters[name] for name in names}


def refuse_without_values(model: nn.Module, named: Iterable[nn.Parameter | nn.Module], *, where: str) -> None:
    """Checks that what was named is not on the meta device.

    Raises:
        TargetError: a parameter is; the message names it.
    """
    meant = {id(p) for one in named for p in ([one] if isinstance(one, nn.Parameter) else one.parameters())}
    for name, parameter in named_parameters(model).items():
        if parameter.is_meta and id(parameter) in meant:
            raise TargetError(
                f"{where}: {name!r} is on the meta device and holds no values. Give it some before modify(), with "
                "load_state_dict(assign=True) or to_empty() and its own initialization."
            )


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
    strange = not_finite({n: p for n, p in parameters.items() if not p.is_meta}) if values else []
    for name in strange:
        raise DataError(
            f"{where}: {name!r} holds NaN or infinity, which cannot be ranked. Load weights that are finite, or "
            "find the step at which training diverged."
        )


def not_finite(parameters: Mapping[str, Tensor]) -> list[str]:
    """Those that hold NaN or infinity, in a part on any rank; asked of all sharded ones together."""
    plain = {name: not is_finite(p) for name, p in parameters.items() if not is_sharded(p)}
    sharded = {name: p for name, p in parameters.items() if is_sharded(p)}
    strange = {**plain, **totals(sharded, {name: int(not is_finite(local(p))) for name, p in sharded.items()})}
    return [name for name in parameters if strange[name]]


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


def _refuse_recomputed(model: nn.Module, made: Recomputed, where: str) -> None:
    name = made.layer or type(model).__name__
    raise TargetError(f"{where}: the weight of {name!r} {made.why_not}.")


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
    of_type = [own for own, module in _aliased_modules(model).items() if _is(module, name)]
    if of_type:
        owners = ", ".join(repr(own) if own else "the model itself" for own in of_type[:3])
        has = "has" if len(of_type) == 1 else "have"
        return (
            f"{where}: {name!r} is the type of {owners}, which {has} no parameter 'weight'. {_way_in(model, of_type)}"
        )
    text = f"{where}: {name!r} matches nothing in {type(model).__name__}."
    types = {type(module).__name__ for module in model.modules()}
    near = get_close_matches(name.removeprefix("re:"), [*known, *types, ALL, ALL_PRUNABLE], n=3, cutoff=0.5)
    hint = "" if name.startswith("re:") else " Use 're:...' for a regular expression."
    return f"{text}\n  Closest: {', '.join(map(repr, near))}.{hint}" if near else f"{text}{hint}"


def _way_in(model: nn.Module, layers: Sequence[str]) -> str:
    """The way out where layers without a weight of their own were named: the parameters inside, and a pattern."""
    prefixes = tuple(f"{layer}." if layer else "" for layer in layers)
    # Weights first: a bias is seldom meant.
    found = [name for name in named_parameters(model) if name.startswith(prefixes)]
    found.sort(key=lambda name: "bias" in name.rpartition(".")[2])
    if not found:
        return "There is no parameter inside: leave it out."
    weights = any(name.startswith(f"{prefixes[0]}weight") for name in found)
    pattern = "re:" + prefixes[0].replace(".", r"\.") + ("weight" if weights else "") + ".*"
    return f"Name the parameters, like {', '.join(map(repr, found[:6]))}, or several by a pattern, like '{pattern}'."
