"""Importance of weights by second-order information, and the update of the others that makes up for a removed one.

Near a minimum the loss grows by (1/2) d^T H d when the weights move by d. H is taken to be the empirical Fisher matrix,
the mean of g g^T over gradients g, with a dampening on its diagonal, and cut into square blocks of weights that follow
each other in a parameter. Two ways to hold it: its blocks themselves (`fisher_*`), or the gradients (`mfac_*`, where a
block may be far larger). Both solve in float64, a page at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from sparsify.errors import ArgumentError

__all__: list[str] = []

PAGE = 1 << 21
"""Numbers of a matrix that are in work at a time: 16 MiB in float64."""
FISHER_ROWS = 8
"""Gradients that are added at a time; one by one, sums of blocks of 50 are bound by memory."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The format in which gradients are kept: their own, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


def in_fisher_blocks(tensor: Tensor, size: int) -> Tensor:
    """The elements in logical order as (blocks, size), padded with zeros.

    >>> in_fisher_blocks(torch.arange(3.0), 2)
    tensor([[0., 1.],
            [2., 0.]])
    """
    flat = tensor.detach().reshape(-1)
    return functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)


def fisher_sums(parameter: Tensor, size: int) -> Tensor:
    """Zeros of (blocks, b, b) for `add_gradients`, b the smaller of `size` and the number of weights."""
    return torch.zeros(fisher_shape(parameter, size), dtype=wide(parameter.dtype), device=parameter.device)


