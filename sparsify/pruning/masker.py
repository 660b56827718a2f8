"""The Masker: keeps masks by parameter name, applies them and saves them.

A mask is a bool tensor of its parameter's shape: True where a weight is kept.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from sparsify.errors import SparsifyWarning, StateError, TargetError, did_you_mean
from sparsify.model import distributed, sharding, targets
from sparsify.model.masked_memory import has_bits, integers_of, kept_bits, zero_masked_rows_
from sparsify.model.optimizer_state import reset_where
from sparsify.model.wrappers import by_clean_name

if TYPE_CHECKING:
    from sparsify.pruning.removal import Removal

__all__: list[str] = []

log = logging.getLogger("sparsify")


@dataclass(frozen=True)
class Revived:
    """Masked weights of one parameter that are not zero.

    Attributes:
        count: how many, on this rank.
        masked: how many are masked, on this rank.
        largest: their largest absolute value.
    """

    count: int
    masked: int
    largest: float


@dataclass
class _MaskedParameter:
    """A masked parameter, and views of it and its mask for fast masking, valid while its memory does not move.

    Attributes:
        here: the part of it on this rank; all of it where it is not sharded.
        pointer: the address of its memory when the views were taken.
        mask: the mask of that part.
        bits: the values as integers, in the same memory; None where they cannot be seen so.
        kept: for `bits`, all ones where a weight is kept and zeros elsewhere.
    """

    parameter: Tensor
    here: Tensor
    pointer: int
    mask: Tensor
    sharded: bool
    bits: Tensor | None = None
    kept: Tensor | None = None

    def address(self) -> int:
        """The address of the memory of the part here, as it is now."""
        return (sharding.local(self.parameter) if self.sharded else self.parameter).data_ptr()


class Masker:
    """Masks by parameter name; masked weights are zero after every `apply`.

    Parameters are looked up by name where their objects may have been replaced (`load_state_dict(assign=True)`,
    `.to("meta")`), so a mask stays with its name. The mask of a sharded parameter (a DTensor, as `fully_shard` makes
    them) is sharded like it, and only the part on this rank is applied. On CPUs a mask takes 5 bytes for each float32
    weight.

    Checkpoint: `state_dict` holds every mask, whole and packed, with a checksum; views of parameters are made again.

    Attributes:
        version: a number that grows when a mask is set.

    Args:
        model: the module whose parameters are masked.
        optimizer: one or several; their state is set back where a mask is set or removed, so that nothing revives a
            weight.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self._masks: dict[str, Tensor] = {}
        self._zeros: dict[str, int] = {}
        self._places: dict[str, _MaskedParameter] = {}
        self._floats: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        self._dense: set[str] = set()
        self.version = 0
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        # What stands on the way from the model to each masked parameter: a dictionary, a key, and what is there.
        self._ways: list[tuple[dict[str, Any], str, object]] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self._masks

    @property
    def names(self) -> list[str]:
        """The masked parameters."""
        return list(self._masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """True where a weight is kept; not to be written to."""
        return dict(self._masks)

    def bind(self, optimizer: Optimizer | Sequence[Optimizer] | None) -> None:
        """Takes `optimizer`, one or several, as those whose state is set back where a mask is set or removed."""
        self.optimizer = optimizer

    def set(self, name: str, mask: Tensor, *, fresh: bool = False) -> None:
        """Puts `mask` in force: the weights and the optimizer's state are zero where it is False.

        Args:
            name: of the parameter.
            mask: True where a weight is kept.
            fresh: set the optimizer's state back also where the mask so far is False: weights that are released begin
                anew.

        Raises:
            TargetError: no such parameter, or one that cannot be masked.
            StateError: the mask has another shape.
        """
        parameter = self._find(name)
        if mask.shape != parameter.shape:
            raise StateError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(parameter.shape)}."
            )
        mask = sharding.laid_out(mask, parameter)
        before = self._masks.get(name) if fresh else None
        if before is not None and before.shape == mask.shape:
            self._reset_optimizer(name)
        self._masks[name] = mask
        self._zeros.pop(name, None)
        self._ways = None
        if not sharding.is_sharded(mask):
            self._zeros[name] = mask.numel() - int(mask.count_nonzero())
        self._changed(name)
        self.version += 1
        self._apply([name])
        self._reset_optimizer(name)

    def remove(self, name: str) -> None:
        """Ends the mask. The weights are zero, and the optimizer's state with them, until something moves them."""
        if name in self._masks:
            self._apply([name])
            self._reset_optimizer(name)
            self._forget(name)

    def apply(self) -> None:
        """Sets masked weights to zero, in place."""
        self._apply(self._masks)

    def apply_to_grads(self, only: Container[int] | None = None) -> None:
        """Sets the gradients of masked weights to zero, in place, so that no optimizer remembers anything of them.

        Args:
            only: ids of the parameters that are meant; None: all.
        """
        products: list[tuple[Tensor, Tensor]] = []
        for name in self._masks:
            place = self._place(name)
            gradient = place.parameter.grad
            if gradient is None or name in self._dense or (only is not None and id(place.parameter) not in only):
                continue
            if place.sharded:
                gradient = sharding.local(gradient)
            if place.kept is not None and has_bits(gradient) and gradient.dtype == place.here.dtype:
                integers_of(gradient).bitwise_and_(place.kept)
            elif gradient.layout == torch.sparse_coo:
                zero_masked_rows_(gradient, place.mask)
            elif not gradient.is_meta:
                products.append((gradient, self._float(name)))
        if products:
            with torch.no_grad():
                torch._foreach_mul_(*map(list, zip(*products, strict=True)))

    def keep_gradients(self, names: Iterable[str], keep: bool = True) -> None:
        """Leaves the gradients of these parameters alone, which are trained where they are masked, or no longer."""
        self._dense = self._dense | set(names) if keep else self._dense - set(names)

    def note_ways(self) -> None:
        """Notes the way to every masked parameter, where masks were set since: what `follow` compares with."""
        if self._ways is None:
            self._ways = self._find_ways()

    def follow(self) -> None:
        """Looks the masked parameters up again where a module or a parameter on the way to one was replaced since
        `note_ways`: a new head, adapters merged. Costs a dictionary's look-up for each module and parameter.

        Raises:
            StateError: one is missing now, or has another shape.
        """
        for held, key, there in self._ways or ():
            if held.get(key) is not there:
                self.refresh()
                for name in self._masks:
                    problem = self._why_not_masked(name)
                    if problem is not None:
                        raise StateError(
                            f"{problem} Call finalize() before masked layers are replaced, resized or merged, and "
                            "modify() afterwards, with an optimizer of the new parameters."
                        )
                self.note_ways()
                return

    def _find_ways(self) -> list[tuple[dict[str, Any], str, object]]:
        wanted = {id(self._owners[name][0]) for name in self._masks if name in self._owners}
        ways: dict[tuple[int, str], tuple[dict[str, Any], str, object]] = {}
        for path, module in self.model.named_modules():
            if id(module) in wanted:
                holder: Any = self.model
                for part in path.split(".") if path else ():
                    child = holder._modules[part]
                    ways[id(holder), part] = (holder._modules, part, child)
                    holder = child
        for name in self._masks:
            if name in self._owners:
                module, own = self._owners[name]
                ways[id(module), f".{own}"] = (module._parameters, own, module._parameters.get(own))
        return list(ways.values())

    def _why_not_masked(self, name: str) -> str | None:
        """The reason why the mask of this name fits no parameter any longer, or None."""
        if name not in self._owners:
            return f"{name!r} is masked, and no longer a parameter of {type(self.model).__name__}: it was replaced."
        module, own = self._owners[name]
        parameter, mask = module._parameters[own], self._masks[name]
        if parameter is not None and parameter.shape != mask.shape:
            return (
                f"{name!r} now has shape {tuple(parameter.shape)}, its mask {tuple(mask.shape)}: the parameter was "
                "replaced."
            )
        return None

    def finalize(self) -> None:
        """Bakes the masks in as +0.0 and forgets them, with a warning where their parameters were replaced. May be
        called twice."""
        if self._masks:
            self.refresh()
        replaced = [problem for name in self.names if (problem := self._why_not_masked(name)) is not None]
        for name in self.names:
            if self._why_not_masked(name) is None:
                place = self._place(name)
                if not place.here.is_meta:
                    with torch.no_grad():
                        place.here.masked_fill_(~place.mask, 0.0)
            self._forget(name)
        if replaced:
            warnings.warn(
                f"{len(replaced)} mask{'s fit' if len(replaced) > 1 else ' fits'} no parameter any longer, and what "
                f"stands there now is left as it is: {' '.join(replaced[:3])}{' ...' if len(replaced) > 3 else ''}",
                SparsifyWarning,
                stacklevel=2,
            )

    def apply_to(self, model: nn.Module) -> None:
        """Masks another model with the same parameter names: an EMA or SWA copy.

        Raises:
            TargetError: a parameter is missing there or has another shape; nothing was changed then.
        """
        parameters = by_clean_name(model.named_parameters(remove_duplicate=False))
        for name, mask in self._masks.items():
            if name not in parameters:
                raise TargetError(
                    f"{name!r} is masked, but {type(model).__name__} has no such "
                    f"parameter.{did_you_mean(name, parameters)}"
                )
            if parameters[name].shape != mask.shape:
                raise TargetError(
                    f"{name!r} has shape {tuple(parameters[name].shape)} in {type(model).__name__}, its mask "
                    f"{tuple(mask.shape)}."
                )
        with torch.no_grad():
            for name, mask in self._masks.items():
                mask = sharding.local(sharding.laid_out(mask, parameters[name]))
                sharding.local(parameters[name]).masked_fill_(~mask, 0.0)

    def resize(self, removal: Removal) -> None:
        """Removes from every mask the slices that were removed from its parameter; a second time changes nothing.

        A mask that holds no zero afterwards is forgotten.
        """
        for name, dims in removal.keep.items():
            mask = self._masks.get(name)
            if mask is None or tuple(mask.shape) != tuple(removal.before[name]):
                continue
            for dim, kept in dims.items():
                mask = mask.index_select(dim, kept.to(mask.device))
            zeros = mask.numel() - int(mask.count_nonzero())
            if zeros:
                self._masks[name], self._zeros[name] = mask, zeros
                self._changed(name)
            else:
                self._forget(name)

    def refresh(self) -> None:
        """Looks every parameter up again; for a model in which modules were replaced.

        Modules of `fully_shard` that still hold whole parameters after a forward hold the sharded ones again.
        """
        sharding.reshard(self.model)
        self._owners = {name: (module, attribute) for name, module, attribute in targets.owners(self.model)}
        self._places.clear()
        self._ways = None

    def check(self) -> None:
        """Looks every masked parameter up again.

        Raises:
            TargetError: one is missing. StateError: one has another shape. DataError: one holds NaN or infinity.
        """
        self.refresh()
        for name in self._masks:
            parameter = self._find(name)
            problem = self._why_not_masked(name)
            if problem is not None:
                raise StateError(f"{problem} Remove the mask, or load a model of the shape that was pruned.")
            targets.refuse_unusable({name: parameter}, where="masks")

    def sparsity(self) -> dict[str, float]:
        """The fraction of masked weights, 0 to 1, by name. Collective where masks are sharded and one has changed."""
        uncounted = {name: mask for name, mask in self._masks.items() if name not in self._zeros}
        self._zeros.update(sharding.zeros(uncounted))
        return {name: self._zeros[name] / max(mask.numel(), 1) for name, mask in self._masks.items()}

    def revived(self) -> dict[str, Revived]:
        """Masked weights that are not zero, by name of the parameter. Reads every masked weight; sends nothing."""
        found = {}
        for name in self.names:
            place = self._place(name)
            if place.here.is_meta:
                continue
            values = place.here.masked_fill(place.mask, 0.0)
            if count := int(values.count_nonzero()):
                masked = place.mask.numel() - int(place.mask.count_nonzero())
                found[name] = Revived(count, masked, float(values.abs().max()))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The masks, one bit per weight, with a checksum each; whole where they are sharded: collective then."""
        return {"masks": {name: _packed(sharding.gathered(mask)) for name, mask in self._masks.items()}}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Puts the masks of `state` in force in place of those there.

        Args:
            state: from `state_dict`.
            strict: False leaves out masks that do not fit this model, with a notice, instead of raising.

        Raises:
            StateError: a mask is damaged, or has no parameter of its shape here; nothing was changed then.
        """
        self.refresh()
        masks: dict[str, Tensor] = {}
        parameters = by_clean_name(self.model.named_parameters(remove_duplicate=False))
        for name, saved in state.get("masks", {}).items():
            problem = None
            if name not in parameters:
                problem = f"the state masks {name!r}, which the model does not have.{did_you_mean(name, parameters)}"
            elif tuple(saved["shape"]) != tuple(parameters[name].shape):
                problem = (
                    f"the state's mask of {name!r} has shape {tuple(saved['shape'])}, the parameter "
                    f"{tuple(parameters[name].shape)}."
                )
            if problem is None:
                masks[name] = _unpacked(name, saved)
            elif strict:
                raise StateError(f"{problem} Load the state of this model, or give strict=False to leave it out.")
            else:
                log.warning("%s Left out.", problem)
        for name in self.names:
            if name not in masks:
                self._forget(name)
        for name, mask in masks.items():
            self.set(name, mask.to(parameters[name].device) if not parameters[name].is_meta else mask)

    def _forget(self, name: str) -> None:
        del self._masks[name]
        self._ways = None
        self._zeros.pop(name, None)
        self._changed(name)

    def _changed(self, name: str) -> None:
        """Forgets what was made from a mask."""
        for made in (self._places, self._floats, self._kept):
            made.pop(name, None)

    def _find(self, name: str) -> Tensor:
        """The parameter of this name as it is now."""
        if name not in self._owners:
            self.refresh()
        if name not in self._owners:
            raise TargetError(
                f"{name!r} is no parameter of {type(self.model).__name__}.{did_you_mean(name, self._owners)}"
            )
        module, attribute = self._owners[name]
        parameter = module._parameters.get(attribute)
        if parameter is None:
            raise TargetError(f"{name!r} is no longer a parameter of its layer, a {type(module).__name__}.")
        return parameter

    def _place(self, name: str) -> _MaskedParameter:
        """The masked parameter and its views, made again when its memory has moved."""
        parameter = self._find(name)
        place = self._places.get(name)
        if place is not None and place.parameter is parameter and place.pointer == place.address():
            return place
        mask = self._masks[name]
        if sharding.is_sharded(mask) and not sharding.is_sharded(parameter):
            # As after an evaluation: the outermost module of fully_shard holds whole parameters until its backward.
            sharding.reshard(self.model)
            parameter = self._find(name)
        here = sharding.local(parameter)
        if mask.shape != parameter.shape:
            raise StateError(
                f"{name!r} now has shape {tuple(parameter.shape)}, its mask {tuple(mask.shape)}: the parameter was "
                "replaced. Remove the mask, or load a model of the shape that was pruned."
            )
        laid_out = sharding.laid_out(mask, parameter)
        if laid_out is not mask:
            self._changed(name)
        part = sharding.local(laid_out)
        if not here.is_meta and (part.device != here.device or part.stride() != here.stride()):
            # In the weight's own memory format: a pass over both in memory order is several times faster.
            part = torch.empty_like(here, dtype=torch.bool).copy_(part)
            self._changed(name)
        self._masks[name] = sharding.with_part(part, parameter)
        place = _MaskedParameter(parameter, here, here.data_ptr(), part, sharding.is_sharded(parameter))
        if has_bits(here):
            place.bits = integers_of(here)
            # Kept where only the memory moved: some optimizers put other memory under their parameters at every step.
            kept = self._kept.get(name)
            if kept is None or kept.dtype != place.bits.dtype:
                kept = self._kept[name] = kept_bits(here, part)
            place.kept = kept
        else:
            made = self._floats.get(name)
            if made is not None and (made.dtype, made.device) != (here.dtype, here.device):
                del self._floats[name]
        self._places[name] = place
        return place

    def _apply(self, names: Iterable[str]) -> None:
        others: list[str] = []
        for name in names:
            place = self._place(name)
            if place.bits is not None and place.kept is not None:
                place.bits.bitwise_and_(place.kept)
            elif not place.here.is_meta:
                others.append(name)
        if others:
            with torch.no_grad():
                torch._foreach_mul_(
                    [self._places[name].here for name in others], [self._float(name) for name in others]
                )

    def _float(self, name: str) -> Tensor:
        place = self._places[name]
        if name not in self._floats:
            self._floats[name] = place.mask.to(place.here.dtype)
        return self._floats[name]

    def _reset_optimizer(self, name: str) -> None:
        """Sets back what the optimizer remembers of the masked weights."""
        # LBFGS remembers directions in the space of all weights: a resumed run, whose masks are set again, needs them.
        several = self.optimizer if isinstance(self.optimizer, list | tuple) else (self.optimizer,)
        place = self._place(name)
        for one in several:
            if not isinstance(one, LBFGS):
                reset_where(one, place.parameter, place.mask)


def _packed(mask: Tensor) -> dict[str, Any]:
    return {
        "shape": list(mask.shape),
        "bits": torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy())),
        "checksum": distributed.fingerprint(mask),
    }


def _unpacked(name: str, saved: Mapping[str, Any]) -> Tensor:
    shape = tuple(saved["shape"])
    size = math.prod(shape)
    packed = saved["bits"].cpu().numpy()
    if packed.size == (size + 7) // 8:
        mask = torch.from_numpy(np.unpackbits(packed, count=size).astype(np.bool_)).view(shape)
        if distributed.fingerprint(mask) == saved["checksum"]:
            return mask
    raise StateError(f"the saved mask of {name!r} is damaged: its checksum does not fit. Use an earlier checkpoint.")
