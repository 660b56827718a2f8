"""Processes over gloo, in which a test does its work on two ranks, or on four.

They are started once and live as long as the tests do: most of their time is the import of torch.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int, str], None]
SECONDS = 300
_started: dict[int, list[tuple[BaseProcess, Connection]]] = {}


def _serve(rank: int, ranks: int, pipe: Connection, store: str) -> None:
    torch.set_num_threads(1)
    # A file, not a port: nothing else on the machine can take it.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    while True:
        try:
            work, folder = pipe.recv()
        except EOFError:
            # Seen twice: taking the process group and its threads down at the end of a process aborted ("terminate
            # called without an active exception"), after all work was done.
            os._exit(0)
        torch.manual_seed(0)
        try:
            work(rank, folder)
            gc.collect()
            dist.barrier()
            pipe.send(None)
        except BaseException:
            pipe.send(traceback.format_exc())


def _start(ranks: int, store: Path) -> None:
    context = mp.get_context("spawn")
    _started[ranks] = []
    for rank in range(ranks):
        mine, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(rank, ranks, theirs, str(store)), daemon=True)
        process.start()
        theirs.close()
        _started[ranks].append((process, mine))


def on_two_ranks(work: Work, folder: Path) -> None:
    """Calls `work(rank, folder)` in both processes; what fails in one of them fails here, and ends both."""
    on_ranks(2, work, folder)


def on_ranks(ranks: int, work: Work, folder: Path) -> None:
    """Calls `work(rank, folder)` in so many processes; what fails in one of them fails here, and ends all."""
    if ranks not in _started:
        _start(ranks, folder / f"store{ranks}")
    pipes = [pipe for _, pipe in _started[ranks]]
    try:
        for pipe in pipes:
            pipe.send((work, str(folder)))
        left = set(pipes)
        while left:
            ready = wait(list(left), SECONDS)
            assert ready, f"no answer in {SECONDS} s"
            for pipe in ready:
                error = pipe.recv()  # type: ignore[union-attr]
                assert error is None, error
                left.remove(pipe)  # type: ignore[arg-type]
    except BaseException:
        for process, _ in _started.pop(ranks):
            process.kill()
        raise
