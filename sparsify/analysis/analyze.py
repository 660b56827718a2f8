"""Analyzes a model, a torch module or an ONNX file, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsify.analysis.layers import ModelAnalysis
from sparsify.analysis.onnx_layers import analyze_file
from sparsify.analysis.torch_layers import analyze_module
from sparsify.model.signature import check_module

if TYPE_CHECKING:
    from torch import nn

    from sparsify.model.signature import InputsLike

__all__ = ["analyze_model"]


def analyze_model(
    model: nn.Module | str | os.PathLike[str],
    sample_inputs: InputsLike | None = None,
    *,
    sample_kwargs: Mapping[str, Any] | None = None,
    batch_size: int = 1,
) -> ModelAnalysis:
    """The layers that `model` computes on `sample_inputs`, with their shapes and MACs; the model is not changed.

    MACs are those of convolutions, linear layers, matrix products, attention and recurrent layers: products that are
    summed up. Biases, norms, activations, pools, additions and looking up embeddings count nothing. Operators that
    multiply in a way that is not known here are listed in `unknown`.

    A module is read from its traced view. One that cannot be traced is watched in one forward in eval mode; there
    `why_not_quantizable` says why it could not be traced, because then it cannot be quantized.

    Args:
        model: a module, wrapped in DistributedDataParallel or torch.compile, too; or the path of an ONNX file.
        sample_inputs: a tensor, a tuple of arguments, or a dictionary of keyword arguments. For an ONNX file not
            needed: arrays, whose shapes take the place of those in the file.
        sample_kwargs: keyword arguments besides.
        batch_size: of an ONNX file whose batch may be of any length, where there are no sample inputs.

    Raises:
        ArgumentError: the model fails on these inputs; the message says in which module.
        DataError: a file that is no ONNX model.
    """
    if isinstance(model, (str, os.PathLike)):
        return analyze_file(model, sample_inputs, batch_size=batch_size)
    return analyze_module(check_module(model, other=", or the path of an ONNX file"), sample_inputs, sample_kwargs)
