"""Knowledge distillation: the loss of a student that also listens to a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from sparsify.errors import StateError
from sparsify.model.batches import named_fields
from sparsify.modifiers.base import Active, Modifier, ModifierKind, Run
from sparsify.modifiers.schedule import Clock
from sparsify.modifiers.teacher import DistillationTeacher

__all__ = ["DistillationModifier"]

Key = str | int


class DistillationModifier(Modifier):
    """(1 - hardness) * loss + hardness * T^2 * KL(teacher, student) / N, N the number of rows of the outputs.

    Hinton 2015, https://arxiv.org/abs/1503.02531. The teacher is `distillation_teacher` of `modify`, a module or
    "self".
    """

    kind: ClassVar[ModifierKind] = "distillation"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    hardness: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.5, description="The teacher's share of the loss: 0 none, 1 all of it."
    )
    temperature: Annotated[float, Field(gt=0.0)] = Field(
        default=2.0, description="What logits are divided by before softmax; above 1 softens."
    )
    distill_output_keys: list[Key] | None = Field(
        default=None,
        description="Keys (or positions) of the outputs that are compared, where a model returns several; null: all.",
    )
    teacher_input_keys: list[str] | None = Field(
        default=None, description="Names of the inputs that the teacher gets; null: the same inputs as the student."
    )

    def attach(self, run: Run) -> Active:
        """Takes the teacher; "self" is copied now, before anything changes the model."""
        return _Distilling(self, run)


class _Distilling(Active):
    """Runs the teacher on the student's inputs and adds the divergence of their outputs to the loss.

    Checkpoint: the weights of a "self" teacher; the student of a resumed run starts with other ones.
    """

    needs_outputs: ClassVar[bool] = True

    def __init__(self, modifier: DistillationModifier, run: Run) -> None:
        self._modifier = modifier
        self._teacher = DistillationTeacher(run, type(modifier).__name__, modifier.teacher_input_keys)
        self._on = False

    def update(self, clock: Clock) -> None:
        window = self._modifier.window
        self._on = clock.reached(window.start) and not clock.reached(window.end)

    def loss(self, loss: Tensor, *, outputs: Any, inputs: Any, labels: Any) -> Tensor:
        hardness = self._modifier.hardness
        if not self._on or hardness == 0.0:
            return loss
        name = type(self._modifier).__name__
        for given, what in ((outputs, "outputs"), (inputs, "inputs")):
            if given is None:
                raise StateError(
                    f"{name}: the model's {what} were not captured: there was no forward with gradients since the last "
                    "step, or the model is compiled and calls no hooks. Pass them: "
                    "manager.update_loss(loss, outputs=outputs, inputs=inputs)."
                )
        student = logits(outputs, self._modifier.distill_output_keys, f"{name}: the student")
        device = next(iter(student.values())).device
        teacher = logits(self._teacher(inputs, device), list(student), f"{name}: the teacher")
        parts = []
        for key, mine in student.items():
            if mine.shape != teacher[key].shape:
                raise StateError(
                    f"{name}: output {key!r} of the student has shape {tuple(mine.shape)}, that of the teacher "
                    f"{tuple(teacher[key].shape)}. Choose outputs that fit with distill_output_keys."
                )
            parts.append(divergence(mine, teacher[key], self._modifier.temperature))
        return (1.0 - hardness) * loss + hardness * (sum(parts[1:], parts[0]) / len(parts))

    def detach(self) -> None:
        self._teacher.release()

    def state_dict(self) -> dict[str, Any]:
        return self._teacher.state_dict()

    def check_state(self, state: Mapping[str, Any]) -> None:
        self._teacher.check_state(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._teacher.load_state_dict(state)


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher, student) / N for logits (..., classes), N = numel / classes; 0 where they agree.

    KL = sum p (log p - log q), p = softmax(teacher / T), q = softmax(student / T). T^2 keeps the gradients' size.

    >>> import torch
    >>> student, teacher = torch.tensor([[1.0, 2, 3], [0, 0, 1]]), torch.tensor([[4.0, 1, 0], [2, 0, 0]])
    >>> round(divergence(student, teacher, 2.0).item(), 5)
    1.91924
    """
    # In float32: a batch of bfloat16 logits sums to two digits.
    p = functional.log_softmax(teacher.float() / temperature, dim=-1)
    q = functional.log_softmax(student.float() / temperature, dim=-1)
    rows = student.numel() / student.shape[-1]
    return functional.kl_div(q, p, reduction="sum", log_target=True) * (temperature**2 / rows)


def logits(outputs: object, keys: Sequence[Key] | None, whose: str) -> dict[Key, Tensor]:
    """The tensors of a model's outputs that are compared: of a tensor, a tuple or list, or a mapping.

    Args:
        outputs: what the model returned.
        keys: which, by name or position; None: every floating-point tensor of one dimension or more.
        whose: stands in front of a message.

    Raises:
        StateError: a key is not there, or there is nothing to compare.
    """
    named: dict[Key, Any]
    if isinstance(outputs, Tensor):
        named = {0: outputs}
    elif isinstance(outputs, Mapping):
        named = dict(outputs)
        # An output of transformers can be asked by position too:
        # https://huggingface.co/docs/transformers/main_classes/output
        named |= {i: outputs[k] for i, k in enumerate(outputs) if keys is not None and i in keys and i not in named}
    elif isinstance(outputs, tuple | list):
        named = dict(enumerate(outputs))
    else:
        named = {name: value for name, value in (named_fields(outputs) or {}).items()}
    usable = {
        key: value
        for key, value in named.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim()
    }
    missing = [key for key in keys or () if key not in usable]
    if missing or not usable:
        what = f"{missing[0]!r} is no tensor of logits" if missing else "there is no tensor of logits"
        raise StateError(f"{whose} returned a {type(outputs).__name__} with {sorted(map(str, named))}; {what} in it.")
    return usable if keys is None else {key: usable[key] for key in keys}
