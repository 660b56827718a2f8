"""The end of a finished model, where a user asks a callback for it: the ONNX file, and its verification."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

from sparsify.errors import SparsifyWarning
from sparsify.model.batches import mapped
from sparsify.onnx.export import export_onnx
from sparsify.onnx.exported import ExportedModel
from sparsify.onnx.verify import Verification, verify_onnx

__all__: list[str] = []

log = logging.getLogger("sparsify")


def export_finished(
    model: nn.Module, inputs: Any, path: str | os.PathLike[str], *, verify: bool
) -> tuple[ExportedModel, Verification | None]:
    """Writes `model` to `path` and compares the two, if that is wanted; a difference is a SparsifyWarning.

    The inputs may live on another device than the model, which keeps its mode.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    inputs = moved_tensors(inputs, device)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        exported = export_onnx(model, inputs, path)
        log.info("%s", exported)
        found = verify_onnx(model, path, inputs) if verify else None
        if found is not None:
            log.info("%s", found)
            if not found.ok:
                warnings.warn(str(found), SparsifyWarning, stacklevel=3)
        return exported, found
    finally:
        for module, training in modes:
            module.training = training


def moved_tensors(value: Any, device: torch.device) -> Any:
    """Tensors of nested tuples, lists, mappings and dataclasses on `device`, without a graph."""
    return mapped(value, lambda tensor: tensor.detach().to(device))
