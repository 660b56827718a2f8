"""The teacher of distillation: a module of the user's or a frozen copy of the student, asked batch by batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.errors import ArgumentError, StateError
from sparsify.model.batches import mapped
from sparsify.model.copies import deep_copied
from sparsify.modifiers.base import Run

__all__: list[str] = []


class DistillationTeacher:
    """Runs in eval mode, without gradients, on the student's inputs; "self" is copied now, before anything changes it.

    Checkpoint: the weights of a "self" teacher; the student of a resumed run starts with other ones.

    Args:
        run: has the teacher that the user gave, and the student.
        who: the modifier, for messages.
        keys: the names of the inputs that it gets; None: all.

    Raises:
        ArgumentError: there is none to train with, or it is the student.
    """

    def __init__(self, run: Run, who: str, keys: Sequence[str] | None = None) -> None:
        # Without an optimizer there is no loss: a structure can be rebuilt without the teacher.
        if run.teacher is None and run.optimizer is not None:
            raise ArgumentError(f'{who} needs a teacher: pass distillation_teacher= to modify(), a module or "self".')
        if isinstance(run.teacher, nn.Module) and any(module is run.model for module in run.teacher.modules()):
            raise ArgumentError(
                "distillation_teacher is the model that is trained; it would be its own moving target. Pass "
                '"self" for a frozen copy of it as it is now.'
            )
        self._student, self._who, self._keys = run.model, who, keys
        self._own = run.teacher == "self"
        self._modes: list[tuple[nn.Module, bool]] = []
        self.module: nn.Module | None = None
        if isinstance(run.teacher, nn.Module):
            self.module = run.teacher
            _refuse_meta(run.teacher)
        elif self._own:
            self.module = deep_copied(run.model).requires_grad_(False).eval()

    def __call__(self, inputs: tuple[tuple[Any, ...], dict[str, Any]], device: torch.device) -> Any:
        """Its outputs on the student's inputs, on `device`. A copy moves there with the student; a user's module stays
        on its own device and in its own precision: inputs are taken there."""
        teacher = self.module
        if teacher is None:
            raise StateError("there is no teacher: pass distillation_teacher= to modify() or initialize().")
        if teacher.training:
            # Remembered per module: a user's teacher gets its modes back.
            self._modes = [(module, module.training) for module in teacher.modules()]
            teacher.eval()
        if self._own and any(parameter.device != device for parameter in teacher.parameters()):
            teacher.to(device)
        place, dtype = _place_of(teacher)
        args, kwargs = _taken_to(chosen(self._student, *inputs, self._keys), place, dtype)
        with torch.no_grad():
            outputs = teacher(*args, **kwargs)
        return outputs if place in (None, device) else _taken_to(outputs, device, None)

    def release(self) -> None:
        """Gives the teacher's modules their modes back; may be called twice."""
        for module, training in self._modes:
            module.training = training
        self._modes = []

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": dict(self.module.state_dict())} if self._own and self.module is not None else {}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses the weights of another model, with a StateError."""
        if self._own and self.module is not None and "teacher" in state:
            here = {name: tuple(value.shape) for name, value in self.module.state_dict().items()}
            saved = {name: tuple(value.shape) for name, value in state["teacher"].items()}
            differing = [name for name in {**here, **saved} if here.get(name) != saved.get(name)]
            if differing:
                raise StateError(
                    f"{self._who}: the state's teacher, a copy of its model, is of another kind than this model: "
                    f"{differing[0]!r} has shape {saved.get(differing[0])} there, {here.get(differing[0])} here. Load "
                    "the state of this model, or pass a teacher as distillation_teacher=."
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._own and self.module is not None and "teacher" in state:
            self.module.load_state_dict(state["teacher"])


def _refuse_meta(teacher: nn.Module) -> None:
    empty = next((name for name, p in teacher.named_parameters() if p.is_meta), None)
    if empty is not None:
        raise ArgumentError(
            f"distillation_teacher: {empty!r} is on the meta device and holds no values. Load the teacher's weights "
            "before modify()."
        )


def _place_of(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """The device of a module, and the precision in which most of its weights are; None where it has no weights."""
    sizes: dict[torch.dtype, int] = {}
    device = None
    for parameter in module.parameters():
        device = device or parameter.device
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return device, max(sizes, key=lambda dtype: sizes[dtype], default=None)


def _taken_to(values: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """Tensors in `values` on `device`, those of floating point in `dtype`; None: as they are."""

    def take(value: Tensor) -> Tensor:
        wanted = dtype if value.is_floating_point() else None
        return value.to(device=device or value.device, dtype=wanted or value.dtype)

    return mapped(values, take)


def chosen(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], keys: Sequence[str] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs named `keys` of a call of `model`; all of them, as they are, where `keys` is None.

    Raises:
        StateError: the call has no input of that name.
    """
    if keys is None:
        return args, kwargs
    one = args[0] if len(args) == 1 and not kwargs else None
    named = one if isinstance(one, Mapping) else inspect.signature(model.forward).bind(*args, **kwargs).arguments
    # **kwargs of a forward stand one level deeper.
    named = {**named, **kwargs}
    missing = [key for key in keys if key not in named]
    if missing:
        raise StateError(
            f"teacher_input_keys: there is no input {missing[0]!r}; the model was called with {sorted(named)}."
        )
    selected = {key: named[key] for key in keys}
    return ((selected,), {}) if isinstance(one, Mapping) else ((), selected)
