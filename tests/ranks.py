"""Two processes over gloo, in which a test does its work on two ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _on_rank(rank: int, work: Callable[[int, str], None], folder: str) -> None:
    torch.set_num_threads(1)
    # A file, not a port: nothing else on the machine can take it, and it outlives the rank that ends first.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    work(rank, folder)
    dist.barrier()
    # What was to be shown is in files. Seen twice: taking the process group and its threads down at
    # the end of a process aborted ("terminate called without an active exception"), after all work was done.
    os._exit(0)


def on_two_ranks(work: Callable[[int, str], None], folder: Path) -> None:
    mp.start_processes(_on_rank, (work, str(folder)), nprocs=2, start_method="spawn")
