"""The manager's state as a file of its own in the folder of a framework's checkpoint."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import DataFileError, SparsifyWarning, StateError
from sparsify.output.files import replacing

__all__: list[str] = []

STATE_FILE = "sparsify.pt"
"""Its name, beside the weights."""


def write_state(folder: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Writes `state`, of plain types and tensors, into `folder`: the old file or the new one, never half of either.

    Raises:
        DataFileError: the folder does not exist or cannot be written.
    """
    with replacing(Path(folder) / STATE_FILE) as path:
        torch.save(dict(state), path)


def read_state(folder: str | os.PathLike[str], writer: str) -> dict[str, Any]:
    """The state in `folder`, on the CPU; no code in it is run.

    Args:
        folder: that of a checkpoint.
        writer: what writes the file, for messages.

    Raises:
        StateError: there is no such file.
        DataFileError: it cannot be read.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise StateError(
            f"{folder} was written without {writer}: it has no {STATE_FILE}, so masks and structure of the model are "
            "not known. Load its weights and begin a new run, or resume from a checkpoint that has one."
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DataFileError(f"cannot read {path}: {error}. Resume from another checkpoint.") from error
    return state


def whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in `folder` that was written to its end; None where there is none at all.

    The Trainer writes trainer_state.json last (transformers 4.50.0 and 5.23.0), and takes the folder with the highest
    number whatever is in it.
    """
    pattern = re.compile(r"checkpoint-(\d+)")
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := pattern.fullmatch(path.name))]
    broken = []
    for _, path in sorted(found, reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            broken.append(path.name)
            continue
        if broken:
            warnings.warn(
                f"{', '.join(broken)} in {folder} was not written to its end; training resumes from {path.name}.",
                SparsifyWarning,
                stacklevel=4,
            )
        return str(path)
    return None
