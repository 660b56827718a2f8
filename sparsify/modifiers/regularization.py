"""Regularizers towards zero: powerpropagation of weights, and a penalty on activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import StateError, TargetError
from sparsify.model import gradients, targets
from sparsify.model.batches import named_fields
from sparsify.model.optimizer_hooks import ModelCallback
from sparsify.model.optimizer_state import reset_where
from sparsify.modifiers.base import Active, Modifier, ModifierKind, ParamNames, Run
from sparsify.modifiers.schedule import Clock

__all__ = ["ASRegModifier", "PowerpropagationModifier"]

Penalty = Literal["l1", "l2", "relu", "hs"]


class PowerpropagationModifier(Modifier):
    """Weights are w = v * abs(v)^(alpha - 1), and v is what is trained: small weights learn slowly (Schwarz 2021).

    Paper: https://arxiv.org/abs/2110.00296. What differs: the model holds w all the time but for the moment of the
    optimizer's step, which sees v and its gradient, dL/dv = dL/dw * alpha * abs(v)^(alpha - 1). So names, the graph,
    masks and checkpoints are those of an ordinary layer, nothing has to be undone at the end, and when it starts, v
    is what gives the weights that are there. A zero of w is one of v and stays zero. The optimizer forgets what it
    remembers of the weights at the start and at the end, where the meaning changes. Optimizers that compute the loss
    inside of their step (LBFGS, closures) are refused.
    """

    sharded: ClassVar[bool] = False
    kind: ClassVar[ModifierKind] = "regularization"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    params: ParamNames = Field(description="Names or patterns of the parameters, or of layers or their types.")
    alpha: Annotated[float, Field(ge=1.0)] = Field(
        default=1.0, description="The exponent, 1 or more; 1 changes nothing, 2 and above are usual."
    )
    strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    def names(self) -> list[str]:
        """The names in `params`, as a list."""
        return [self.params] if isinstance(self.params, str) else list(self.params)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The parameters that `params` means in `model`."""
        where = f"{type(self).__name__}.params"
        return targets.resolve_parameters(model, self.names(), where=where, strict=self.strict)

    def attach(self, run: Run) -> Active:
        return _Powerpropagation(self, run)


