"""Inputs of a model made of its training set, where no call of it can be watched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from sparsify.errors import StateError
from sparsify.model.preserved import preserved_rng

__all__: list[str] = []


def inputs_of_data(model: nn.Module, data: Any, collate: Callable[[Any], Any], labels: Iterable[str]) -> dict[str, Any]:
    """A batch of two rows of `data` as the model takes it, without labels. The random state stays as it was.

    Args:
        model: the model; columns that its forward does not take are left out.
        data: a data set whose rows are asked for by number.
        collate: makes a batch of rows.
        labels: names of columns that are labels.

    Raises:
        StateError: it has no such rows.
    """
    known = set(inspect.signature(model.forward).parameters)
    drop = {"label", "label_ids", "labels", *labels}
    try:
        with preserved_rng(model):
            rows = [data[index] for index in range(min(2, len(data)))]
            rows = [{k: v for k, v in row.items() if k in known} if isinstance(row, dict) else row for row in rows]
            batch = dict(collate(rows))
    except (TypeError, AttributeError, NotImplementedError, KeyError) as error:
        raise StateError(
            f"inputs to trace or export the model cannot be made of the training set ({error}). Pass sample_inputs "
            "to SparsifyCallback."
        ) from error
    device = next(model.parameters()).device
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name in known and name not in drop
    }
