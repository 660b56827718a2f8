"""Parameters that are sharded over ranks (DTensors, as `fully_shard` makes them): the part here, and sums over all.

Functions that gather or sum are collective: every rank of the tensor's mesh calls them, in the same order. Of a plain
tensor all of it is here, and nothing is sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsify.errors import StateError

__all__: list[str] = []


def is_sharded(tensor: object) -> bool:
    """True if `tensor` is a DTensor, also one that every rank has whole."""
    # By its attributes: importing torch.distributed.tensor takes a third of a second.
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def first_sharded(model: nn.Module) -> str | None:
    """The name of the first sharded parameter; None: there is none."""
    return next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` on this rank, in the same memory and without its graph; it may hold no element."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        part: Tensor = tensor.to_local().detach()  # type: ignore[attr-defined]
    return part


@dataclass(frozen=True)
class Region:
    """The place of the part on this rank in a tensor of `shape`: its start and size in each dimension."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The part as an index."""
        return tuple(slice(first, first + size) for first, size in zip(self.start, self.size, strict=True))

    def positions(self, indices: Tensor) -> Tensor:
        """Positions in the whole tensor, in logical order, of elements given by their positions in the part."""
        found, step = torch.zeros_like(indices), 1
        for whole, first, size in zip(reversed(self.shape), reversed(self.start), reversed(self.size), strict=True):
            found += (indices % max(size, 1) + first) * step
            indices = indices // max(size, 1)
            step *= whole
        return found


def region(tensor: Tensor) -> Region:
    """The place in `tensor` of the part on this rank.

    Raises:
        StateError: it is sharded in a way that is not known, or this rank is not among those that have it.
    """
    shape = tuple(tensor.shape)
    start, size = [0] * len(shape), list(shape)
    for dim, mesh_dims in sharded_dims(tensor).items():
        for mesh_dim in mesh_dims:
            mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
            coordinate = mesh.get_coordinate()
            if coordinate is None:
                raise StateError("a parameter is sharded over other ranks than this. Call it on the ranks of its mesh.")
            chunks = _chunks(size[dim], mesh.size(mesh_dim))
            start[dim] += sum(chunks[: coordinate[mesh_dim]])
            size[dim] = chunks[coordinate[mesh_dim]]
    if tuple(size) != tuple(local(tensor).shape):
        raise StateError(
            f"a parameter of shape {shape} is sharded as {getattr(tensor, 'placements', None)}, of which here is "
            f"{tuple(local(tensor).shape)} where {tuple(size)} was expected. Shard it in even chunks, as fully_shard "
            "does."
        )
    return Region(shape, tuple(start), tuple(size))


def part_sizes(tensor: Tensor) -> dict[int, list[int]]:
    """{dimension that is split: the sizes of its parts, on whatever ranks they are}."""
    found = {}
    for dim, mesh_dims in sharded_dims(tensor).items():
        sizes = [tensor.shape[dim]]
        for mesh_dim in mesh_dims:
            ranks: int = tensor.device_mesh.size(mesh_dim)  # type: ignore[attr-defined]
            sizes = [part for size in sizes for part in _chunks(size, ranks)]
        found[dim] = sizes
    return found


def _chunks(size: int, ranks: int) -> list[int]:
    chunk = math.ceil(size / ranks)
    return [min(chunk, max(size - rank * chunk, 0)) for rank in range(ranks)]


def sharded_dims(tensor: Tensor) -> dict[int, list[int]]:
    """{dimension of the tensor: the dimensions of its mesh that split it, in the order in which they do}.

    Raises:
        StateError: it is the part of a sum, which no parameter is.
    """
    found: dict[int, list[int]] = {}
    strided: dict[int, list[int]] = {}
    for mesh_dim, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_partial():
            raise StateError("a tensor is a sum that was not added up yet; call full_tensor() or redistribute() on it.")
        if placement.is_replicate():
            continue
        # fully_shard on top of tensor parallelism splits what that has split already, and calls it _StridedShard.
        into = strided if type(placement).__name__ == "_StridedShard" else found
        into.setdefault(placement.dim % tensor.dim(), []).append(mesh_dim)
    for dim, mesh_dims in strided.items():
        found.setdefault(dim, []).extend(reversed(mesh_dims))
    return found


Split = tuple[Any, tuple[int, ...]]
"""A mesh of ranks, and its dimensions along which the parts of a tensor differ."""


def split_of(tensor: Tensor) -> Split | None:
    """The mesh dimensions that split `tensor`; None: every rank has all of it."""
    mesh_dims = tuple(sorted(d for dims in sharded_dims(tensor).values() for d in dims))
    return (tensor.device_mesh, mesh_dims) if mesh_dims else None  # type: ignore[attr-defined]


def add_up(counts: Tensor, split: Split | None) -> Tensor:
    """`counts` of all parts together, on the CPU; `split` is that of the tensor in which was counted."""
    if split is not None:
        mesh, mesh_dims = split
        counts = counts.to(mesh.device_type)
        for mesh_dim in mesh_dims:
            if mesh.size(mesh_dim) > 1:
                dist.all_reduce(counts, group=mesh.get_group(mesh_dim))
    return counts.cpu()


