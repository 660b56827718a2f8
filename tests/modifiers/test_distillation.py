"""Distillation: the formula, the teachers, and every form in which a model returns its outputs."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from sparsify.errors import ArgumentError, StateError
from sparsify.modifiers.distillation import DistillationModifier, divergence
from sparsify.training.manager import ScheduledModifierManager
from tests.zoo.small import perceptron

STUDENT = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
TEACHER = torch.tensor([[4.0, 1.0, 0.0], [2.0, 0.0, 0.0]])


class Says(nn.Module):
    """Returns what it was given, times a parameter that is 1."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))
        self.outputs = outputs
        self.calls: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs, self.training, torch.is_grad_enabled()))

        def times(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value * self.one
            if isinstance(value, dict):
                return type(value)((key, times(item)) for key, item in value.items())
            return type(value)(map(times, value)) if isinstance(value, tuple | list) else value

        return times(self.outputs)


def total(student: Any, teacher: Any, loss: float = 5.0, given: Any = None, called: Any = None, **fields: Any) -> float:
    model, other = Says(student), Says(teacher)
    manager = ScheduledModifierManager([DistillationModifier(**{"hardness": 1.0, **fields})])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager.modify(model, optimizer, steps_per_epoch=4, distillation_teacher=other)
    model(*(called or (torch.ones(1),)))
    result = manager.update_loss(torch.tensor(loss), **(given or {}))
    assert other.calls[0][2:] == (False, False), "the teacher is in eval and keeps no graph"
    return float(result.detach())


def entropy_by_hand(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    p = (teacher.double() / temperature).exp()
    q = (student.double() / temperature).exp()
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    rows = student.numel() / student.shape[-1]
    return float((p * (p / q).log()).sum() * temperature**2 / rows)


def test_the_number_of_the_recipe_dialect_comes_out() -> None:
    assert total(STUDENT, TEACHER, temperature=2.0) == pytest.approx(1.9192357, abs=1e-6)
    # The other direction would give 1.9376993.
    assert total(TEACHER, STUDENT, temperature=2.0) == pytest.approx(1.9376993, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 7), (1, 2)])
def test_the_divergence_is_the_formula(temperature: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(shape) * 3, torch.randn(shape) * 3
    found = divergence(student, teacher, temperature)
    assert float(found) == pytest.approx(entropy_by_hand(student, teacher, temperature), rel=1e-4)
    assert float(divergence(student, student, temperature)) == pytest.approx(0.0, abs=1e-6)


def test_a_batch_of_copies_has_the_divergence_of_one() -> None:
    assert float(divergence(STUDENT.repeat(5, 1), TEACHER.repeat(5, 1), 2.0)) == pytest.approx(1.9192357, abs=1e-6)


@pytest.mark.parametrize("hardness", [0.0, 0.25, 0.5, 1.0])
def test_hardness_is_the_teachers_share(hardness: float) -> None:
    model, teacher = Says(STUDENT), Says(TEACHER)
    manager = ScheduledModifierManager([DistillationModifier(hardness=hardness)])
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, distillation_teacher=teacher)
    model(torch.ones(1))
    loss = torch.tensor(5.0)
    found = manager.update_loss(loss)
    assert float(found.detach()) == pytest.approx((1 - hardness) * 5.0 + hardness * 1.9192357, abs=1e-5)
    if hardness == 0.0:
        assert found is loss and not teacher.calls


