"""Masks of sharded weights, on two and four gloo ranks: those of the whole weights, whatever lies where."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sparsify.errors import DataError, StateError
from sparsify.model import distributed, sharding
from sparsify.pruning.masks import MaskType, compute_masks
from tests.ranks import on_ranks, on_two_ranks

# Uneven parts, parts without an element, kernels, and a stack of matrices.
SHAPES = {"uneven": (7, 8), "kernel": (3, 4, 3, 3), "even": (16, 12), "one": (1, 4), "stack": (4, 8, 4)}
KINDS = ["unstructured", "2:4", "block4", "filter", "channel", [1, -1], [-1, 1]]
INPUT_DIMS = {"stack": -1}


def _weights(dtype: torch.dtype, ties: bool) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    found = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    return {name: (0.5 * (2 * w).round() if ties else w).to(dtype) for name, w in found.items()}


def _same_as_whole(weights: dict[str, Tensor], mesh: object, placements: list[object], kind: object) -> None:
    mask_type = MaskType.parse(kind)  # type: ignore[arg-type]
    sharded = {name: distribute_tensor(w, mesh, placements) for name, w in weights.items()}  # type: ignore[arg-type]
    for together, absolute in product((False, True), (True, False)):
        wanted: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        for sparsity in (0.2, 0.3, 0.5):
            options = {"together": together, "absolute": absolute, "input_dims": INPUT_DIMS}
            wanted = compute_masks(weights, sparsity, mask_type, previous=wanted, **options)  # type: ignore[arg-type]
            found = compute_masks(sharded, sparsity, mask_type, previous=found, **options)  # type: ignore[arg-type]
            for name, mask in found.items():
                assert mask.placements == sharded[name].placements  # type: ignore[attr-defined]
                assert torch.equal(sharding.gathered(mask), wanted[name]), (kind, placements, together, absolute, name)
    assert distributed.fingerprints(found)  # the same on every rank, or the next says so
    distributed.check_same(found)


def _few(rank: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for dtype, ties in ((torch.float32, False), (torch.bfloat16, True)):
        for kind in ("unstructured", "2:4"):
            _same_as_whole(_weights(dtype, ties), mesh, [Shard(0)], kind)


def _many(rank: int, folder: str) -> None:
    ranks = dist.get_world_size()
    meshes = [(init_device_mesh("cpu", (ranks,)), [[Shard(0)], [Replicate()], [Shard(1)]])]
    if ranks == 4:
        pairs = [[Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(0), Shard(0)]]
        meshes.append((init_device_mesh("cpu", (2, 2)), pairs))
    for mesh, ways in meshes:
        for placements, kind in product(ways, KINDS):
            for dtype, ties in ((torch.float32, True), (torch.float16, False), (torch.float64, True)):
                _same_as_whole(_weights(dtype, ties), mesh, placements, kind)


def _strange(rank: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.ones(6, 8)
    weight[5, 1] = torch.nan  # on the last rank alone
    for kind in ("unstructured", "2:4", "block4", "channel"):
        with pytest.raises(DataError, match="'w' holds NaN"):
            compute_masks({"w": distribute_tensor(weight, mesh, [Shard(0)])}, 0.5, MaskType.parse(kind))


def _differ(rank: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[3, 3] = rank != 3  # one of two replicas
    part = mask[2:] if rank % 2 else mask[:2]
    sharded = sharding.with_part(part.clone(), distribute_tensor(torch.ones(4, 4), mesh, [Replicate(), Shard(0)]))
    with pytest.raises(StateError, match=r"'w' on rank [23]"):
        distributed.check_same({"w": sharded})
    distributed.check_same({"w": sharding.with_part(torch.ones(2, 4, dtype=torch.bool), sharded)})


def test_masks_of_sharded_weights_are_those_of_whole_ones(tmp_path: Path) -> None:
    on_two_ranks(_few, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_kind_of_mask_is_that_of_whole_weights(ranks: int, tmp_path: Path) -> None:
    on_ranks(ranks, _many, tmp_path)


def test_nan_on_one_rank_is_refused_by_name_on_all(tmp_path: Path) -> None:
    on_two_ranks(_strange, tmp_path)


@pytest.mark.slow
def test_replicas_of_a_part_that_differ_are_refused(tmp_path: Path) -> None:
    on_ranks(4, _differ, tmp_path)


@pytest.fixture(autouse=True)
def _gloo() -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
