"""Quantization-aware training: when it starts, when ranges and batch statistics are frozen, and what is quantized."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, model_validator
from torch import nn

from sparsify.errors import DataError, SparsifyWarning, StateError, TargetError
from sparsify.model import distributed
from sparsify.model.param_groups import AddedParameters
from sparsify.model.targets import named_modules, named_parameters, not_finite
from sparsify.modifiers.base import Active, Epoch, Modifier, ModifierKind, ParamNames, Run
from sparsify.modifiers.schedule import Clock
from sparsify.output.field_errors import FieldProblem
from sparsify.quantization.calibration import SAMPLES, calibrate, materialized
from sparsify.quantization.conversion import freeze_norms, is_weighted, quantizers
from sparsify.quantization.forward_ops import asleep, operation_places, put_to_sleep, switch_off_all, switched_off
from sparsify.quantization.layers import WEIGHTED
from sparsify.quantization.learned_step import freeze_steps, learned_parameters
from sparsify.quantization.placement import make_plan
from sparsify.quantization.plan import (
    QuantizationPlan,
    apply_plan,
    check_plan,
    check_traced_ops,
    is_quantized,
    undo_plan,
)
from sparsify.quantization.recurrent import RECURRENT_FORMS, is_recurrent, weight_names
from sparsify.quantization.scheme import Bits, Named, QuantizationSettings, Scheme

if TYPE_CHECKING:
    from sparsify.pruning.removal import Removal

__all__ = ["QuantizationModifier"]

LAYER_KINDS = (*(cls.__name__ for cls in (*WEIGHTED, *RECURRENT_FORMS)), "MultiheadAttention")
"""What can be quantized, by type."""
SHOWN = 10
"""Layers in float that a warning names."""


class QuantizationModifier(Modifier):
    """Trains the model as it will run in integers: from `start_epoch` on layers are quantized, ranges observed.

    Quantized are Linear, convolutions and transposed convolutions of one to three dimensions, and transformers'
    Conv1D (weights and what they read), subclasses of them that compute the same, Embedding (weights), and in
    convolutional blocks what activations, residual adds, products, concatenations and average pools give. BatchNorm
    behind a convolution is folded in eval mode and at export. Of MultiheadAttention the projections are quantized,
    of self-attention and of cross-attention. Of LSTM and GRU the weights are, by the largest weight of each
    row of a gate, whatever observer and block size say; they compute their steps in float. What stays in float is
    logged by name, with the reason; what has weights and is not in `ignore` is warned about.
    `floating_layers(model)` gives the list. At its end quantized layers stay, ready for export.
    """

    kind: ClassVar[ModifierKind] = "quantization"
    traces: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "phased", "available_devices", "available_gpus"})

    scheme: Scheme | Named | None = Field(
        default=None,
        description="default, onnxruntime, deepsparse, tensorrt, weight_only, or {input_activations, weights, "
        "output_activations}, each of {num_bits, symmetric, strategy, observer, kwargs} or null for float. "
        "null: default.",
    )
    scheme_overrides: dict[str, Scheme | Named | None] = Field(
        default_factory=dict,
        description="Name or type of a layer -> its scheme; what it does not say is as in `scheme`. null: the layer "
        "stays in float.",
    )
    ignore: ParamNames = Field(
        default_factory=list, description="Names or types of layers that stay in float, with all that is below them."
    )
    disable_quantization_observer_epoch: Epoch | None = Field(
        default=None, description="The epoch from which ranges of activations no longer move; null: they always do."
    )
    freeze_bn_stats_epoch: Epoch | None = Field(
        default=None,
        description="The epoch from which BatchNorm uses its running statistics in training and no longer updates "
        "them; null: never. Safe only where the learning rate is already small.",
    )
    model_fuse_fn_name: str | None = Field(
        default=None, description="Without effect: what is folded is found in the traced model."
    )
    model_fuse_fn_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Without effect, as model_fuse_fn_name."
    )
    num_calibration_steps: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="How many batches of the run's calibration data set the ranges at the start; null: all of them, "
        "where calibration data is given.",
    )
    strict: bool = Field(
        default=True,
        description="Whether a name in ignore, scheme_overrides or submodules that matches nothing is an error.",
    )
    submodules: list[str] | None = Field(
        default=None, description="Legacy: only layers at or below these are quantized; null: everywhere."
    )
    quantize_embeddings: bool = Field(
        default=True, description="Legacy: false leaves the weights of Embedding in float."
    )
    reduce_range: bool = Field(
        default=False, description="Weights of one bit less, for CPUs without VNNI, where int8 sums saturate."
    )
    quantize_linear_activations: bool = Field(
        default=True, description="Legacy: false leaves what Linear reads in float; its weights are quantized."
    )
    quantize_conv_activations: bool = Field(
        default=True, description="Legacy: false leaves what convolutions read in float; their weights are quantized."
    )
    quantize_embedding_activations: bool = Field(
        default=True,
        description="Legacy, without effect: what an Embedding gives is quantized where a quantized layer reads it.",
    )
    activation_bits: Bits = Field(default=8, description="Legacy: num_bits of activations.")
    weight_bits: Bits = Field(default=8, description="Legacy: num_bits of weights.")
    exclude_batchnorm: bool = Field(
        default=True,
        description="Legacy, without effect: BatchNorm is folded where it can be, else it stays in float.",
    )
    exclude_module_types: list[str] | None = Field(
        default=None, description="Legacy: types of layers added to `ignore`."
    )
    custom_quantizable_module_types: list[str] | None = Field(
        default=None, description="Legacy, without effect: the types that can be quantized are fixed."
    )
    tensorrt: bool = Field(default=False, description="Legacy: true is scheme: tensorrt.")
    activation_qconfig_kwargs: dict[str, Any] | None = Field(
        default=None,
        description="Legacy: averaging_constant is used for activations; other keys are without effect.",
    )
    weight_qconfig_kwargs: dict[str, Any] | None = Field(
        default=None, description="Legacy: reduce_range is used for weights; other keys are without effect."
    )

    @model_validator(mode="after")
    def _usable(self) -> QuantizationModifier:
        for name in ("disable_quantization_observer_epoch", "freeze_bn_stats_epoch"):
            value = getattr(self, name)
            if value is not None and value < 0 and value != -1:
                raise FieldProblem(name, f"{value} is not an epoch; give 0 or more, or null for never.")
        if self.tensorrt and self.scheme not in (None, "tensorrt"):
            raise FieldProblem("tensorrt", "true contradicts the scheme that is given; leave one of the two out.")
        return self

    def settings(self) -> QuantizationSettings:
        """The fields, legacy ones included, in the terms of the planner."""
        where = type(self).__name__
        scheme = "tensorrt" if self.tensorrt else self.scheme
        written = QuantizationSettings.of(scheme, self.scheme_overrides, self.ignore, where=where)
        base = written.scheme.model_copy(update=self._legacy(written.scheme))
        overrides: dict[str, Scheme | None] = {}
        for wanted, types in (
            (self.quantize_linear_activations, ("Linear",)),
            (self.quantize_conv_activations, tuple(f"Conv{kind}{n}d" for kind in ("", "Transpose") for n in (1, 2, 3))),
        ):
            if not wanted:
                overrides.update(dict.fromkeys(types, Scheme(input_activations=None, weights=base.weights)))
        return dataclasses.replace(
            written,
            scheme=base,
            overrides={**overrides, **written.overrides},
            ignore_types=(
                *(() if self.quantize_embeddings else ("Embedding",)),
                *(self.exclude_module_types or ()),
            ),
            within=None if self.submodules is None else tuple(self.submodules),
            reduce_range=self.reduce_range,
            strict=self.strict,
        )

    def _legacy(self, scheme: Scheme) -> dict[str, Any]:
        """{field of `scheme`: its value} where the legacy fields change it."""
        changed: dict[str, Any] = {}
        activations, weights = scheme.input_activations, scheme.weights
        if activations is not None:
            update: dict[str, Any] = {} if self.activation_bits == 8 else {"num_bits": self.activation_bits}
            constant = (self.activation_qconfig_kwargs or {}).get("averaging_constant")
            if constant is not None:
                update["kwargs"] = {**activations.kwargs, "averaging_constant": constant}
            changed["input_activations"] = activations.model_copy(update=update)
        if weights is not None:
            update = {} if self.weight_bits == 8 else {"num_bits": self.weight_bits}
            if (self.weight_qconfig_kwargs or {}).get("reduce_range"):
                update["kwargs"] = {**weights.kwargs, "reduce_range": True}
            changed["weights"] = weights.model_copy(update=update)
        return changed

    def notes(self) -> list[str]:
        """Sentences that name the given fields without effect."""
        said = self.model_fields_set
        notes = []
        if self.model_fuse_fn_name is not None:
            notes.append("model_fuse_fn_name has no effect: what can be folded is found in the traced model.")
        if "exclude_batchnorm" in said:
            notes.append(
                "exclude_batchnorm has no effect: BatchNorm is folded where it can be, else it stays in float."
            )
        if self.custom_quantizable_module_types:
            notes.append("custom_quantizable_module_types has no effect: the types that can be quantized are fixed.")
        for name in ("activation_qconfig_kwargs", "weight_qconfig_kwargs"):
            known = {"averaging_constant"} if name.startswith("activation") else {"reduce_range"}
            others = sorted(set(getattr(self, name) or ()) - known)
            if others:
                notes.append(f"{name}: {', '.join(others)} have no effect.")
        return notes

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The layers that could be quantized; which of them can be is known once the model is traced.

        Raises:
            TargetError: there is none, or a name matches nothing.
        """
        settings = self.settings()
        modules = named_modules(model)
        layers = {
            name: module
            for name, module in modules.items()
            if is_weighted(module) or isinstance(module, nn.MultiheadAttention) or is_recurrent(module)
        }
        found = {}
        for name, scheme in settings.per_layer(model, layers).items():
            if scheme is not None and (scheme.weights is not None or scheme.input_activations is not None):
                found[name] = layers[name]
        if not found and not is_quantized(model):
            why = "all its layers are left out by the recipe" if layers else f"it has none of {', '.join(LAYER_KINDS)}"
            raise TargetError(f"{type(self).__name__}: nothing in {type(model).__name__} can be quantized: {why}.")
        return {name: module for name, module in found.items() if is_weighted(module) or is_recurrent(module)}

    def foreseen_bits(self, clock: Clock, model: nn.Module) -> dict[str, int]:
        """Those of the scheme, for every layer that could be quantized; which can be is known from the traced model."""
        if not clock.reached(self.window.start):
            return {}
        modules = named_modules(model)
        layers = {name: module for name, module in modules.items() if is_weighted(module) or is_recurrent(module)}
        found = {}
        for name, scheme in self.settings().per_layer(model, layers).items():
            if scheme is not None and scheme.weights is not None:
                for weight in weight_names(modules[name]) if is_recurrent(modules[name]) else ["weight"]:
                    found[f"{name}.{weight}"] = scheme.weights.num_bits
        return found

    def activity(self, clock: Clock) -> str:
        """Names of the phases that are in force: quantized, ranges frozen, BatchNorm frozen."""
        if not clock.reached(self.window.start):
            return ""
        said = ["quantized"]
        for epoch, what in (
            (self.disable_quantization_observer_epoch, "ranges frozen"),
            (self.freeze_bn_stats_epoch, "BatchNorm frozen"),
        ):
            if epoch is not None and epoch >= 0 and clock.reached(epoch):
                said.append(what)
        return ", ".join(said)

    def attach(self, run: Run) -> Active:
        """Checks names; the model is traced and quantized at the start.

        Raises:
            TargetError: a name matches nothing.
            StateError: the model is quantized already.
            ArgumentError, DataError: calibration data that cannot be used.
        """
        self.targets(run.model)
        if not run.goes_on:
            _refuse_quantized(run.model)
        _refuse_sample_gradients(run.model)
        for note in self.notes():
            run.log.text("quantization", f"{type(self).__name__}: {note}")
        if run.inputs.calibration_data is not None:
            # Here, and not epochs later, when it is needed.
            run.inputs.calibration_data = materialized(run.inputs.calibration_data, self.num_calibration_steps)
        return Quantization(self, run)


