"""Feature distillation: layers of the student are drawn to the features of the teacher's layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import StateError, TargetError
from sparsify.model import gradients, targets
from sparsify.model.batches import named_fields
from sparsify.model.optimizer_hooks import Callback, ModelCallback
from sparsify.model.param_groups import AddedParameters
from sparsify.model.signature import CallArguments
from sparsify.modifiers.base import Active, Modifier, ModifierKind, ParamNames, Run
from sparsify.modifiers.schedule import Clock
from sparsify.modifiers.teacher import DistillationTeacher

__all__ = ["PerLayerDistillationModifier"]


class PerLayerDistillationModifier(Modifier):
    """Draws features of the student's layers to those of the teacher's: loss + gain * the sum of errors over the pairs.

    The error of a pair is the mean of (student - teacher)^2, with `normalize` over (the mean of teacher^2 + epsilon);
    where a layer is called several times in a forward, the mean over its calls. A layer's features are its output, or
    the first floating-point tensor in it. The teacher is `distillation_teacher` of `modify`, a module or "self"; the
    training loop has to call `update_loss`, and the model must not be compiled, since its features are seen by hooks.

    Where the two differ in width (dimension 1 or the last one, and nothing else), the student's features go through a
    learned linear projection. Projections begin with random numbers of their own, the same in every run. They come into
    being at the first loss and stand in a parameter group of their own in the optimizer, with the settings of its first
    group; LR schedulers that drive it get an entry for that group. At the end of the modifier and at `finalize` they
    are taken out again.

    Checkpoint: the projections, and the weights of a "self" teacher. The optimizer's own state holds what it remembers
    of projections and has one group more while they learn. To load it: modify, then load the manager's state, which
    makes the group, then the optimizer's. A state that is saved after `finalize` loads into a plain optimizer.

    What differs from SparseML: layers of equal width get no projection, and the optimizer's state_dict is not replaced
    by one that leaves the projections out, which lost their momentum.
    """

    resizable: ClassVar[bool] = False
    kind: ClassVar[ModifierKind] = "distillation"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    gain: Annotated[float, Field(ge=0.0)] = Field(default=1.5, description="The factor of the features' loss.")
    normalize: bool = Field(default=True, description="Whether it is divided by the teacher's mean square.")
    student_layer_names: ParamNames | None = Field(
        default=None,
        description="Layers of the student, by names, patterns or types; null: those of the teacher, or, where both "
        "are null, all Linear and convolutions that have a partner of the same name.",
    )
    teacher_layer_names: ParamNames | None = Field(
        default=None, description="Layers of the teacher, in the student's order; null: those of the student."
    )
    project_features: bool = Field(
        default=True,
        description="Whether features of another width are brought to the teacher's by a learned projection.",
    )
    epsilon: Annotated[float, Field(gt=0.0)] = Field(default=1e-6, description="Keeps the division finite.")

    def names(self) -> list[str]:
        """The names in `student_layer_names`, as a list."""
        return _as_names(self.student_layer_names if self.student_layer_names is not None else self.teacher_layer_names)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The layers that it means in `model`, the student."""
        return _resolved(model, self.names(), f"{type(self).__name__}.student_layer_names")

    def attach(self, run: Run) -> Active:
        """Takes the teacher and pairs the layers."""
        return _Features(self, run)


