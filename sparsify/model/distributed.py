"""Several processes that train one model (DDP): the same masks and ranges on each. No-ops in a single process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sparsify.errors import StateError

__all__: list[str] = []


def world_size() -> int:
    """Number of processes that train together; 1 where torch.distributed is not set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def fingerprint(mask: Tensor) -> str:
    """A hash of a bool tensor's shape and values, the same for every device and memory format."""
    packed = np.packbits(mask.detach().cpu().contiguous().numpy())
    return hashlib.blake2b(packed.tobytes(), digest_size=16, person=b"mask", salt=_salt(tuple(mask.shape))).hexdigest()


def check_same(masks: Mapping[str, Tensor]) -> None:
    """Compares masks between all processes; every process must call it at the same update.

    Raises:
        StateError: on every process, where they differ; the message names the first parameter.
    """
    if world_size() == 1:
        return
    own = {name: fingerprint(mask) for name, mask in masks.items()}
    all_of_them: list[dict[str, str] | None] = [None] * world_size()
    dist.all_gather_object(all_of_them, own)
    for rank, other in enumerate(all_of_them):
        for name in sorted({*own, *(other or {})} if other != all_of_them[0] else ()):
            if (other or {}).get(name) != (all_of_them[0] or {}).get(name):
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


def _salt(shape: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(repr(shape).encode(), digest_size=16).digest()
