"""Tensors of half precision: a model that is worked on in float32, and goes back to what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.model.batches import mapped
from sparsify.model.wrappers import clean_name

__all__: list[str] = []

HALF_PRECISIONS = (torch.float16, torch.bfloat16)


def half_tensors(model: nn.Module) -> dict[str, torch.dtype]:
    """The parameters and buffers in float16 or bfloat16, by name."""
    return {name: tensor.dtype for name, tensor in _parameters_and_buffers(model) if tensor.dtype in HALF_PRECISIONS}


def to_float32_(model: nn.Module) -> None:
    """Turns what is in half precision to float32. Parameters stay the same objects."""
    for _, tensor in _parameters_and_buffers(model):
        if tensor.dtype in HALF_PRECISIONS:
            tensor.data = tensor.data.float()


def to_dtypes_(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Turns the tensors of these names to `dtypes`. Parameters stay the same objects."""
    for name, tensor in _parameters_and_buffers(model):
        if name in dtypes:
            tensor.data = tensor.data.to(dtypes[name])


def in_float32(inputs: Any) -> Any:
    """`inputs` with float32 tensors in the place of those in half precision."""
    return mapped(inputs, lambda tensor: tensor.float() if tensor.dtype in HALF_PRECISIONS else tensor)


def _parameters_and_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        yield clean_name(name), tensor