class _Features(Active):
    """Sees the features of the paired layers, and adds their errors to the loss.

    Checkpoint: the projections, and the weights of a "self" teacher; the optimizer holds its own state of projections.
    """

    needs_outputs: ClassVar[bool] = True
    each_optimizer: ClassVar[bool] = True

    def __init__(self, modifier: PerLayerDistillationModifier, run: Run) -> None:
        self._modifier, self._run, self._who = modifier, run, type(modifier).__name__
        self._teacher = DistillationTeacher(run, self._who)
        self._pairs = self._paired()
        self._added = AddedParameters(run.optimizers, self._who)
        self._handles: list[RemovableHandle] = []
        self._watches: dict[str, _LayerOutputs] = {}
        self._on = self._partly = False

    def _paired(self) -> list[tuple[str, str]]:
        modifier, student = self._modifier, self._run.model
        of_student = list(_resolved(student, modifier.names(), f"{self._who}.student_layer_names"))
        teacher = self._teacher.module
        # Without a teacher there is only a structure to rebuild, and this has none.
        if teacher is None:
            return []
        if modifier.student_layer_names is None and modifier.teacher_layer_names is None:
            theirs = _resolved(teacher, [], self._who)
            pairs = [(name, name) for name in of_student if name in theirs]
            if not pairs:
                raise TargetError(
                    f"{self._who}: no Linear or convolution of the student has the name of one of the teacher. Name "
                    "them in student_layer_names and teacher_layer_names."
                )
            return pairs
        names = modifier.teacher_layer_names
        given = _as_names(names if names is not None else modifier.student_layer_names)
        of_teacher = list(_resolved(teacher, given, f"{self._who}.teacher_layer_names"))
        if len(of_student) != len(of_teacher):
            raise TargetError(
                f"{self._who}: student_layer_names are {len(of_student)} layers ({', '.join(of_student[:4])}, ...) and "
                f"teacher_layer_names {len(of_teacher)} ({', '.join(of_teacher[:4])}, ...). Name as many of each; the "
                "first is paired with the first."
            )
        return list(zip(of_student, of_teacher, strict=True))

    def update(self, clock: Clock) -> None:
        window = self._modifier.window
        over = math.isfinite(window.end) and clock.reached(window.end)
        self._on = clock.reached(window.start) and not over and self._modifier.gain != 0.0
        if self._on and not self._handles:
            modules = targets.named_modules(self._run.model)
            begins = self._run.model.register_forward_pre_hook(ModelCallback(self._begins))
            self._handles.append(begins)
            for name in dict.fromkeys(student for student, _ in self._pairs):
                watch = self._watches[name] = _LayerOutputs()
                self._handles.append(modules[name].register_forward_hook(ModelCallback(watch.see)))
        elif not self._on:
            self._unhook()
        if over:
            self._added.remove()

    def _begins(self, *_: object) -> None:
        if _counts():
            self.after_forward()

    def after_forward(self) -> None:
        """Forgets the features of the last forward: they belong to no later loss."""
        for watch in self._watches.values():
            watch.given = []

    def loss(self, loss: Tensor, *, outputs: Any, inputs: Any, labels: Any) -> Tensor:
        if not self._on:
            return loss
        unseen = [name for name, watch in self._watches.items() if not watch.given]
        if unseen or inputs is None:
            what = f"features of layer {unseen[0]!r}" if unseen else "the model's inputs"
            raise StateError(
                f"{self._who}: {what} were not seen: there was no forward with gradients since the last step, the "
                "layer gave no floating-point tensor in it, or the model is compiled and calls no hooks. Train the "
                "model uncompiled while features are compared (compile it after end_epoch), name layers that are "
                "called, or use DistillationModifier, which takes outputs= and inputs=."
            )
        first = next(iter(self._watches.values())).given[0]
        taught = self._taught(inputs, first.device)
        found: list[list[tuple[Tensor, Tensor]]] = []
        for student, teacher in self._pairs:
            mine, theirs = self._watches[student].given, taught[teacher]
            if len(mine) != len(theirs):
                raise StateError(
                    f"{self._who}: {student!r} was called {len(mine)} times and {teacher!r} of the teacher "
                    f"{len(theirs)} times for one batch. Pair layers that are called equally often, call the model as "
                    "a whole, and do not compile the teacher."
                )
            found.append([_comparable(a, b) for a, b in zip(mine, theirs, strict=True)])
        self._make_projections(found)
        total = torch.zeros((), dtype=torch.float32, device=first.device)
        for pair, calls in zip(self._pairs, found, strict=True):
            errors = [self._error(pair, mine, theirs) for mine, theirs in calls]
            total = total + torch.stack(errors).mean().to(total.device)
        return loss + (self._modifier.gain * total).to(loss.device)

    def _taught(self, inputs: CallArguments, device: torch.device) -> dict[str, list[Tensor]]:
        """The features of the teacher's layers, by name, one for each call."""
        found: dict[str, list[Tensor]] = {name: [] for _, name in self._pairs}
        handles = []
        modules = {} if self._teacher.module is None else targets.named_modules(self._teacher.module)
        try:
            for name in found if modules else ():

                def see(module: nn.Module, args: object, output: object, given: list[Tensor] = found[name]) -> None:
                    given += [tensor.detach().clone() for tensor in _feature(output)]

                handles.append(modules[name].register_forward_hook(Callback(see)))
            self._teacher(inputs, device)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _make_projections(self, found: list[list[tuple[Tensor, Tensor]]]) -> None:
        if self._partly:
            self._keep_what_fits(found)
        new: dict[str, Tensor] = {}
        for number, (pair, calls) in enumerate(zip(self._pairs, found, strict=True)):
            mine, theirs = calls[0]
            key = _projection_key(pair)
            if mine.shape == theirs.shape or key in self._added.parameters:
                continue
            dim = self._dim(pair, mine, theirs)
            # Not the user's random numbers, and on every process the same.
            generator = torch.Generator().manual_seed(number)
            bound = 1.0 / math.sqrt(mine.shape[dim])
            weight = torch.rand(theirs.shape[dim], mine.shape[dim], generator=generator, dtype=mine.dtype)
            new[key] = (weight * (2.0 * bound) - bound).to(mine.device)
        self._added.add(new)

    def _keep_what_fits(self, found: list[list[tuple[Tensor, Tensor]]]) -> None:
        """Keeps, of the projections of another recipe or model, those for the width of features here."""
        self._partly = False
        there = self._added.state_dict()
        kept = {}
        for pair, calls in zip(self._pairs, found, strict=True):
            (mine, theirs), key = calls[0], _projection_key(pair)
            if key in there and mine.shape != theirs.shape:
                dim = self._dim(pair, mine, theirs)
                if there[key].shape == (theirs.shape[dim], mine.shape[dim]):
                    kept[key] = there[key]
        if kept.keys() != there.keys():
            self._added.load_state_dict(kept, found[0][0][0].device)

    def _dim(self, pair: tuple[str, str], mine: Tensor, theirs: Tensor) -> int:
        """The one dimension in which the features of a pair differ in size."""
        text = (
            f"{self._who}: {pair[0]!r} gives features of shape {tuple(mine.shape)}, {pair[1]!r} of the teacher "
            f"{tuple(theirs.shape)}."
        )
        if not self._modifier.project_features:
            raise StateError(f"{text} Set project_features: true, or pair layers that give the same shape.")
        sizes = zip(mine.shape, theirs.shape, strict=False)
        differing = [dim for dim, (a, b) in enumerate(sizes) if a != b]
        if mine.dim() != theirs.dim() or len(differing) != 1 or differing[0] not in {1, mine.dim() - 1} - {0}:
            raise StateError(f"{text} Only another width can be projected; pair layers that differ in nothing else.")
        return differing[0]

    def _error(self, pair: tuple[str, str], mine: Tensor, theirs: Tensor) -> Tensor:
        with torch.autocast(mine.device.type, enabled=False):
            if mine.shape != theirs.shape:
                dim = self._dim(pair, mine, theirs)
                weight = self._added.parameters[_projection_key(pair)]
                if weight.shape != (theirs.shape[dim], mine.shape[dim]):
                    raise StateError(
                        f"{self._who}: the projection of {pair[0]!r} is {tuple(weight.shape)}, but its features now "
                        f"need {(theirs.shape[dim], mine.shape[dim])}. Features must keep their width in a run."
                    )
                mine = (mine.movedim(dim, -1) @ weight.to(mine.dtype).T).movedim(-1, dim)
            error = (mine - theirs).square().mean()
            return error / (theirs.square().mean() + self._modifier.epsilon) if self._modifier.normalize else error

    def after_step(self) -> None:
        if self._run.counts:
            self.after_forward()
        self._added.forget_gradients(self._run.stepping)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._watches.clear()

    def detach(self) -> None:
        self._unhook()
        self._teacher.release()
        self._added.remove()

    def state_dict(self) -> dict[str, Any]:
        return {**self._teacher.state_dict(), "projections": self._added.state_dict()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        self._teacher.check_state(state)
        pairs = [_projection_key(pair) for pair in self._pairs]
        other = [key for key in state["projections"] if key not in pairs]
        if other:
            raise StateError(
                f"{self._who}: the state holds a projection for {other[0]!r}, which is no pair of layers here "
                f"({', '.join(pairs[:4])}, ...). Load it with the models that it was saved with."
            )

    def take_over(self, state: Mapping[str, Any]) -> str | None:
        pairs = {_projection_key(pair) for pair in self._pairs}
        known = {key: value for key, value in state["projections"].items() if key in pairs}
        left = [repr(key) for key in state["projections"] if key not in known]
        self._partly = True
        reason = super().take_over({**state, "projections": known})
        return reason or (f"projections of other layers, {', '.join(left)}" if left else None)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._teacher.load_state_dict(state)
        device = next((p.device for p in self._run.model.parameters()), torch.device("cpu"))
        self._added.load_state_dict(state["projections"], device)


class _LayerOutputs:
    """The features of one layer since the forward began."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def see(self, module: nn.Module, args: object, output: object) -> None:
        """A forward hook."""
        if _counts():
            # A copy: a layer after this one may work in place.
            self.given += [tensor.clone() for tensor in _feature(output)]


def _counts() -> bool:
    """True in a forward of training: no evaluation, no gradient sampler, no layer called again in backward."""
    # Activation checkpointing calls layers again in backward. torch 2.13.0 has no public way to tell;
    # torch.utils.checkpoint itself asks this, as https://github.com/pytorch/pytorch/pull/143108 explains.
    return torch.is_grad_enabled() and not gradients.sampling() and torch._C._current_graph_task_id() == -1


def _feature(output: object) -> list[Tensor]:
    """The first floating-point tensor in a layer's output, if there is one."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    items = output if isinstance(output, tuple | list) else (named_fields(output) or {}).values()
    return next(([item] for item in items if isinstance(item, Tensor) and item.is_floating_point()), [])


def _comparable(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    # In float32 or better: squares of half precision overflow at 256.
    dtype = torch.promote_types(mine.dtype, torch.float32)
    return mine.to(dtype), theirs.to(device=mine.device, dtype=dtype)


def _projection_key(pair: tuple[str, str]) -> str:
    return f"{pair[0]} -> {pair[1]}"


def _as_names(names: ParamNames | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _resolved(model: nn.Module, names: list[str], where: str) -> dict[str, nn.Module]:
    """The layers that `names` mean in `model`, in their order; of no names, all Linear and convolutions."""
    if not names:
        return {
            name: module
            for name, module in targets.named_modules(model).items()
            if targets.is_prunable_layer(module) and not isinstance(module, nn.Embedding)
        }
    found: dict[str, nn.Module] = {}
    for name in names:
        found |= targets.resolve_layers(model, name, where=where)
    return found
