"""Top-KAST: a forward pass with few weights, a backward pass with more, so that others may come in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsify.model import gradients
from sparsify.model.optimizer_hooks import ModelCallback
from sparsify.model.optimizer_state import reset_where
from sparsify.modifiers.base import Active, Run
from sparsify.modifiers.moving_masks import Fraction, MaskName, Moving, SparseTraining, taken_over
from sparsify.modifiers.schedule import Clock
from sparsify.output.field_errors import FieldProblem

__all__ = ["TopKASTPruningModifier"]


class TopKASTPruningModifier(SparseTraining):
    """Forward with few weights, backward with more, so that others may come in (Jayakumar 2020).

    The forward set are the largest weights, the backward set is larger and trained too; both are chosen anew every
    `update_frequency`, from all weights: those in neither set keep the values they had (paper:
    https://arxiv.org/abs/2106.03517). Between steps, and so in every checkpoint and at the end, the model holds the
    weights of the forward set alone; the others live in the manager's state, and are given up at end_epoch.
    What differs from the paper: the penalty is added to the gradients, as weight decay; the last choice stays.
    Optimizers that compute the loss inside of their step (LBFGS, closures) are refused.

    Cost: the backward set is put in and taken out at every step until the end, 1.9 ns a weight on one CPU core with the
    masks, where those of GMPruningModifier take 0.3; an update takes 14 ns a weight.
    """

    resizable: ClassVar[bool] = False
    sharded: ClassVar[bool] = False
    forward_sparsity: Fraction = Field(description="The fraction of zeros, 0 to 1, in the forward pass.")
    backward_sparsity: Fraction = Field(
        description="The fraction of weights, 0 to 1, that get no gradient; at most forward_sparsity."
    )
    global_sparsity: bool = Field(
        default=True, description="Whether all parameters are ranked together, or each by itself."
    )
    mask_type: MaskName = Field(
        default="unstructured", description="What becomes zero together, as in GMPruningModifier."
    )
    input_dims: dict[str, int] = Field(
        default={}, description="Dimension of the input channels of raw parameters, as in GMPruningModifier."
    )
    active_weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        default=1e-4,
        description="Weight decay of the forward set; that of the rest of the backward set is divided by the forward "
        "density.",
    )

    @model_validator(mode="after")
    def _backward_is_larger(self) -> TopKASTPruningModifier:
        if self.backward_sparsity > self.forward_sparsity:
            raise FieldProblem(
                "backward_sparsity",
                f"{self.backward_sparsity} lies above forward_sparsity {self.forward_sparsity}: "
                "the backward pass sees the weights of the forward pass and more",
            )
        return self

    def sparsities(self, point: float, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
        """That of the forward pass."""
        return dict.fromkeys(shapes, self.forward_sparsity)

    def attach(self, run: Run) -> Active:
        return _TopKAST(self, run)


class _TopKAST(Moving):
    """Top-KAST at work.

    Checkpoint: that of Moving, the values outside of the forward set, and which of them belong to the backward
    set. The masks of the forward set are the Masker's.
    """

    each_optimizer: ClassVar[bool] = True
    modifier: TopKASTPruningModifier

    def __init__(self, modifier: TopKASTPruningModifier, run: Run) -> None:
        super().__init__(modifier, run, modifier.forward_sparsity, modifier.mask_type)
        gradients.refuse_closures(run.optimizers, type(modifier).__name__)
        self.gradients = gradients.StepGradients(run.optimizers)
        self.rest: dict[str, Tensor] = {}
        self.extra: dict[str, Tensor] = {}
        # The rest of the backward set and zeros, where it is, and where the backward set is: floats, because products
        # of floats are several times faster than torch.where.
        self.places: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        # The parameters that hold the backward set, while an optimizer steps.
        self.within: list[str] = []
        self.watch: RemovableHandle | None = None

    def move(self, parameters: Mapping[str, nn.Parameter], point: float, clock: Clock) -> bool:
        modifier, masker = self.modifier, self.run.masker
        with torch.no_grad():
            whole = {name: p.detach().clone() for name, p in parameters.items()}
            for name in whole.keys() & self.rest.keys():
                whole[name] = torch.where(masker.masks[name], whole[name], self._rest(name, whole[name]))
            forward_sparsity = next(iter(self.finals.values()), modifier.forward_sparsity)
            forward = self.largest(whole, forward_sparsity, modifier.global_sparsity)
            backward = self.largest(whole, modifier.backward_sparsity, modifier.global_sparsity)
            optimizer = masker.optimizer
            for name, parameter in parameters.items():
                parameter.copy_(whole[name])
                # What the optimizer remembers of the backward set lives on; the Masker knows the forward set alone.
                masker.bind(None)
                try:
                    masker.set(name, forward[name])
                finally:
                    masker.bind(optimizer)
                last = point >= modifier.window.end
                reset_where(optimizer, parameter, forward[name] if last else backward[name])
        if point >= modifier.window.end:
            self.detach()
            return True
        if self.watch is None:
            # After a step that raised, the next forward must not see the backward set.
            self.watch = self.run.model.register_forward_pre_hook(ModelCallback(self._forward))
        self.rest = {name: torch.where(forward[name], 0.0, value) for name, value in whole.items()}
        self.extra = {name: backward[name] & ~forward[name] for name in whole}
        self.places = {}
        # The backward set is trained, and it is larger than what the masks keep.
        masker.keep_gradients(self.rest)
        return True

    def begin(self, parameters: Mapping[str, nn.Parameter], point: float, clock: Clock) -> None:
        self.move(self._parameters(), point, clock)

    def _rest(self, name: str, like: Tensor) -> Tensor:
        """The values outside of the forward set, where the parameter is now."""
        if name in self.places:
            self.rest[name] = torch.where(self.extra[name], self.places[name][0], self.rest[name])
        self.extra[name] = self.extra[name].to(like.device)
        self.rest[name] = self.rest[name].to(like.device, like.dtype)
        return self.rest[name]

    def _place(self, name: str, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        place = self.places.get(name)
        if place is None or place[0].device != like.device or place[0].dtype != like.dtype:
            rest, extra = self._rest(name, like), self.extra[name]
            backward = extra | self.run.masker.masks[name].to(like.device)  # masks are loaded after this
            place = (torch.where(extra, rest, 0.0), extra.to(like.dtype), backward.to(like.dtype))
            self.places[name] = place
        return place

    def before_step(self) -> None:
        """Puts the rest of the backward set back, and the penalty into the gradients."""
        # Called twice in a step of some optimizers: the penalty is added once.
        if not self.rest or self.within:
            return
        # All of them, but where the state of another model was loaded.
        held_apart = {name: parameter for name, parameter in self._parameters().items() if name in self.rest}
        parameters = self.run.stepped(held_apart)
        # None at all: a closure is about to compute them, and it must see the forward set.
        if not self.gradients.before(parameters, optimizer=self.run.stepping):
            return
        # Weights that were loaded since the last step may be anything.
        self.run.masker.apply()
        self.within = list(parameters)
        scale = gradients.grad_scale(self.run.stepping)
        with torch.no_grad():
            for name, parameter in parameters.items():
                held, _, backward = self._place(name, parameter)
                parameter.add_(held)  # zero there between steps
                gradient = parameter.grad
                if gradient is not None and gradient.layout == torch.strided:
                    self._penalize(gradient, parameter, held, scale)
                    gradient.mul_(backward)

    def _penalize(self, gradient: Tensor, weight: Tensor, held: Tensor, scale: Tensor | None) -> None:
        decay, density = self.modifier.active_weight_decay, 1.0 - self.modifier.forward_sparsity
        if not decay:
            return
        more = decay / density - decay if density > 0.0 else 0.0
        if scale is not None:
            gradient.add_(weight * (decay * scale).to(weight)).add_(held * (more * scale).to(weight))
        else:
            gradient.add_(weight, alpha=decay).add_(held, alpha=more)

    def after_step(self) -> None:
        """Takes the rest of the backward set out again."""
        if not self.rest:
            return
        if self.within:
            self._take_out()
        elif self.gradients.after(self.run.stepped(self._parameters())) is not None:
            raise gradients.closures(type(self.modifier).__name__, "step(closure)")

    def _take_out(self) -> None:
        parameters = {name: parameter for name, parameter in self._parameters().items() if name in self.within}
        self.within = []
        with torch.no_grad():
            for name, parameter in parameters.items():
                held, extra, _ = self._place(name, parameter)
                torch.mul(parameter, extra, out=held)

    def _forward(self, *_: object) -> None:
        if self.within:
            self._take_out()
            self.run.masker.apply()

    def detach(self) -> None:
        self.run.masker.keep_gradients(self.rest, False)
        self.rest, self.extra, self.places = {}, {}, {}
        self.within = []
        if self.watch is not None:
            self.watch.remove()
            self.watch = None

    def state_dict(self) -> dict[str, Any]:
        rest = {name: self._rest(name, value) for name, value in self.rest.items()}
        return {**super().state_dict(), "rest": rest, "extra": dict(self.extra)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        parameters = self.held.now()
        self.run.masker.keep_gradients(self.rest, False)
        self.rest = taken_over(state["rest"], parameters)
        self.extra = taken_over(state["extra"], parameters)
        self.rest = {name: rest for name, rest in self.rest.items() if name in self.extra}
        self.places = {}
        self.run.masker.keep_gradients(self.rest)