def fisher_shape(parameter: Tensor, size: int) -> tuple[int, int, int]:
    """The shape of `fisher_sums`."""
    size = min(size, parameter.numel())
    return -(-parameter.numel() // size), size, size


def add_gradients(sums: Tensor, gradients: Sequence[Tensor], keep: float = 1.0) -> None:
    """sums = keep * sums + the sum of g g^T over `gradients`, in place."""
    rows = torch.stack([in_fisher_blocks(gradient.to(sums.dtype), sums.shape[-1]) for gradient in gradients], dim=1)
    sums.baddbmm_(rows.transpose(1, 2), rows, beta=keep)


def fisher_scores(weight: Tensor, sums: Tensor, count: int, damp: float, kept: Tensor | None = None) -> Tensor:
    """w_i^2 / (2 [F^-1]_ii): the growth of the loss without weight i, where the others of its block make up for it.

    F = sums / count + damp, over the weights that are kept. What rounding has done to sums in float32 is covered by
    one rounding error of the block's trace on the diagonal, so that F stays positive definite whatever `damp`.

    >>> weight, gradient = torch.tensor([2.0, 1.0]).double(), torch.tensor([1.0, 0.0]).double()
    >>> sums = fisher_sums(weight, 2)
    >>> add_gradients(sums, [gradient])
    >>> fisher_scores(weight, sums, 1, damp=1.0)
    tensor([4.0000, 0.5000], dtype=torch.float64)

    Args:
        weight: of any shape.
        sums: of the gradients' outer products, as `add_gradients` leaves them.
        count: the number of gradients in `sums`.
        damp: the number that is added to the diagonal, above 0.
        kept: a mask of the weight's shape: masked weights score 0, and cannot make up for others.
    """
    size = sums.shape[-1]
    weights = in_fisher_blocks(weight, size)
    alive = in_fisher_blocks(torch.ones_like(weight, dtype=torch.bool) if kept is None else kept, size)
    found = torch.empty(weights.shape, dtype=wide(weight.dtype), device=weight.device)
    for page in _pages(len(sums), size * size):
        fisher = _damped(sums[page], count, damp, alive[page])
        inverse = torch.cholesky_inverse(_cholesky(fisher))
        score = weights[page].to(fisher.dtype) ** 2 / (2.0 * inverse.diagonal(dim1=1, dim2=2))
        found[page] = (score * alive[page]).to(found.dtype)
    return _whole_fisher(found, weight)


def fisher_update(weight: Tensor, sums: Tensor, count: int, damp: float, mask: Tensor) -> Tensor:
    """The weights with zeros outside of `mask`, and the others moved to where the loss grows least.

    Of all that go (Q) and stay (K) in a block at once: w_K + F_KK^-1 F_KQ w_Q. Where one weight goes, that is
    w - w_i F^-1 e_i / [F^-1]_ii.

    Args:
        weight: of any shape.
        sums: as in `fisher_scores`.
        count: the number of gradients in `sums`.
        damp: the number that is added to the diagonal, above 0.
        mask: a bool tensor of the weight's shape: True where a weight stays.
    """
    size = sums.shape[-1]
    weights, stays = in_fisher_blocks(weight, size), in_fisher_blocks(mask, size)
    found = torch.zeros(weights.shape, dtype=wide(weight.dtype), device=weight.device)
    for page in _pages(len(sums), size * size):
        fisher = _damped(sums[page], count, damp, stays[page])
        old = weights[page].to(fisher.dtype)
        pull = (sums[page].to(fisher.dtype) / count) @ (old * ~stays[page])[:, :, None]
        moved = torch.cholesky_solve(pull * stays[page][:, :, None], _cholesky(fisher))[:, :, 0]
        found[page] = ((old + moved) * stays[page]).to(found.dtype)
    return _whole_fisher(found, weight)


def fisher_bytes(parameters: Sequence[Tensor], size: int) -> int:
    """A bound on the memory that sums, pending gradients, scores and the work on a page take."""
    total = largest = 0
    for parameter in parameters:
        bytes_each, block = wide(parameter.dtype).itemsize, min(size, max(parameter.numel(), 1))
        padded = -(-parameter.numel() // block) * block
        total += bytes_each * padded * (block + FISHER_ROWS + 2)
        largest = max(largest, bytes_each * padded * 3 * FISHER_ROWS, 6 * 8 * max(PAGE, block * block))
    return total + largest


def _damped(sums: Tensor, count: int, damp: float, alive: Tensor) -> Tensor:
    """F over the weights in `alive`, and the identity elsewhere."""
    fisher = sums.to(_solving(sums.device)) / count
    fisher *= alive[:, :, None] & alive[:, None, :]
    diagonal = fisher.diagonal(dim1=1, dim2=2)
    trace = diagonal.sum(1, keepdim=True)
    diagonal += torch.where(alive, damp + torch.finfo(sums.dtype).eps * trace, torch.ones_like(trace))
    return fisher


# ---------------------------------------------------------------------------------------------- matrix-free


def mfac_scores(
    weight: Tensor,
    gradients: Sequence[Tensor],
    count: int,
    size: int | None,
    damp: float,
    kept: Tensor | None = None,
    pages: int = 1,
) -> Tensor:
    """As `fisher_scores`, without a matrix of block by block: from the gradients G (m rows) themselves.

    [F^-1]_ii = (1 - |L^-1 G_i|^2 / m) / damp with L L^T = damp + G G^T / m (Woodbury), G_i column i.

    Args:
        weight: of any shape.
        gradients: flat, of the weight's number of elements, on any device.
        count: m, at least as many as there are gradients; those that are missing are zero.
        size: weights in a block; None: one block.
        damp: the number that is added to the diagonal, above 0.
        kept: as in `fisher_scores`.
        pages: the least number of parts in which the gradients go to the weight's device.
    """
    flat = weight.detach().reshape(-1)
    alive = torch.ones_like(flat, dtype=torch.bool) if kept is None else kept.reshape(-1)
    found = torch.empty(flat.shape, dtype=wide(weight.dtype), device=weight.device)
    for blocks in _block_groups(flat.numel(), size, len(gradients), pages):
        factor = _factor(gradients, blocks, alive, count, damp)
        for part in blocks.parts:
            columns = _columns(gradients, part, blocks.size, alive)
            solved = torch.linalg.solve_triangular(factor, columns, upper=False)
            left = 1.0 - (solved**2).sum(1).reshape(-1)[: part.stop - part.start] / count
            inverse = left.clamp(min=torch.finfo(left.dtype).eps) / damp
            found[part] = (flat[part].to(left.dtype) ** 2 / (2.0 * inverse) * alive[part]).to(found.dtype)
    return found.view(weight.shape)


def mfac_update(
    weight: Tensor,
    gradients: Sequence[Tensor],
    count: int,
    size: int | None,
    damp: float,
    mask: Tensor,
    pages: int = 1,
) -> Tensor:
    """As `fisher_update`: w_K + G_K^T (damp + G_K G_K^T / m)^-1 G_Q w_Q / m."""
    flat, stays = weight.detach().reshape(-1), mask.reshape(-1)
    found = torch.empty(flat.shape, dtype=wide(weight.dtype), device=weight.device)
    for blocks in _block_groups(flat.numel(), size, len(gradients), pages):
        factor = _factor(gradients, blocks, stays, count, damp)
        pull = torch.zeros_like(factor[:, :, :1])
        for part in blocks.parts:
            columns = _columns(gradients, part, blocks.size, ~stays)
            pull += columns @ _padded(flat[part].to(columns.dtype), columns)[:, :, None]
        solved = torch.cholesky_solve(pull / count, factor)
        for part in blocks.parts:
            columns = _columns(gradients, part, blocks.size, stays)
            moved = (columns.transpose(1, 2) @ solved).reshape(-1)[: part.stop - part.start]
            found[part] = ((flat[part].to(moved.dtype) + moved) * stays[part]).to(found.dtype)
    return found.view(weight.shape)


def mfac_bytes(parameters: Sequence[Tensor], gradients: int) -> tuple[int, int]:
    """Bounds on the memory of the gradients that are kept, and of scores and the work on a page."""
    numbers = [(wide(parameter.dtype).itemsize, parameter.numel()) for parameter in parameters]
    kept = sum(bytes_each * (gradients + 1) * n for bytes_each, n in numbers)
    # Measured on 2 M weights and 64 gradients: 137 to 181 MB above the start, whatever the size of a block.
    work = 12 * 8 * max(PAGE, gradients * gradients) + sum(2 * bytes_each * n for bytes_each, n in numbers)
    return kept, work


class _Blocks:
    """Blocks of weights that are solved together, (start, stop) in the flat weight, in parts that fit in a page."""

    def __init__(self, start: int, stop: int, size: int, step: int) -> None:
        self.size = size if stop - start > size else min(size, step, stop - start)
        self.parts = [slice(at, min(at + step, stop)) for at in range(start, stop, step)]


def _block_groups(total: int, size: int | None, rows: int, pages: int) -> Iterator[_Blocks]:
    size = min(size or total, max(total, 1))
    rows = max(rows, 1)
    # Numbers of gradients in a part: a page, or less where more pages are asked for.
    room = max(min(PAGE, -(-total * rows // pages)), 1)
    several = room // (rows * max(size, rows))
    step = max(several, 1) * size
    for start in range(0, total, step):
        # A block larger than a page is gone through in parts.
        yield _Blocks(start, min(start + step, total), size, step if several else max(room // rows, 1))


def _columns(gradients: Sequence[Tensor], part: slice, size: int, where: Tensor) -> Tensor:
    """The gradients of a part as (blocks, rows, weights of a block), zero outside of `where`."""
    dtype = _solving(where.device)
    rows = torch.stack([g[part].to(where.device, dtype) for g in gradients]) * where[part]
    rows = functional.pad(rows, (0, -rows.shape[1] % size))
    return rows.view(len(gradients), -1, size).transpose(0, 1)


def _padded(flat: Tensor, columns: Tensor) -> Tensor:
    blocks, _, size = columns.shape
    return functional.pad(flat, (0, blocks * size - flat.numel())).view(blocks, size)


def _factor(gradients: Sequence[Tensor], blocks: _Blocks, alive: Tensor, count: int, damp: float) -> Tensor:
    """The Cholesky factor of damp + G G^T / m, for each block."""
    gram: Tensor | None = None
    for part in blocks.parts:
        columns = _columns(gradients, part, blocks.size, alive)
        product = columns @ columns.transpose(1, 2)
        gram = product if gram is None else gram + product
    assert gram is not None
    gram /= count
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += damp + torch.finfo(gram.dtype).eps * diagonal.sum(1, keepdim=True)
    return _cholesky(gram)


# ---------------------------------------------------------------------------------------------- memory


def free_bytes(device: torch.device) -> int | None:
    """Number of bytes that are free on `device`; None where that is not known."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    return min(found, default=None)


def refuse_beyond(need: int, device: torch.device, *, who: str, lower: str) -> None:
    """Refuses what does not fit into the memory of `device`, before any of it is taken.

    Raises:
        ArgumentError: it says what is needed and what to lower.
    """
    free = free_bytes(device)
    if free is not None and need > free:
        raise ArgumentError(
            f"{who} needs up to {need / 1e9:.2f} GB on {device}, and {max(free, 0) / 1e9:.2f} GB are free. Lower "
            f"{lower}, or name fewer parameters in params."
        )


def _cholesky(matrix: Tensor) -> Tensor:
    """The factors; NaN for a matrix that is not positive definite, as with a gradient of infinity."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where((failed == 0)[:, None, None], factor, math.nan)


def _pages(blocks: int, numbers: int) -> Iterator[slice]:
    step = max(PAGE // max(numbers, 1), 1)
    return (slice(at, at + step) for at in range(0, blocks, step))


def _whole_fisher(blocks: Tensor, like: Tensor) -> Tensor:
    return blocks.view(-1)[: like.numel()].view(like.shape)


def _solving(device: torch.device) -> torch.dtype:
    # Apple's GPUs have no float64: https://github.com/pytorch/pytorch/issues/122602, closed as a known limitation.
    return torch.float32 if device.type == "mps" else torch.float64
