"""Knowledge distillation: the loss of a student that also listens to a teacher."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from sparsify.modifiers.base import Active, Kind, Modifier, Names, Run, not_yet

__all__ = ["DistillationModifier", "PerLayerDistillationModifier"]

Key = str | int


class DistillationModifier(Modifier):
    """(1 - hardness) * loss + hardness * T^2 * KL(teacher, student) / N, N the number of rows of the outputs.

    Hinton 2015, https://arxiv.org/abs/1503.02531. The teacher is `distillation_teacher` of `modify`: a module, or "self".
    """

    kind: ClassVar[Kind] = "distillation"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    hardness: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        default=0.5, description="The teacher's share of the loss: 0 none, 1 all of it."
    )
    temperature: Annotated[float, Field(gt=0.0)] = Field(
        default=2.0, description="What logits are divided by before softmax; above 1 softens."
    )
    distill_output_keys: list[Key] | None = Field(
        default=None,
        description="Keys (or positions) of the outputs that are compared, where a model returns several; null: all of them.",
    )
    teacher_input_keys: list[str] | None = Field(
        default=None, description="Names of the inputs that the teacher gets; null: the same inputs as the student."
    )

    def attach(self, run: Run) -> Active:
        """Takes the teacher."""
        raise NotImplementedError


class PerLayerDistillationModifier(Modifier):
    """Features of the student's layers are drawn to those of the teacher's; loads and saves, does not run yet."""

    kind: ClassVar[Kind] = "distillation"
    runs: ClassVar[bool] = False
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    gain: Annotated[float, Field(ge=0.0)] = Field(default=1.5, description="What the features' loss is multiplied by.")
    normalize: bool = Field(default=True, description="Whether it is divided by the teacher's mean square.")
    student_layer_names: Names | None = Field(default=None, description="Layers of the student; null: all that have a partner.")
    teacher_layer_names: Names | None = Field(default=None, description="Layers of the teacher, in the student's order.")
    project_features: bool = Field(
        default=True, description="Whether features of another width are brought to the teacher's by a learned projection."
    )
    epsilon: Annotated[float, Field(gt=0.0)] = Field(default=1e-6, description="Keeps the division finite.")

    def attach(self, run: Run) -> Active:
        """Says that it cannot run yet."""
        raise not_yet(self)
