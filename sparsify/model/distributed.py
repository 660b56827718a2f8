"""Several processes that train one model (DDP, FSDP2): the same masks and ranges on each. Nothing in a single one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.errors import StateError
from sparsify.model.agreement import wait_for_all
from sparsify.model.sharding import is_sharded, local, region, totals

__all__: list[str] = []

Sent = TypeVar("Sent")


def world_size() -> int:
    """Number of processes that train together; 1 where torch.distributed is not set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def fingerprint(mask: Tensor, salt: object = None) -> str:
    """A hash of a bool tensor's values and shape, or of its values and `salt`: the same on every device and in every
    memory format."""
    packed = np.packbits(mask.detach().cpu().contiguous().numpy())
    salted = _salt(tuple(mask.shape) if salt is None else salt)
    return hashlib.blake2b(packed.tobytes(), digest_size=16, person=b"mask", salt=salted).hexdigest()


def gathered_objects(own: Sent) -> list[Sent]:
    """The objects that the ranks gave, in the order of the ranks; every process must call it."""
    all_of_them: list[Any] = [None] * world_size()
    dist.all_gather_object(all_of_them, own)
    return all_of_them


def fingerprints(masks: Mapping[str, Tensor]) -> dict[str, str]:
    """A hash of each mask. Of a sharded one it is the sum of the hashes of its parts, so that all ranks have the same.

    Replicas of a part (as in a mesh of two dimensions, HSDP) are in sums of their own, which differ where they do.
    """
    found = {name: fingerprint(mask) for name, mask in masks.items() if not is_sharded(mask)}
    sharded = {name: mask for name, mask in masks.items() if is_sharded(mask)}
    # A part is hashed with its place: parts that change places change the sum. It wraps around.
    halves: dict[str, int | Tensor] = {
        name: int.from_bytes(bytes.fromhex(fingerprint(local(mask), salt=region(mask)))[:8], "big", signed=True)
        for name, mask in sharded.items()
    }
    return {**found, **{name: f"{total:x}" for name, total in totals(sharded, halves).items()}}


def check_same(masks: Mapping[str, Tensor]) -> None:
    """Compares masks between all processes; every process must call it at the same update.

    Raises:
        StateError: on every process, where they differ; the message names the first parameter.
    """
    if world_size() == 1:
        return
    # One that has loaded another state is at another update, or at none, and would not answer.
    wait_for_all()
    own = fingerprints(masks)
    # One short digest a rank; what differs is sent only where something does.
    whole = hashlib.blake2b(repr(sorted(own.items())).encode(), digest_size=16).hexdigest()
    if len(set(gathered_objects(whole))) == 1:
        return
    all_of_them = gathered_objects(own)
    for rank, other in enumerate(all_of_them):
        for name in sorted({*own, *other} if other != all_of_them[0] else ()):
            if other.get(name) != all_of_them[0].get(name):
                raise StateError(
                    f"the mask of {name!r} on rank {rank} differs from rank 0's: the weights differ between "
                    "processes. Make the model in DistributedDataParallel (which sends rank 0's weights to all) before "
                    "modify()."
                )


def reduce_range(minimum: Tensor, maximum: Tensor) -> None:
    """Turns a range that was seen here into the range seen by all processes, in place."""
    if world_size() == 1:
        return
    # One message for both: the highest of -minimum is minus the lowest.
    both = torch.stack([-minimum.detach(), maximum.detach()])
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    minimum.copy_(-both[0])
    maximum.copy_(both[1])


def average(tensors: Mapping[str, Tensor]) -> None:
    """Turns what was computed here into the mean over all processes, in place; the same names on every process."""
    if world_size() == 1:
        return
    for name in sorted(tensors):
        dist.all_reduce(tensors[name], op=dist.ReduceOp.SUM)
        tensors[name].div_(world_size())


def _salt(of: object) -> bytes:
    return hashlib.blake2b(repr(of).encode(), digest_size=16).digest()