def test_outside_its_window_the_loss_is_the_loss() -> None:
    model, teacher = Says(STUDENT), Says(TEACHER)
    manager = ScheduledModifierManager([DistillationModifier(start_epoch=1.0, end_epoch=2.0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    manager.modify(model, optimizer, steps_per_epoch=2, distillation_teacher=teacher)
    same = []
    for _ in range(6):
        model(torch.ones(1))
        loss = model.one * 5.0
        found = manager.update_loss(loss)
        same.append(found is loss)
        found.backward()
        optimizer.step()
    assert same == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("student", "teacher", "fields"),
    [
        ((STUDENT,), (TEACHER,), {}),
        ([STUDENT, STUDENT], [TEACHER, TEACHER], {}),
        ((STUDENT, TEACHER), (TEACHER, STUDENT), {"distill_output_keys": [0]}),
        ({"logits": STUDENT}, {"logits": TEACHER}, {}),
        (OrderedDict(logits=STUDENT, ids=torch.arange(3)), OrderedDict(logits=TEACHER, ids=torch.arange(3)), {}),
        ({"logits": STUDENT, "loss": torch.tensor(3.0)}, {"logits": TEACHER, "loss": torch.tensor(4.0)}, {}),
        ({"a": STUDENT, "b": TEACHER}, {"a": TEACHER, "b": STUDENT}, {"distill_output_keys": ["a"]}),
        ({"a": STUDENT, "cache": (1, 2)}, {"a": TEACHER, "more": TEACHER}, {}),
        (STUDENT.bfloat16(), TEACHER.bfloat16(), {}),
    ],
)
def test_every_form_of_outputs_is_compared(student: Any, teacher: Any, fields: dict[str, Any]) -> None:
    assert total(student, teacher, **fields) == pytest.approx(1.9192357, abs=1e-5)


def test_several_outputs_are_averaged() -> None:
    found = total({"a": STUDENT, "b": TEACHER}, {"a": TEACHER, "b": STUDENT})
    assert found == pytest.approx((1.9192357 + 1.9376993) / 2, abs=1e-5)


def test_the_output_of_a_transformer_is_compared() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    student = outputs.SequenceClassifierOutput(loss=torch.tensor(1.0), logits=STUDENT)
    teacher = outputs.SequenceClassifierOutput(loss=torch.tensor(2.0), logits=TEACHER)
    manager = ScheduledModifierManager([DistillationModifier(hardness=1.0)])
    model = Says(STUDENT)

    class Teaches(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return teacher

    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, distillation_teacher=Teaches())
    loss = manager.update_loss(torch.tensor(5.0), outputs=student, inputs=torch.ones(1))
    assert float(loss.detach()) == pytest.approx(1.9192357, abs=1e-5)


@pytest.mark.parametrize(
    ("student", "teacher", "fields", "text"),
    [
        ({"a": STUDENT}, {"a": TEACHER}, {"distill_output_keys": ["b"]}, "student returned a dict .*'b' is no tensor"),
        ({"a": STUDENT}, {"b": TEACHER}, {}, "teacher returned a dict .*'a' is no tensor"),
        (STUDENT, TEACHER[:, :2], {}, r"shape \(2, 3\), that of the teacher \(2, 2\)"),
        (("x",), ("x",), {}, "there is no tensor of logits"),
    ],
)
def test_outputs_that_do_not_fit_are_refused(student: Any, teacher: Any, fields: Any, text: str) -> None:
    with pytest.raises(StateError, match=text):
        total(student, teacher, **fields)


def test_outputs_and_inputs_can_be_given() -> None:
    assert total(TEACHER, TEACHER, given={"outputs": STUDENT}) == pytest.approx(1.9192357, abs=1e-6)


def test_the_teacher_gets_the_students_inputs_or_those_that_are_named() -> None:
    class Named(Says):
        def forward(self, ids: Any, mask: Any = None, *, extra: Any = None) -> Any:  # type: ignore[override]
            return super().forward(ids)

    for keys, wanted in (
        (None, ((1,), {"mask": 2, "extra": 3})),
        (["ids", "extra"], ((), {"ids": 1, "extra": 3})),
        (["mask"], ((), {"mask": 2})),
    ):
        model, teacher = Named(STUDENT), Says(TEACHER)
        manager = ScheduledModifierManager([DistillationModifier(hardness=1.0, teacher_input_keys=keys)])
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, distillation_teacher=teacher)
        model(1, mask=2, extra=3)
        manager.update_loss(torch.tensor(1.0))
        assert teacher.calls[0][:2] == wanted
    model = Says(STUDENT)
    manager = ScheduledModifierManager([DistillationModifier(hardness=1.0, teacher_input_keys=["ids"])])
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, distillation_teacher=teacher)
    model({"ids": 1, "labels": 2})
    manager.update_loss(torch.tensor(1.0))
    assert teacher.calls[-1][:2] == (({"ids": 1},), {})
    model({"labels": 2})
    with pytest.raises(StateError, match=r"there is no input 'ids'; the model was called with \['labels'\]"):
        manager.update_loss(torch.tensor(1.0))


# ------------------------------------------------------------------------------------- teachers


def network() -> nn.Module:
    return perceptron(4, 8, 3, activation=nn.ReLU, norm=True, dropout=0.5)


