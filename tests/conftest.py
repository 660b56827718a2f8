"""Settings that all tests share."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

# Two test processes on two cores; and sums come in one order, whatever machine this is.
torch.set_num_threads(1)

# The same examples in every run, so that a red build is red for everybody; `make test-all` goes looking for new ones.
quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50, suppress_health_check=quiet)
settings.register_profile("all", deadline=None, max_examples=1000, suppress_health_check=quiet, print_blob=True)
# torchvision for the CPU brings no operators of its own; with their names known, it and what imports it (timm,
# torchmetrics) can be imported wherever they are installed.
TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, name):
        TORCHVISION.define(f"{name}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

settings.load_profile("all" if os.environ.get("SPARSIFY_TESTS") == "all" else "default")
