"""Averages of a model's weights (EMA, SWA): masked as the model is, and of its structure.

Where a weight has just been masked, its average is not zero, and comes near to it over thousands of steps. Set to zero
once, when the mask is set, it stays zero, since averages of zeros are zeros. An average that was made before layers
were quantized or channels removed gets the same structure before it is updated from them.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sparsify.model.made_weights import makers
from sparsify.model.wrappers import by_clean_name, unwrapped
from sparsify.pruning.masker import Masker
from sparsify.quantization.conversion import copy_ranges
from sparsify.quantization.plan import is_quantized

__all__: list[str] = []

# Methods that move an average, by the module, the class and the name; those of modules that nobody imported are not
# there. Seen in timm 1.0.31, ema_pytorch 0.8.3 and lightning 2.6.6, which gives the two models to a static method.
_UPDATES = (
    ("torch.optim.swa_utils", "AveragedModel", "update_parameters"),
    ("timm.utils.model_ema", "ModelEma", "update"),
    ("timm.utils.model_ema", "ModelEmaV2", "update"),
    ("timm.utils.model_ema", "ModelEmaV3", "update"),
    ("ema_pytorch.ema_pytorch", "EMA", "update"),
    ("lightning.pytorch.callbacks.stochastic_weight_avg", "StochasticWeightAveraging", "update_parameters"),
    ("pytorch_lightning.callbacks.stochastic_weight_avg", "StochasticWeightAveraging", "update_parameters"),
)


class Averages:
    """The averages of one model that are masked with it.

    Those of torch, timm, ema_pytorch and Lightning are found when they are updated from this model: while `watch` is
    on, the methods that do it tell of it. Others are given.

    Args:
        model: the model that is trained.
        masker: its masks.
        structure: gives a copy of the model, as it was before training, the structure that the model has by now.
    """

    def __init__(self, model: nn.Module, masker: Masker, structure: Callable[[nn.Module], None]) -> None:
        self._model = model
        self._masker = masker
        self._structure = structure
        # Averages, and for each the parameter that stands for one of the model, by the name of that.
        self._known: weakref.WeakKeyDictionary[nn.Module, list[str | None]] = weakref.WeakKeyDictionary()
        self._followed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._version = -1

    def follow(self, average: nn.Module) -> None:
        """Masks `average`, a copy of the model, from now on, and gives it the structure that the model gets."""
        if set(self._masker.names) <= by_clean_name(average.named_parameters()).keys():
            self._bring_along(average)
        self._masker.apply_to(average)
        self._followed.add(average)
        clean = {id(parameter): name for name, parameter in by_clean_name(average.named_parameters()).items()}
        self._known[average] = [clean.get(id(parameter)) for parameter in average.parameters()]

    def watch(self) -> None:
        """From now on updates of averages are seen."""
        _FOLLOWING.add(self)
        _patch()

    def close(self) -> None:
        """Masks all averages once more; updates are no longer seen. May be called twice."""
        self.apply(always=True)
        _FOLLOWING.discard(self)
        if not _FOLLOWING:
            _restore()

    def apply(self, always: bool = False) -> None:
        """Masks the averages where a mask has changed since the last time; gives followed ones the structure."""
        for average in list(self._followed):
            self._bring_along(average)
            copy_ranges(self._model, average)
        if always or self._version != self._masker.version:
            self._version = self._masker.version
            for average in list(self._known):
                self._apply_to(average)

    def of(self, parameter: Tensor) -> list[Tensor]:
        """The averages of one parameter of the model, which callbacks put into its place for an evaluation."""
        clean = by_clean_name(self._model.named_parameters())
        mine = [name for name, own in clean.items() if own is parameter] if self._known else []
        pairs = [
            pair for average, names in self._known.items() for pair in zip(average.parameters(), names, strict=False)
        ]
        return [found for found, name in pairs if name in mine]

    def updating(self, average: nn.Module, source: nn.Module) -> None:
        """To be called before `average` is updated from `source`: it gets the structure that this model has by now.

        Updates pair tensors by position or by name, and there are other ones where layers were quantized or channels
        removed in the meantime.
        """
        copy = self._copy_in(average, source)
        if copy is not None:
            self._bring_along(copy)

    def _copy_in(self, average: nn.Module, source: nn.Module) -> nn.Module | None:
        """The part of `average` that is of the model, which is a part of `source`; None where it is none."""
        found = next((path for path, module in unwrapped(source).named_modules() if module is self._model), None)
        return None if found is None else dict(average.named_modules()).get(found)

    def _bring_along(self, copy: nn.Module) -> None:
        if _structure_of(copy) != _structure_of(self._model):
            self._structure(copy)

    def updated(self, average: nn.Module, source: nn.Module) -> None:
        """To be called when `average` was updated from `source`: nothing comes of it where that is another model."""
        copy = self._copy_in(average, source)
        if copy is not None:
            # As running statistics are, not averaged: an average of ranges lags behind what the weights give.
            copy_ranges(self._model, copy)
        if average in self._known:
            return
        names = {id(p): name for name, p in by_clean_name(self._model.named_parameters()).items()}
        # By position, as they are averaged.
        found = [names.get(id(parameter)) for parameter in source.parameters()]
        if any(name is not None for name in found):
            self._known[average] = found
            self._apply_to(average)

    def _apply_to(self, average: nn.Module) -> None:
        masks = self._masker.masks
        with torch.no_grad():
            for parameter, name in zip(average.parameters(), self._known[average], strict=False):
                mask = masks.get(name) if name is not None else None
                if mask is not None and mask.shape == parameter.shape and not parameter.is_meta:
                    _zero(parameter, mask)


def _structure_of(model: nn.Module) -> tuple[bool, list[str], dict[str, torch.Size]]:
    return (
        is_quantized(model),
        sorted(makers(model)),
        {name: p.shape for name, p in by_clean_name(model.named_parameters()).items()},
    )


def _zero(parameter: Tensor, mask: Tensor) -> None:
    parameter.masked_fill_(~mask.to(parameter.device), 0.0)


# ---------------------------------------------------------------------- methods that tell


_FOLLOWING: weakref.WeakSet[Averages] = weakref.WeakSet()
_PATCHED: dict[tuple[type, str], Any] = {}


def _patch() -> None:
    for module, cls_name, name in _UPDATES:
        cls = getattr(sys.modules.get(module), cls_name, None)
        if isinstance(cls, type) and name in vars(cls) and (cls, name) not in _PATCHED:
            own = vars(cls)[name]
            _PATCHED[cls, name] = own
            static = isinstance(own, staticmethod)
            told = _reporting(own.__func__ if static else own)
            setattr(cls, name, staticmethod(told) if static else told)


def _restore() -> None:
    while _PATCHED:
        (cls, name), own = _PATCHED.popitem()
        setattr(cls, name, own)


def _reporting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def update(*args: Any, **kwargs: Any) -> Any:
        average, source = _pair(*args, *kwargs.values())
        known = isinstance(average, nn.Module) and isinstance(source, nn.Module)
        for watching in list(_FOLLOWING) if known else ():
            watching.updating(average, source)
        result = method(*args, **kwargs)
        for watching in list(_FOLLOWING) if known else ():
            watching.updated(average, source)
        return result

    return update


def _pair(average: Any, *given: Any) -> tuple[Any, Any]:
    """The averaged model and the one that it is the average of, from the arguments of an update."""
    source = next((one for one in given if isinstance(one, nn.Module)), getattr(average, "model", None))
    inner: Iterator[Any] = (vars(average).get(key) for key in ("ema",))
    held = [*(average._modules.get(key) for key in ("module", "ema_model"))] if isinstance(average, nn.Module) else []
    found = next((one for one in [*held, *inner] if isinstance(one, nn.Module)), None)
    # Lightning's SWA averages into a plain copy of the model.
    return (average if found is None and not isinstance(average, AveragedModel) else found), source
