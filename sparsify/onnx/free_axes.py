"""Axes of inputs that may have any size when a file runs, beside the batch: checked, and tried at a second size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from sparsify.errors import ArgumentError, ExportError, did_you_mean, first_line

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

    from sparsify.model.signature import SampleInputs

__all__: list[str] = []

BATCH = "batch"
"""The name of the dynamic batch axis in a file."""


def checked_axes(
    call: SampleInputs, given: Mapping[str, Mapping[int, str]] | None, *, batch: bool
) -> dict[str, dict[int, str]]:
    """The names of free axes by input and axis, counted from the front.

    Args:
        call: inputs of one call.
        given: as the user wrote it.
        batch: True if axis 0 is free as the batch.

    Raises:
        ArgumentError: an input or axis is unknown, a name is none, or sizes under one name differ.
    """
    found: dict[str, dict[int, str]] = {}
    sizes: dict[str, tuple[int, str]] = {}
    if not isinstance(given, Mapping | None):
        raise ArgumentError(f'dynamic_axes: {given!r} is no mapping; write {{"input_ids": {{1: "length"}}}}.')
    for key, axes in (given or {}).items():
        if key not in call.inputs:
            raise ArgumentError(
                f"dynamic_axes: {key!r} is no input; there are {', '.join(call.inputs)}."
                f"{did_you_mean(str(key), list(call.inputs))}"
            )
        if not isinstance(axes, Mapping):
            raise ArgumentError(
                f'dynamic_axes: {key!r}: {axes!r} is no mapping of axes to names; write {{1: "length"}}.'
            )
        shape = call.inputs[key].shape
        for axis, name in axes.items():
            place = f"dynamic_axes: {key!r}, axis {axis!r}"
            if isinstance(axis, bool) or not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
                raise ArgumentError(f"{place}: the input has axes 0 to {len(shape) - 1}.")
            axis %= len(shape)
            if not isinstance(name, str) or not name.isidentifier():
                raise ArgumentError(f"{place}: {name!r} is no name; write letters and digits.")
            if batch and axis == 0:
                raise ArgumentError(f"{place}: this is the batch, which dynamic_batch frees; leave it out.")
            if name == BATCH:
                raise ArgumentError(f"{place}: {name!r} is what axis 0 is called; give another name.")
            if shape[axis] < 2:
                raise ArgumentError(
                    f"{place}: its size is {shape[axis]} in the sample, and tracing takes 0 and 1 for constants; give "
                    "2 or more."
                )
            size, where = sizes.setdefault(name, (shape[axis], place))
            if size != shape[axis]:
                raise ArgumentError(f"{place}: {name!r} is {shape[axis]} here and {size} in {where.split(': ', 1)[1]}.")
            if found.setdefault(key, {}).setdefault(axis, name) != name:
                raise ArgumentError(f"{place}: it has two names.")
    return found


def check_free(model: str, proto: ModelProto, free: Mapping[str, Mapping[int, str]]) -> None:
    """Refuses a file in which an axis came out with a fixed size.

    Raises:
        ExportError: with the input, the axis and the size.
    """
    for value in proto.graph.input:
        for axis, name in free.get(value.name, {}).items():
            dim = value.type.tensor_type.shape.dim[axis]
            if not dim.dim_param:
                raise ExportError(
                    f"{model}: its forward fixes axis {axis} of {value.name!r} ({name}) to {dim.dim_value}; leave it "
                    "out of dynamic_axes, or of the batch by dynamic_batch=False."
                )


def at_another_size(
    model: Callable[..., object], tensors: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]
) -> dict[str, Tensor]:
    """The inputs with every free axis half as long, or twice, or one longer: the first of these that the model takes.

    Args:
        model: takes the tensors in a row.
        tensors: inputs of one call.
        axes: names of the free ones, by input and axis.

    Raises:
        ExportError: it takes none of them.
    """
    import torch

    refused: Exception | None = None
    for candidate in _other_sizes(tensors, axes):
        try:
            with torch.no_grad():
                model(*candidate.values())
            return candidate
        except Exception as error:  # Any code of a user may stand in forward.
            refused = refused or error
    names = sorted({name for entry in axes.values() for name in entry.values()})
    raise ExportError(
        f"the model takes no other size of {', '.join(names)} than that of the sample: "
        f"{first_line(refused or ValueError())} Leave it out of dynamic_axes."
    )


def _other_sizes(tensors: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]) -> Iterator[dict[str, Tensor]]:
    import torch

    resize: tuple[Callable[[int], int], ...] = (lambda n: max(2, n // 2), lambda n: 2 * n, lambda n: n + 1)
    for size in resize:
        found = dict(tensors)
        for key, entry in axes.items():
            for axis in entry:
                length = found[key].shape[axis]
                # The values that are there, again from the front: whole numbers stay rows of a table.
                found[key] = found[key].index_select(axis, torch.arange(size(length)) % length)
        if any(found[key].shape != tensors[key].shape for key in axes):
            yield found
