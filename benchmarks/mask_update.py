"""Time of a mask update: nanoseconds per weight, paired against a threshold found with torch.kthvalue.

    python benchmarks/mask_update.py [--quick] [--threads 1] [--device cpu]

An update is all of: rank, select, make the mask, zero the weights. The optimizer's state (one momentum buffer) is
shown apart. The two sides alternate, each run on fresh copies of the same weights; medians with minimum and maximum.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import numpy as np
import torch
from torch import Tensor, nn

from sparsify.model.optimizer_state import reset_where
from sparsify.pruning.masker import Masker
from sparsify.pruning.masks import compute_masks

TARGET_NS = 5.0


class Weights(nn.Module):
    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(values)


def values(kind: str, size: int, device: str) -> Tensor:
    w = torch.randn(size, generator=torch.Generator().manual_seed(0))
    if kind == "80 % zeros":
        w[torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.8] = 0.0
    if kind == "tied":
        w = (w * 10).round_().div_(10)
    return w.to(device)


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(masker: Masker, sparsity: float, device: str) -> float:
    start = clock(device)
    weight = masker.model.get_parameter("w")
    masks = compute_masks({"w": weight}, sparsity, previous=masker.masks)
    masker.set("w", masks["w"])
    return clock(device) - start


def kthvalue(weight: Tensor, sparsity: float, device: str) -> float:
    start = clock(device)
    size = weight.abs()
    threshold = size.kthvalue(round(size.numel() * sparsity)).values
    mask = size > threshold
    weight.mul_(mask)
    return clock(device) - start


def row(kind: str, size: int, sparsity: float, repeats: int, device: str) -> bool:
    source = values(kind, size, device)
    previous = compute_masks({"w": source}, 0.8)["w"] if kind == "80 % zeros" else None
    model = Weights(source.clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.w.grad = torch.ones_like(model.w)
    optimizer.step()
    update, state, plain = [], [], []
    for repeat in range(repeats + 1):  # the first warms up
        with torch.no_grad():
            model.w.copy_(source)
        masker = Masker(model)
        if previous is not None:
            masker.set("w", previous)
        bare = ours(masker, sparsity, device)
        mask = masker.masks["w"]
        start = clock(device)
        reset_where(optimizer, model.w, mask)
        cleared = clock(device) - start
        other = kthvalue(source.clone(), sparsity, device)
        if repeat:
            update.append(bare / size * 1e9)
            state.append(cleared / size * 1e9)
            plain.append(other / size * 1e9)
    ns = statistics.median(update)
    print(
        f"{size:>10,}  {kind:<10} {sparsity:>5.0%}  {ns:6.2f} ({min(update):.2f}-{max(update):.2f})  "
        f"{statistics.median(state):5.2f}  {statistics.median(plain):7.2f} ({min(plain):.2f}-{max(plain):.2f})  "
        f"{statistics.median(p / u for p, u in zip(plain, update, strict=True)):5.1f}x  "
        f"{'reached' if ns <= TARGET_NS else 'MISSED'}",
        flush=True,
    )
    return ns <= TARGET_NS


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats: that it runs, not how fast")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: skipped")
        return True
    sizes = (60_000, 200_000) if options.quick else (1_000_000, 11_000_000, 50_000_000)
    repeats = 2 if options.quick else options.repeats
    print(
        f"torch {torch.__version__}, numpy {np.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{options.device}, {options.threads} thread{'s' if options.threads > 1 else ''}, {repeats} repeats"
    )
    print(f"ns per weight, median (min-max); target: at most {TARGET_NS} for the update")
    print(f"{'weights':>10}  {'values':<10} {'goal':>5}  {'update':<19}  {'state':>5}  {'torch.kthvalue':<23}  ratio")
    reached = True
    for size in sizes:
        for kind, sparsity in (("dense", 0.5), ("dense", 0.9), ("80 % zeros", 0.85), ("tied", 0.85)):
            reached &= row(kind, size, sparsity, repeats, options.device)
    return reached


if __name__ == "__main__":
    main()
