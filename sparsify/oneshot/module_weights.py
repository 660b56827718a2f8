"""The weights of a torch module for compression without training: found, and written with a note of their form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from sparsify.errors import DataError
from sparsify.model.recomputed import recomputed_weights
from sparsify.model.targets import named_modules
from sparsify.model.wrappers import clean_name
from sparsify.oneshot.weight_forms import LaidOutWeight, WeightForm
from sparsify.quantization.conversion import original_type, weight_bits
from sparsify.quantization.weight_grid import channel_axis

__all__: list[str] = []

NOTED = "_compressed_forms"
"""Attribute of a module: {its parameter: the form that its values have}."""


@dataclass
class CandidateWeight:
    """A weight that may be compressed.

    Attributes:
        name: under which it is reported. names: all under which settings may name it. kinds: types of its readers.
        elements: how many it has. reason: why it stays as it is in any case; None: it need not.
        dtype: in which it is stored. stored: in a file, the value that its readers read.
    """

    name: str
    names: list[str]
    kinds: list[str]
    shape: tuple[int, ...]
    dtype: str
    stored_bytes: int
    reason: str | None = None
    stored: str = ""
    children: list[tuple[nn.Module, str]] = field(default_factory=list)

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def module_weights(model: nn.Module) -> Iterator[tuple[CandidateWeight, nn.Parameter]]:
    """Every parameter in floats of two dimensions or more, once, with its layers.

    Raises:
        DataError: one holds NaN or infinite values, or none at all.
    """
    recomputed = {
        name for made in recomputed_weights(model).values() for name in (made.direction, *made.others) if name
    }
    found: dict[int, tuple[CandidateWeight, nn.Parameter]] = {}
    for path, module in {"": model, **named_modules(model)}.items():
        for own, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point() or parameter.dim() < 2:
                continue
            name = clean_name(f"{path}.{own}" if path else own)
            kind = original_type(module).__name__
            if id(parameter) in found:
                known = found[id(parameter)][0]
                known.names += [name, path]
                known.kinds.append(kind)
                known.children.append((module, own))
                continue
            weight = CandidateWeight(
                name,
                [name, path],
                [kind],
                tuple(parameter.shape),
                str(parameter.dtype).removeprefix("torch."),
                parameter.numel() * parameter.element_size(),
                children=[(module, own)],
            )
            if parameter.is_meta:
                raise DataError(f"{name} is on the meta device and has no values: load the model's weights first.")
            if name in recomputed:
                weight.reason = "the layer's weight is computed from it (weight_norm and the like)"
            elif own == "weight" and weight_bits(module):
                weight.reason = "it is quantized already"
            found[id(parameter)] = weight, parameter
    yield from found.values()


def parameter_values(weight: CandidateWeight, parameter: nn.Parameter) -> LaidOutWeight:
    """The values of a parameter with its channels, and the form that they have.

    Raises:
        DataError: NaN or infinite values.
    """
    values = parameter.detach().float().cpu().numpy()
    check_finite(weight.name, values)
    module, own = weight.children[0]
    axis = channel_axis(module) if own == "weight" else 0
    return LaidOutWeight(values, axis, 1 - axis, noted_form(module, own))


def check_finite(name: str, values: np.ndarray) -> None:
    """Refuses NaN and infinite weights.

    Raises:
        DataError: there are some.
    """
    if not np.isfinite(values).all():
        wrong = int(values.size - np.count_nonzero(np.isfinite(values)))
        raise DataError(f"{name} holds {wrong} values that are NaN or infinite: load weights that were not diverged.")


def noted_form(module: nn.Module, own: str) -> WeightForm:
    """The form of a parameter; None: floats, or it was changed since it was compressed."""
    form: WeightForm = module.__dict__.get(NOTED, {}).get(own)
    parameter = module._parameters.get(own)
    if form is None or parameter is None:
        return None
    values = torch.from_numpy(form.values()).to(parameter.dtype)
    return form if values.shape == parameter.shape and torch.equal(values, parameter.detach().cpu()) else None


def put_weight(weight: CandidateWeight, parameter: nn.Parameter, new: LaidOutWeight) -> None:
    """Writes values into a parameter, and the note of their form."""
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(new.values)))
    for module, own in weight.children:
        forms = module.__dict__.setdefault(NOTED, {})
        forms.pop(own, None)
        if new.form is not None:
            forms[own] = new.form