def totals(tensors: Mapping[str, Tensor], counts: Mapping[str, int | Tensor]) -> dict[str, int]:
    """Numbers that were counted in the parts here, added up over all parts; one message for each way of splitting."""
    found = {name: counts[name] for name in tensors}
    ways: dict[Split | None, list[str]] = {}
    for name, tensor in tensors.items():
        ways.setdefault(split_of(tensor), []).append(name)
    for way, names in ways.items():
        sums = add_up(torch.stack([torch.as_tensor(counts[name]).long().cpu() for name in names]), way)
        found.update(zip(names, sums.tolist(), strict=True))
    return {name: int(count) for name, count in found.items()}


def zeros(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of zeros in each whole tensor, wherever its parts are."""
    parts = {name: local(tensor) for name, tensor in tensors.items()}
    return totals(tensors, {name: part.numel() - part.count_nonzero() for name, part in parts.items()})


def gathered(tensor: Tensor) -> Tensor:
    """All of `tensor`, gathered where it is sharded."""
    if not is_sharded(tensor):
        return tensor.detach()
    part = local(tensor)
    if part.dtype == torch.bool:
        # gloo sends no bools (torch 2.13.0).
        part = part.to(torch.uint8)
    with torch.no_grad():
        return _as_dtensor(part, tensor).full_tensor().detach().to(tensor.dtype)  # type: ignore[no-any-return,attr-defined]


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` on the device of `like` and sharded as that is; the same values on every rank, or sharded itself."""
    if split_of(tensor) == split_of(like) and is_sharded(tensor) == is_sharded(like):
        same = not is_sharded(tensor) or tensor.placements == like.placements  # type: ignore[attr-defined]
        if same:
            return tensor if tensor.device == like.device or like.is_meta else tensor.to(like.device)
    if is_sharded(tensor):
        tensor = gathered(tensor)
    if not is_sharded(like):
        return tensor if like.is_meta else tensor.to(like.device)
    part = tensor[region(like).slices].clone()
    return _as_dtensor(part if like.is_meta else part.to(local(like).device), like)


def with_part(part: Tensor, like: Tensor) -> Tensor:
    """The tensor whose part here is `part`, sharded as `like`; `part` itself where that is not sharded."""
    return _as_dtensor(part, like) if is_sharded(like) else part


def _as_dtensor(part: Tensor, like: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def is_flattened(module: nn.Module) -> bool:
    """True if it is the wrapper of FSDP1, which joins the parameters of what it wraps to flat ones."""
    return any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__)


def reshard(model: nn.Module) -> None:
    """Has modules under `fully_shard` hold their sharded parameters again.

    After a forward they may hold the whole ones, as the outermost does (`reshard_after_forward`); what is asked for by
    name would be those, which no optimizer steps.
    """
    for module in model.modules():
        if is_fully_sharded(module):
            module.reshard()  # type: ignore[operator]


def is_fully_sharded(module: nn.Module) -> bool:
    """True if `fully_shard` was called on this very module, which changes its class."""
    # By name: torch.distributed.fsdp takes a third of a second to import.
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def call_within(model: nn.Module) -> Callable[..., Any]:
    """The function that computes `model` without its hooks; under `fully_shard` with them, which gather its weights."""
    return model if is_fully_sharded(model) else model.forward


def class_before_sharding(module: nn.Module) -> type[nn.Module]:
    """The class of `module`, without what `fully_shard` made of it."""
    cls = type(module)
    return next(c for c in cls.__mro__[1:] if issubclass(c, nn.Module)) if is_fully_sharded(module) else cls


def fully_sharded_class(sharded: type, plain: type[nn.Module]) -> type[nn.Module]:
    """A class for a module of class `sharded`, which `fully_shard` made, that is to be a `plain` one from now on."""
    mixed_in = next(cls for cls in sharded.__mro__ if cls.__name__ == "FSDPModule")
    if issubclass(plain, mixed_in):
        return plain
    # In the order of fully_shard: FSDPModule.__new__ takes the class behind itself for the module's own.
    return type(f"FSDP{plain.__name__}", (mixed_in, plain), {"__deepcopy__": sharded.__dict__.get("__deepcopy__")})


@contextmanager
def stand_ins(model: nn.Module) -> Iterator[None]:
    """Whole parameters without values, and no hooks of `fully_shard`, while the block looks at what `model` computes.

    They take no memory: one number is read for all. What `fully_shard` does not hold stays as it is.
    """
    held: dict[int, nn.Parameter] = {}
    parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
    hooks: list[tuple[nn.Module, str, Any]] = []
    reshard(model)
    try:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and is_sharded(parameter):
                    here = local(parameter)
                    one = torch.ones((), dtype=here.dtype, device=here.device).expand(parameter.shape)
                    held.setdefault(id(parameter), nn.Parameter(one, requires_grad=False))
                    parameters.append((module, name, parameter))
                    module._parameters[name] = held[id(parameter)]
            for kind in ("_forward_pre_hooks", "_forward_hooks"):
                given = getattr(module, kind)
                others = [(key, hook) for key, hook in given.items() if not _is_of_fully_shard(hook)]
                if len(others) < len(given):
                    hooks.append((module, kind, given))
                    setattr(module, kind, type(given)(others))
        yield
    finally:
        for module, kind, given in hooks:
            setattr(module, kind, given)
        for module, name, parameter in parameters:
            module._parameters[name] = parameter


def _is_of_fully_shard(hook: Any) -> bool:
    # Seen in torch 2.13.0: bound methods of the FSDPState of the module.
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"
