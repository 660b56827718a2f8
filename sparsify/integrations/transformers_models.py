"""Models of the package transformers, built from a saved config: no weights, no network, no code from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from sparsify.errors import ArgumentError, DataError, first_line

__all__: list[str] = []


def built_from_config(folder: Path, name: str, attention: str | None) -> nn.Module:
    """A model of the class `name` of transformers, by the config in `folder`, with random weights.

    Args:
        folder: holds `config.json`.
        name: of a class that transformers itself has; what a config names as code in its folder is not run.
        attention: what computes attention; None: what transformers chooses.

    Raises:
        ArgumentError: transformers has no such class.
        DataError: the config cannot be read, or no such model can be built by it.
    """
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ArgumentError(
            f"load_model: transformers {transformers.__version__} has no model {name!r}. Build the model "
            "that was saved and pass it: load_model(folder, model)."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if attention is not None:
            config._attn_implementation = attention
        model: Any = cls(config)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DataError(
            f"{folder / 'config.json'}: no {name} can be built by it: {first_line(error)}. Build the model that was "
            "saved and pass it: load_model(folder, model)."
        ) from error
    built: nn.Module = model
    return built