class Quantization(Active):
    """A QuantizationModifier at work.

    Checkpoint: the plan, from which a fresh model gets its quantized layers, and the modules whose own operations
    turned out to stay in float. Ranges are buffers of the model, learned steps parameters of it, which have a group of
    the optimizer; what is frozen follows from the epoch.
    """

    structural = True

    def __init__(self, modifier: QuantizationModifier, run: Run) -> None:
        self._modifier = modifier
        self._run = run
        self._plan: QuantizationPlan | None = None
        self._written: tuple[QuantizationPlan, dict[str, Any]] | None = None
        self._asked = False
        self._clock: Clock | None = None
        self._in_force: tuple[bool, bool] | None = None
        self._added = AddedParameters(
            run.optimizers,
            type(modifier).__name__,
            why="observer: lsq trains scales",
            way_out="choose another observer",
        )

    def update(self, clock: Clock) -> None:
        """Quantizes the model at the start; freezes ranges and statistics of batches at their epochs."""
        self._clock = clock
        if self._plan is None and not self._asked and clock.reached(self._modifier.window.start):
            self._asked = True
            self._run.inputs.when_known(self._begin)
        self._freeze()

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """On the inputs of one call of the model: decides what is quantized, and does it."""
        if self._plan is not None:
            return
        model, log = self._run.model, self._run.log
        _refuse_quantized(model)
        plan = make_plan(model, self._run.inputs.trace(args, kwargs), self._modifier.settings())
        if not plan.layers and not plan.sites:
            raise TargetError(
                f"{type(self._modifier).__name__}: nothing in {type(model).__name__} can be quantized. {plan}"
            )
        _refuse_infinite(model, plan)
        try:
            apply_plan(model, plan)
            # Here, not in training: scripted functions are seen by the trace and not when the model runs.
            check_traced_ops(model, args, kwargs)
            self._calibrate()
            self._added.adopt(learned_parameters(model), weight_decay=0.0)
        except BaseException:
            self._restore()
            raise
        self._plan = dataclasses.replace(plan, places=operation_places(model))
        log.text("quantization", str(plan))
        self._freeze()
        self._warn_of(plan)

    def _warn_of(self, plan: QuantizationPlan) -> None:
        found = [f"\n  {left.what}: {left.why}" for left in plan.left if left.unasked]
        if not found:
            return
        more = f"\n  and {len(found) - SHOWN} more: see sparsify.floating_layers(model)." if len(found) > SHOWN else ""
        warnings.warn(
            f"{type(self._modifier).__name__}: layers with weights stay in float:{''.join(found[:SHOWN])}{more}\n"
            "Name them in `ignore` where that is meant.",
            SparsifyWarning,
            stacklevel=2,
        )

    def _calibrate(self) -> None:
        data, most = self._run.inputs.calibration_data, self._modifier.num_calibration_steps
        if data is None:
            if most is not None:
                self._run.log.text(
                    "quantization",
                    f"num_calibration_steps is {most}, but no calibration_data was given: ranges come from training.",
                )
            return
        batches, samples = calibrate(self._run.model, data, most)
        few = []
        if samples * distributed.world_size() < SAMPLES:
            few.append(f"{samples} samples, and ranges from fewer than {SAMPLES} are chance: give more")
        if most is not None and batches < most:
            few.append(f"{batches} batches, of the {most} that num_calibration_steps asks for")
        if few:
            warnings.warn(
                f"{type(self._modifier).__name__}: calibration_data held {'; and '.join(few)}.",
                SparsifyWarning,
                stacklevel=2,
            )

    def _freeze(self) -> None:
        if self._plan is None or self._clock is None:
            return
        wanted = (
            self._reached(self._modifier.disable_quantization_observer_epoch),
            self._reached(self._modifier.freeze_bn_stats_epoch),
        )
        # Called after every step: modules are gone through only where something changes.
        if wanted == self._in_force:
            return
        stop, frozen = wanted
        freeze_norms(self._run.model, frozen)
        freeze_steps(self._run.model, stop)
        waiting = False
        for quantizer in quantizers(self._run.model):
            # A range that was never seen cannot be frozen: the next step sees it.
            unseen = stop and not quantizer.batches
            waiting |= bool(unseen)
            quantizer.observing = not stop or bool(unseen)
            quantizer.check()
        self._in_force = None if waiting else wanted

    def _reached(self, epoch: float | None) -> bool:
        return epoch is not None and epoch >= 0 and self._clock is not None and self._clock.reached(epoch)

    def structure(self, epoch: float, state: Mapping[str, Any] | None) -> None:
        """Quantized layers as the plan in `state` says; without it, by tracing, where they are due at `epoch`."""
        if state is not None:
            if "plan" in state:
                self._rebuild(state)
        elif epoch >= self._modifier.window.start and self._plan is None:
            self._run.inputs.when_known(self._begin)

    def state_dict(self) -> dict[str, Any]:
        """The plan, once the model is quantized."""
        if self._plan is None:
            return {}
        places = operation_places(self._run.model)
        if places != self._plan.places:
            self._plan = dataclasses.replace(self._plan, places=places)
        if self._written is None or self._written[0] is not self._plan:
            # Kept: the model's state_dict tells it too, and some loops ask for that at every step.
            self._written = (self._plan, self._plan.to_state())
        model = self._run.model
        return {"plan": self._written[1], "off": switched_off(model), "asleep": asleep(model)}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses the plan of another model."""
        if "plan" in state:
            check_plan(
                self._run.model,
                QuantizationPlan.from_state(state["plan"]),
                again=self._plan is not None or self._run.goes_on,
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the model into the structure that it had: quantized by the saved plan, or not yet."""
        if "plan" in state:
            self._rebuild(state)
        elif self._plan is not None:
            self._restore()
            self._plan, self._asked, self._in_force = None, False, None

    def resized(self, removal: Removal) -> None:
        """Takes quantized layers off again: a plan is about the model as it was traced."""
        if self._plan is not None:
            self._restore()
            self._plan, self._asked, self._in_force = None, False, None

    def _rebuild(self, state: Mapping[str, Any]) -> None:
        plan = QuantizationPlan.from_state(state["plan"])
        if plan != self._plan:
            if self._plan is not None:
                self._restore()
                self._plan = None
            if not (self._run.goes_on and is_quantized(self._run.model)):
                apply_plan(self._run.model, plan)
            self._added.adopt(learned_parameters(self._run.model), weight_decay=0.0)
            self._plan, self._in_force = plan, None
        switch_off_all(self._run.model, state.get("off", ()))
        put_to_sleep(self._run.model, state.get("asleep", ()))
        self._freeze()

    def _restore(self) -> None:
        self._added.remove()
        undo_plan(self._run.model)

    def detach(self) -> None:
        """Leaves quantized layers in place, ready for export; the optimizer has its own groups again."""
        self._added.remove()