class ASRegModifier(Modifier):
    """Adds a penalty on activations to the loss, so that more of them are zero (Kurtz 2020).

    The penalty is the sum over layers of alpha times reg_func, which is a mean over all elements of what the layer
    reads or gives; where it does so several times in a forward, the mean of those. The training loop has to call
    `update_loss`. Paper: http://proceedings.mlr.press/v119/kurtz20a.html. What differs: hs is divided by the number
    of elements as the others are, so that it lies between 0 and 1 whatever the size.
    """

    kind: ClassVar[ModifierKind] = "regularization"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "update_frequency"})
    layers: ParamNames = Field(
        description="Names or patterns of the layers whose activations count, or types of layers."
    )
    alpha: float | list[float] = Field(
        description="The weight of the penalty in the loss; a list: one for each layer, in the order of `layers`."
    )
    layer_normalized: bool = Field(
        default=False, description="Whether the penalty is divided by the number of layers, so that it keeps its size."
    )
    reg_func: Penalty = Field(
        default="l1",
        description="l1: mean of absolute values; l2: of squares; relu: of positive parts; hs: Hoyer's square over the "
        "number of elements, which does not depend on scale.",
    )
    reg_tens: Literal["inp", "out"] = Field(default="inp", description="inp: what a layer reads; out: what it gives.")

    def names(self) -> list[str]:
        """The names in `layers`, as a list."""
        return [self.layers] if isinstance(self.layers, str) else list(self.layers)

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The layers that `layers` means in `model`."""
        return targets.resolve_layers(model, self.names(), where=f"{type(self).__name__}.layers")

    def attach(self, run: Run) -> Active:
        return _ActivationPenalty(self, run)


class _Powerpropagation(Active):
    """Powerpropagation at work.

    Its place is innermost around the optimizer's step: what others put into the weights and gradients are w and dL/dw.

    Checkpoint: whether it has started and ended, and v, from which w was rounded. Where a weight is no longer the w
    of its v, because a mask or other code has changed it, v is computed from the weight.
    """

    innermost: ClassVar[bool] = True
    each_optimizer: ClassVar[bool] = True

    def __init__(self, modifier: PowerpropagationModifier, run: Run) -> None:
        self.modifier = modifier
        self.run = run
        who = type(modifier).__name__
        where = f"{who}.params"
        parameters = targets.resolve_parameters(run.model, modifier.names(), where=where, strict=modifier.strict)
        targets.refuse_unusable(parameters, where=where)
        gradients.refuse_closures(run.optimizers, who)
        self.held = targets.Held(run.model, parameters)
        self.gradients = gradients.StepGradients(run.optimizers)
        self.started = self.ended = False
        self.roots: dict[str, Tensor] = {}
        # By name, while the optimizer has v: the gradient of w, and that of v.
        self.within: dict[str, tuple[Tensor, Tensor]] = {}
        self.watch: RemovableHandle | None = None

    def update(self, clock: Clock) -> None:
        window = self.modifier.window
        if not self.started and clock.reached(window.start):
            self.started = True
            self._forget()
        if self.started and not self.ended and math.isfinite(window.end) and clock.reached(window.end):
            self.ended = True
            self.detach()
            self._forget()
        if self.at_work and self.watch is None:
            # After a step that raised, the next forward must not see v; innermost here as well.
            hook = ModelCallback(self._forward)
            self.watch = self.run.model.register_forward_pre_hook(hook, prepend=True)

    @property
    def at_work(self) -> bool:
        """True while the optimizer steps v in place of w."""
        return self.started and not self.ended and self.modifier.alpha != 1.0

    def _forget(self) -> None:
        self.held.refresh()
        if self.modifier.alpha != 1.0:
            for parameter in self.held.now().values():
                reset_where(self.run.masker.optimizer, parameter)

    def before_step(self) -> None:
        if not self.at_work or self.within:
            return
        parameters = self.run.stepped(self.held.now())
        # None at all: a closure is about to compute them, and it must see w.
        if not self.gradients.before(parameters, optimizer=self.run.stepping):
            return
        alpha = self.modifier.alpha
        with torch.no_grad():
            for name, parameter in parameters.items():
                gradient = parameter.grad
                if gradient is None:
                    continue
                root = self._root(name, parameter)
                slope = root.abs().pow_(alpha - 1.0).mul_(alpha)
                own = (gradient.to_dense() if gradient.layout != torch.strided else gradient) * slope
                # From here on it can be undone.
                self.within[name] = (gradient, own)
                parameter.copy_(root)
                parameter.grad = own

    def _root(self, name: str, weight: Tensor) -> Tensor:
        """The v of these weights."""
        computed = weight.sign() * weight.abs().pow(1.0 / self.modifier.alpha)
        known = self.roots.get(name)
        if known is None or known.shape != weight.shape or known.dtype != weight.dtype:
            return computed
        known = known.to(weight.device)
        return torch.where(_powered(known, self.modifier.alpha) == weight, known, computed)

    def after_step(self) -> None:
        if not self.at_work:
            return
        if self.within:
            self._leave()
        elif self.gradients.after(self.run.stepped(self.held.now())) is not None:
            raise gradients.closures(type(self.modifier).__name__, "step(closure)")

    def _leave(self) -> None:
        """The model holds w again, and the gradients are those of w."""
        parameters = self.held.now()
        with torch.no_grad():
            for name in list(self.within):
                parameter = parameters[name]
                self.roots[name] = parameter.detach().clone()
                parameter.copy_(_powered(self.roots[name], self.modifier.alpha))
                gradient, own = self.within.pop(name)
                if parameter.grad is own:
                    parameter.grad = gradient

    def _forward(self, *_: object) -> None:
        self._leave()

    def detach(self) -> None:
        self._leave()
        self.roots.clear()
        if self.watch is not None:
            self.watch.remove()
            self.watch = None

    def state_dict(self) -> dict[str, Any]:
        return {"started": self.started, "ended": self.ended, "roots": dict(self.roots)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.started, self.ended = bool(state["started"]), bool(state["ended"])
        known = self.held.now()
        self.roots = {n: v.to(known[n].device, copy=True) for n, v in state["roots"].items() if n in known}


def _powered(root: Tensor, alpha: float) -> Tensor:
    """v * abs(v)^(alpha - 1)."""
    return root * root.abs().pow_(alpha - 1.0)


class _ActivationPenalty(Active):
    """A penalty on activations at work.

    Checkpoint: nothing is saved; the window says when it is on.
    """

    def __init__(self, modifier: ASRegModifier, run: Run) -> None:
        self.modifier = modifier
        self.run = run
        self.layers = self._in_order()
        alphas = modifier.alpha if isinstance(modifier.alpha, list) else [modifier.alpha] * len(self.layers)
        if len(alphas) != len(self.layers):
            raise TargetError(
                f"ASRegModifier.alpha: {len(alphas)} values for {len(self.layers)} layers: {', '.join(self.layers)}. "
                "Give one for each, in this order, or one number for all."
            )
        self.alphas = dict(zip(self.layers, alphas, strict=True))
        self.handles: list[RemovableHandle] = []
        self.watches: dict[str, _ActivationWatch] = {}

    def _in_order(self) -> list[str]:
        """The names of the layers in the order in which the recipe names them."""
        modifier, model = self.modifier, self.run.model
        where = f"{type(modifier).__name__}.layers"
        every = [name for own in modifier.names() for name in targets.resolve_layers(model, own, where=where)]
        return list(dict.fromkeys(every))

    def update(self, clock: Clock) -> None:
        window = self.modifier.window
        due = clock.reached(window.start) and not (math.isfinite(window.end) and clock.reached(window.end))
        if due and not self.handles:
            modules = targets.named_modules(self.run.model)
            for name, alpha in self.alphas.items():
                if alpha:
                    watch = self.watches[name] = _ActivationWatch(self.modifier.reg_func, self.modifier.reg_tens)
                    self.handles.append(modules[name].register_forward_hook(ModelCallback(watch.see), with_kwargs=True))
        elif not due:
            self.detach()

    def loss(self, loss: Tensor, *, outputs: Any, inputs: Any, labels: Any) -> Tensor:
        if not self.watches:
            return loss
        share = len(self.layers) if self.modifier.layer_normalized else 1
        seen = {name: watch.take() for name, watch in self.watches.items()}
        if not any(seen.values()):
            raise StateError(
                "ASRegModifier: no activation of its layers was seen since the last loss. They were not called in a "
                "forward with gradients, read no floating-point tensor, or the model is compiled and calls no hooks. "
                "Train the model that modify() was given, uncompiled, and call update_loss() once after each forward."
            )
        for name, values in seen.items():
            if values:
                penalty = torch.stack(values).mean() * (self.alphas[name] / share)
                loss = loss + penalty.to(loss.device)
        return loss

    def after_step(self) -> None:
        # Of a forward whose loss was not updated: it belongs to no later one.
        for watch in self.watches.values():
            watch.take()

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.watches.clear()


class _ActivationWatch:
    """The penalties of what one layer read or gave since they were last taken."""

    def __init__(self, function: Penalty, side: Literal["inp", "out"]) -> None:
        self.function = function
        self.side = side
        self.seen: list[Tensor] = []

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        """A forward hook."""
        if not torch.is_grad_enabled() or gradients.sampling():
            return
        found = _float_tensors((args, kwargs) if self.side == "inp" else output)
        if not found:
            return
        value = torch.stack([penalty(tensor, self.function) for tensor in found]).mean()
        # Activation checkpointing calls the layer again in backward. It is computed there too, since checkpointing
        # compares the saved tensors of both calls, but it belongs to the forward that was seen. torch 2.13.0 has no
        # public way to tell; torch.utils.checkpoint itself asks this:
        # https://github.com/pytorch/pytorch/pull/143108
        if torch._C._current_graph_task_id() == -1:
            self.seen.append(value)

    def take(self) -> list[Tensor]:
        """Those that were seen, which are forgotten."""
        seen, self.seen = self.seen, []
        return seen


def penalty(values: Tensor, function: Penalty) -> Tensor:
    """A mean over all elements, in float32 or better: of abs(x), x^2, max(x, 0), or Hoyer's square over their number.

    Hoyer's square is (sum of abs(x))^2 / sum of x^2, the number of elements that are not zero if those are of equal
    size.

    >>> x = torch.tensor([2.0, 0.0, -2.0, 0.0])
    >>> [penalty(x, name).item() for name in ("l1", "l2", "relu", "hs")]
    [1.0, 2.0, 0.5, 0.5]
    >>> penalty(torch.zeros(3), "hs").item()
    0.0
    """
    # A copy: a layer after this one may work in place, and autograd would refuse or the penalty be of other values.
    x = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
    if function == "l1":
        return x.abs().mean()
    if function == "l2":
        return x.square().mean()
    if function == "relu":
        return x.relu().mean()
    largest = x.detach().abs().amax().clamp_min(torch.finfo(x.dtype).tiny)
    x = x / largest  # squares of small activations would underflow
    return x.abs().sum().square() / x.square().sum().clamp_min(torch.finfo(x.dtype).tiny) / x.numel()


def _float_tensors(value: object) -> list[Tensor]:
    """The floating-point tensors in tuples, lists and dicts that hold anything."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    items = value if isinstance(value, tuple | list) else (named_fields(value) or {}).values()
    return [tensor for item in items for tensor in _float_tensors(item)]
