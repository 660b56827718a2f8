"""A mask update of a model under `fully_shard` against the number of ranks: bytes that a rank sends, and time.

    python benchmarks/sharded_mask_update.py [--quick] [--ranks 1 2 4]

The ranks are processes on one machine (gloo), with one thread each; they share its cores, so where there are more ranks
than cores the time of a rank is that of several. Bytes are those of the messages, times 2 (n - 1) / n for an all-reduce
in a ring, as NCCL and gloo send it: what a rank sends, and receives. Beside them what gathering the weights would send.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sparsify.model import distributed
from sparsify.pruning.masker import Masker
from sparsify.pruning.masks import compute_masks

SENT: list[int] = []


def count_messages() -> None:
    """Notes the size of every message of `all_reduce` and, pickled, of `all_gather_object`."""
    reduce, gather = dist.all_reduce, dist.all_gather_object

    def counted(tensor: Tensor, *args: Any, **options: Any) -> Any:
        SENT.append(2 * tensor.numel() * tensor.element_size())
        return reduce(tensor, *args, **options)

    def counted_object(found: list[Any], own: Any, *args: Any, **options: Any) -> Any:
        SENT.append(len(repr(own)) * dist.get_world_size())
        return gather(found, own, *args, **options)

    dist.all_reduce, dist.all_gather_object = counted, counted_object


def serve(rank: int, ranks: int, store: str, layers: int, rows: int, columns: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,))
    draw = torch.Generator().manual_seed(0)
    model = nn.Module()
    for index in range(layers):
        whole = distribute_tensor(torch.randn(rows, columns, generator=draw), mesh, [Shard(0)])
        model.register_parameter(f"w{index}", nn.Parameter(whole))
    weights = layers * rows * columns
    count_messages()
    for together in (False, True):
        times = []
        masker = Masker(model)
        for sparsity in (0.1, 0.5, 0.6, 0.7):
            dist.barrier()
            SENT.clear()
            start = time.perf_counter()
            masks = compute_masks(dict(model.named_parameters()), sparsity, previous=masker.masks, together=together)
            distributed.check_same(masks)
            for name, mask in masks.items():
                masker.set(name, mask)
            times.append(time.perf_counter() - start)
        share = (ranks - 1) / ranks
        sent, gathered = share * sum(SENT) / 1e6, share * 4 * weights / 1e6
        if rank == 0:
            print(
                f"{ranks:5} {'together' if together else 'by layer':9} {1000 * statistics.median(times):8.0f} ms "
                f"{sent:8.2f} MB sent in {len(SENT)} messages   {gathered:8.1f} MB to gather the weights",
                flush=True,
            )
    dist.barrier()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers of 64 x 64")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    options = parser.parse_args()
    layers, rows, columns = (4, 64, 64) if options.quick else (24, 1024, 512)
    print(f"{layers} layers of {rows} x {columns}, float32, {os.cpu_count()} cores")
    print("ranks ranking   an update")
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(serve, (ranks, os.path.join(folder, "store"), layers, rows, columns), nprocs=ranks)


if __name__ == "__main__":
    main()