def _refuse_infinite(model: nn.Module, plan: QuantizationPlan) -> None:
    modules: dict[str, Any] = named_modules(model)
    held = {
        f"{layer.name}.{key}": value
        for layer in plan.layers
        if layer.name in modules
        for key, value in modules[layer.name]._parameters.items()
        if value is not None
    }
    for name in not_finite(held):
        raise DataError(
            f"QuantizationModifier: {name} holds NaN or infinity, of which no integers can be made. Load weights that "
            "are finite, or find the step at which training diverged."
        )


def _refuse_sample_gradients(model: nn.Module) -> None:
    # opacus counts calls on each parameter, and knows layers by their type (grad_sample_module.py, opacus 1.6).
    sampled = next((name for name, p in named_parameters(model).items() if hasattr(p, "_forward_counter")), None)
    if sampled is not None:
        raise StateError(
            f"{sampled!r} has gradients of each sample (opacus), which knows no quantized layers. Train privately "
            "without quantization, prune there, and quantize what comes out with quantize_model(), or in a second run "
            "without opacus."
        )


def _refuse_quantized(model: nn.Module) -> None:
    if is_quantized(model):
        raise StateError(
            f"{type(model).__name__} holds quantized layers already, and one model is quantized once. Load the weights "
            "into a fresh model, or leave the second QuantizationModifier out."
        )