def test_the_gradient_reaches_the_student_and_not_the_teacher() -> None:
    model, teacher = network(), network()
    manager = ScheduledModifierManager([DistillationModifier(hardness=1.0)])
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4, distillation_teacher=teacher)
    outputs = model(torch.randn(5, 4))
    manager.update_loss(outputs.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_a_users_teacher_gets_its_modes_back() -> None:
    model, teacher = network(), network()
    teacher[1].eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    manager = ScheduledModifierManager([DistillationModifier()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager.modify(model, optimizer, 4, distillation_teacher=teacher)
    manager.update_loss(model(torch.randn(5, 4)).sum())
    assert not any(module.training for module in teacher.modules())
    manager.finalize(model)
    assert teacher.training and not teacher[1].training and teacher[4].training
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


def test_a_teacher_that_is_itself_is_a_frozen_copy_of_the_start() -> None:
    model = network()
    start = copy.deepcopy(model).eval()
    manager = ScheduledModifierManager([DistillationModifier(hardness=1.0, temperature=3.0)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager.modify(model, optimizer, steps_per_epoch=4, distillation_teacher="self")
    for _ in range(5):
        optimizer.zero_grad()
        inputs = torch.randn(6, 4)
        outputs = model(inputs)
        loss = manager.update_loss(outputs.sum())
        with torch.no_grad():
            assert float(loss.detach()) == pytest.approx(
                entropy_by_hand(outputs.detach(), start(inputs), 3.0), rel=1e-4
            )
        loss.backward()
        optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_the_weights_of_a_teacher_that_is_itself_are_kept_in_the_state() -> None:
    model = network()
    manager = ScheduledModifierManager([DistillationModifier(hardness=1.0)])
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.5), 4, distillation_teacher="self")
    state = manager.state_dict()
    other = nn.Sequential(*(copy.deepcopy(layer) for layer in network()))
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    second = ScheduledModifierManager([DistillationModifier(hardness=1.0)])
    second.modify(other, torch.optim.SGD(other.parameters(), lr=0.5), 4, distillation_teacher="self")
    second.load_state_dict(state)
    inputs, outputs = torch.randn(5, 4), torch.randn(5, 3)
    losses = [m.update_loss(torch.ones(()), outputs=outputs, inputs=inputs) for m in (manager, second)]
    assert torch.equal(*losses)


def test_a_missing_teacher_is_refused_and_so_is_the_model() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    manager = ScheduledModifierManager([DistillationModifier()])
    with pytest.raises(ArgumentError, match=r"pass distillation_teacher= to modify\(\), a module or \"self\""):
        manager.modify(model, optimizer, 4)
    with pytest.raises(ArgumentError, match="its own moving target"):
        manager.modify(model, optimizer, 4, distillation_teacher=model)
    manager.initialize(model)
    with pytest.raises(StateError, match="there is no teacher"):
        manager.update_loss(torch.ones(()), outputs=STUDENT, inputs=torch.ones(2, 4))


@pytest.mark.parametrize("of_teacher", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("of_student", [torch.float32, torch.bfloat16])
def test_a_teacher_in_another_precision_gets_inputs_in_its_own(
    of_teacher: torch.dtype, of_student: torch.dtype
) -> None:
    model, teacher = network().to(of_student), network().to(of_teacher)
    manager = ScheduledModifierManager([DistillationModifier(hardness=1.0)])
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.5), 4, distillation_teacher=teacher)
    inputs = torch.randn(5, 4).to(of_student)
    outputs = model(inputs)
    loss = manager.update_loss(outputs.sum())
    expected = entropy_by_hand(outputs.detach(), teacher.eval()(inputs.to(of_teacher)).detach(), 2.0)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    loss.backward()
    assert {p.dtype for p in teacher.parameters()} == {of_teacher}, "the teacher is the user's"


def test_a_teacher_without_values_is_refused_before_training() -> None:
    model = network()
    manager = ScheduledModifierManager([DistillationModifier()])
    with pytest.raises(ArgumentError, match=r"'0\.weight' is on the meta device and holds no values"):
        manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.5), 4, distillation_teacher=network().to("meta"))


# ------------------------------------------------------------------------------------- what was captured


def test_without_a_forward_outputs_are_asked_for() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    manager = ScheduledModifierManager([DistillationModifier()])
    manager.modify(model, optimizer, 4, distillation_teacher="self")
    with torch.no_grad():
        model(torch.randn(5, 4))
    with pytest.raises(StateError, match=r"update_loss\(loss, outputs=outputs, inputs=inputs\)"):
        manager.update_loss(torch.ones(()))
    outputs = model(torch.randn(5, 4))
    with torch.no_grad():
        model(torch.randn(9, 4))
    manager.update_loss(outputs.sum()).backward()
    optimizer.step()
    with pytest.raises(StateError, match="no forward with gradients since the last step"):
        manager.update_loss(torch.ones(()))


def test_accumulation_compares_every_batch_with_its_own_teaching() -> None:
    model = network()
    start = copy.deepcopy(model).eval()
    manager = ScheduledModifierManager([DistillationModifier(hardness=1.0)])
    manager.modify(model, torch.optim.SGD(model.parameters(), lr=0.5), 4, distillation_teacher="self")
    for size in (2, 5, 3):
        inputs = torch.randn(size, 4)
        outputs = model(inputs)
        loss = manager.update_loss(outputs.sum())
        assert float(loss.detach()) == pytest.approx(
            entropy_by_hand(outputs.detach(), start(inputs).detach(), 2.0), rel=1e-4
        )
        loss.backward()
