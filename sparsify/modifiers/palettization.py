"""Training with palettes: from an epoch on each weight is one of a few values, which train along."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sparsify.errors import ArgumentError, DataError, StateError, TargetError
from sparsify.model import gradients, targets
from sparsify.model.made_weights import drop_made_weights, keep_made_weights, make_weight
from sparsify.model.recomputed import recomputed_weights
from sparsify.modifiers.base import Active, Modifier, ModifierKind, ParamNames, Run
from sparsify.modifiers.schedule import Clock
from sparsify.output.field_errors import FieldProblem
from sparsify.palettization.config import PalettizerConfig
from sparsify.palettization.palette import why_not
from sparsify.palettization.weight_palette import WeightPalette, palette_layout
from sparsify.quantization.weight_grid import WEIGHT_STEP, channel_axis
from sparsify.quantization.wiring import Converted, wiring_of

__all__ = ["PaletteScheme", "PalettizationModifier"]

NBits = Literal[1, 2, 3, 4, 6, 8]
Granularity = Literal["per_tensor", "per_grouped_channel"]
AtLeastOne = Annotated[int, Field(ge=1)]


class PaletteScheme(BaseModel):
    """Settings of some weights in `scheme_overrides` of PalettizationModifier; null: as the modifier's own field."""

    model_config = ConfigDict(defer_build=True, frozen=True, extra="forbid", strict=True)

    nbits: NBits | None = Field(default=None, description="Bits of an index.")
    granularity: Granularity | None = Field(default=None, description="What shares a palette.")
    group_size: AtLeastOne | None = Field(default=None, description="Channels that share one.")
    cluster_dim: AtLeastOne | None = Field(default=None, description="Weights that an entry stands for.")
    lut_dtype: Literal["int8", "uint8"] | None = Field(default=None, description="Type of the values.")


class PalettizationModifier(Modifier):
    """Trains weights that are indices into palettes of 2^nbits values: differentiable k-means.

    DKM (Cho et al. 2022, https://arxiv.org/abs/2108.12659); `sparsify.palettization.soft_kmeans` says what differs.
    From `start_epoch` on a layer computes in training with weights that are shared softly among the values, in eval
    mode with the nearest value of each; the parameter stays what the optimizer moves. The values start from k-means,
    with a `grad_sampler` from Fisher-weighted k-means (SqueezeLLM, https://arxiv.org/abs/2306.07629). From `end_epoch`
    on each weight keeps its index and the values go on learning. finalize() leaves weights with at most 2^nbits
    different values a palette, which `pack_onnx` stores as indices of nbits bits.

    Zeros of pruned weights stay exactly 0. With QuantizationModifier a palette of a whole weight is one of integers:
    the weight has one scale then, also where the scheme says one a channel. Memory: the weight twice and about 10 MB
    for the largest one, whatever the bits.
    """

    kind: ClassVar[ModifierKind] = "palettization"
    resizable: ClassVar[bool] = False
    sharded: ClassVar[bool] = False

    params: ParamNames = Field(
        default="__ALL_PRUNABLE__",
        description="What to palettize: names of parameters or layers, re:patterns, layer types, __ALL__, "
        "__ALL_PRUNABLE__.",
    )
    nbits: NBits = Field(default=4, description="Bits of an index: 1, 2, 3, 4, 6 or 8. A palette has 2^nbits values.")
    granularity: Granularity = Field(
        default="per_tensor",
        description="per_tensor: a weight has one palette; per_grouped_channel: one for every group_size channels.",
    )
    group_size: AtLeastOne = Field(
        default=32, description="Output channels that share a palette, with per_grouped_channel."
    )
    cluster_dim: AtLeastOne = Field(
        default=1, description="Weights that an entry stands for: with 2, two neighbors among the output channels."
    )
    lut_dtype: Literal["int8", "uint8"] | None = Field(
        default=None, description="Type of the values: int8 and uint8 with one scale a palette; null: floats."
    )
    tau: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Temperature of the shares, in squared units of weights; lower is nearer to one value a weight. "
        "null: of each palette the mean squared distance of weights to their values at the start.",
    )
    iterations: AtLeastOne = Field(default=1, description="Iterations of soft k-means after every step.")
    scheme_overrides: dict[str, PaletteScheme | None] = Field(
        default_factory=dict,
        description="Name, pattern or type of a layer -> {nbits, granularity, group_size, cluster_dim, lut_dtype}, "
        "what differs. null: it stays as it is.",
    )
    ignore: ParamNames = Field(default_factory=list, description="Names, as in params, that are left out.")
    weight_threshold: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Weights with as many elements or fewer stay as they are."
    )
    num_samples: AtLeastOne = Field(
        default=64,
        description="Losses of the `grad_sampler` given to modify() whose squared gradients weigh the first values.",
    )
    strict: bool = Field(default=True, description="Whether a name that matches nothing is an error.")

    def names(self) -> list[str]:
        return [self.params] if isinstance(self.params, str) else list(self.params)

    def configs(self, model: nn.Module) -> tuple[dict[str, PalettizerConfig], dict[str, str]]:
        """({name of a parameter: its settings}, {name of one that was meant: why it has no palette}).

        Args:
            model: the model whose parameters they are; not touched.

        Raises:
            TargetError: a name matches nothing.
        """
        where = type(self).__name__
        found = targets.resolve_parameters(
            model, self.names(), where=f"{where}.params", strict=self.strict, ignore=self.ignore
        )
        chosen: dict[str, PaletteScheme | None] = {}
        for name, scheme in self.scheme_overrides.items():
            meant = targets.resolve_parameters(model, name, where=f"{where}.scheme_overrides", strict=self.strict)
            chosen |= dict.fromkeys(meant, scheme)
        axes, recomputed = (
            _channel_axes(model),
            {m for made in recomputed_weights(model).values() for m in _parts(made)},
        )
        configs: dict[str, PalettizerConfig] = {}
        left: dict[str, str] = {}
        for name, parameter in found.items():
            if name in chosen and chosen[name] is None:
                continue
            config, shape = self._config(name, chosen.get(name)), tuple(parameter.shape)
            why = None
            if parameter.numel() <= self.weight_threshold:
                why = f"it has {parameter.numel()} elements, and weight_threshold is {self.weight_threshold}"
            elif name in recomputed:
                why = "it is recomputed before every forward (weight_norm and the like): remove that first"
            elif not parameter.numel():
                why = "it has no elements"
            else:
                why = why_not(shape, config, axes.get(name, 0))
            if why is None:
                configs[name] = config
            else:
                left[name] = why
        return configs, left

    def _config(self, name: str, scheme: PaletteScheme | None) -> PalettizerConfig:
        said = {} if scheme is None else scheme.model_dump(exclude_none=True)
        fields = {key: getattr(self, key) for key in ("nbits", "granularity", "group_size", "cluster_dim", "lut_dtype")}
        try:
            return PalettizerConfig(mode="kmeans", **{**fields, **said})
        except ArgumentError as error:
            raise FieldProblem("scheme_overrides", f"{name}: {error}") from None

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The parameters that get palettes.

        Raises:
            TargetError: there is none, or a name matches nothing.
        """
        configs, left = self.configs(model)
        if not configs:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3]) or "all are left out"
            raise TargetError(f"{type(self).__name__}.params: no weight of {type(model).__name__} can have one: {why}.")
        parameters = targets.named_parameters(model)
        return {name: parameters[name] for name in configs}

    def doubts(self, model: nn.Module | None) -> list[str]:
        """A sentence on weights that get no palette, where there are any."""
        left = {} if model is None else self.configs(model)[1]
        if not left:
            return []
        shown = "".join(f"\n  {name}: {why}" for name, why in list(left.items())[:MOST_LEFT])
        more = f"\n  and {len(left) - MOST_LEFT} more" if len(left) > MOST_LEFT else ""
        return [
            f"{type(self).__name__}: these weights get no palette:{shown}{more}\nName them in `ignore` where that is "
            "meant."
        ]

    def foreseen_bits(self, clock: Clock, model: nn.Module) -> dict[str, int]:
        """The bits of an index, from its start on."""
        if not clock.reached(self.window.start):
            return {}
        return {name: config.nbits or 8 for name, config in self.configs(model)[0].items()}

    def activity(self, clock: Clock) -> str:
        """The words "palettes", from its end on "palettes, indices kept"."""
        if not clock.reached(self.window.start):
            return ""
        return "palettes, indices kept" if clock.reached(self.window.end) else "palettes"

    def attach(self, run: Run) -> Active:
        """Checks names, values and the sampler; palettes are made at the start.

        Raises:
            TargetError: a name matches nothing, or a weight cannot have a palette.
            DataError: a weight holds NaN or infinity.
            ArgumentError: a grad_sampler that is none.
        """
        where = f"{type(self).__name__}.params"
        parameters = {name: p for name, p in self.targets(run.model).items() if isinstance(p, nn.Parameter)}
        targets.refuse_unusable(parameters, where=where)
        gradients.check_sampler(run.grad_sampler)
        return Palettization(self, run)


MOST_LEFT = 5
"""Weights that a warning names."""


class Palettization(Active):
    """A PalettizationModifier at work.

    Checkpoint: which weights have palettes, and which keep their indices. Values, temperatures and indices are buffers
    of the model.
    """

    structural = True

    def __init__(self, modifier: PalettizationModifier, run: Run) -> None:
        self._modifier, self._run = modifier, run
        self._configs = modifier.configs(run.model)[0]
        self._axes = _channel_axes(run.model)
        self._palettes: dict[str, WeightPalette] = {}
        self._held = targets.Held(run.model, self._configs)
        self._done = False
        # Whether weights have moved since the values came to rest.
        self._moved = False

    def after_step(self) -> None:
        self._moved = True

    def update(self, clock: Clock) -> None:
        """Makes palettes at the start, brings their values to rest after every step, keeps indices from the end on."""
        window = self._modifier.window
        if self._done or not clock.reached(window.start):
            return
        if not self._palettes:
            self._install(dict.fromkeys(self._configs, False))
            self._start()
            self._moved = False
        moved, self._moved = self._moved, False
        ends = math.isfinite(window.end) and clock.reached(window.end)
        for name, palette, weight in self._weights():
            if moved:
                if name in self._run.masker or bool(palette.frozen):
                    palette.pin(weight)
                palette.advance(weight, self._modifier.iterations)
            if ends:
                palette.freeze(weight)
        self._share_scales()

    def _weights(self) -> Iterator[tuple[str, WeightPalette, Tensor]]:
        now = self._held.now()
        for name, palette in self._palettes.items():
            if name in now:
                yield name, palette, now[name]

    def _install(self, frozen: Mapping[str, bool]) -> None:
        """Puts palettes without values on these weights; where {name: True} with room for indices."""
        parameters = targets.named_parameters(self._run.model)
        for name, keeps in frozen.items():
            config, weight = self._configs[name], parameters[name]
            layout = palette_layout(tuple(weight.shape), self._axes.get(name, 0), config)
            palette = WeightPalette(layout, config.nbits or 8, integers=config.lut_dtype is not None).to(weight.device)
            if keeps:
                palette.make_room()
            make_weight(self._run.model, weight, palette)
            self._palettes[name] = palette
        self._held.refresh()
        self._share_scales()

    def _start(self) -> None:
        """The first values."""
        weights = {name: weight for name, _, weight in self._weights()}
        for name in targets.not_finite(weights):
            self._remove()
            raise DataError(
                f"{type(self._modifier).__name__}: {name!r} holds NaN or infinity, of which no palette can be made. "
                "Load weights that are finite, or find the step at which training diverged."
            )
        importance = self._importance()
        for name, palette, weight in self._weights():
            palette.start(weight, importance=importance.get(name), tau=self._modifier.tau)
        log = self._run.log
        log.text("palettization", f"{type(self._modifier).__name__}: palettes for {len(self._palettes)} weights.")

    def _importance(self) -> dict[str, Tensor]:
        """The mean of the squared gradients of each weight, of the sampler's losses; empty without one."""
        sampler = self._run.grad_sampler
        if sampler is None:
            return {}
        # Of the model as it was: the new palettes hold no values yet.
        self._unhook()
        try:
            return gradients.mean_squares(self._run.model, self._held.now(), sampler, self._modifier.num_samples)
        finally:
            parameters = targets.named_parameters(self._run.model)
            for name, palette in self._palettes.items():
                make_weight(self._run.model, parameters[name], palette)

    def _share_scales(self) -> None:
        """Gives the integers of quantized layers one scale for a weight that has one palette, so that they are few."""
        for module in self._run.model.modules() if self._palettes else ():
            if not isinstance(module, Converted):
                continue
            wiring = wiring_of(module)
            own = module._modules.get("weight_palette")
            one = isinstance(own, WeightPalette) and own.layout.palettes == 1
            if one and wiring.axis is not None and not wiring.block and WEIGHT_STEP not in module._modules:
                wiring.axis = None

    def structure(self, epoch: float, state: Mapping[str, Any] | None) -> None:
        """Palettes as in `state`; without it where they are due at `epoch`. Their values are loaded next."""
        if state is not None:
            self.load_state_dict(state)
        elif epoch >= self._modifier.window.start and not self._palettes:
            self._install(dict.fromkeys(self._configs, epoch >= self._modifier.window.end))

    def state_dict(self) -> dict[str, Any]:
        """{"palettes": {name: whether its indices are kept}}, once there are any."""
        if not self._palettes:
            return {}
        return {"palettes": {name: palette.frozen for name, palette in self._palettes.items()}}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses palettes of weights that this model does not have."""
        for name in state.get("palettes", {}):
            if name not in self._configs:
                raise StateError(
                    f"the state has a palette for {name!r}, which {type(self._modifier).__name__} gives none here. "
                    "Load it into the model and with the recipe that it was saved with."
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts palettes on the weights that had them; their values come with the model's state."""
        wanted = {name: bool(kept) for name, kept in state.get("palettes", {}).items() if name in self._configs}
        if wanted != {name: palette.frozen for name, palette in self._palettes.items()}:
            held = {name: palette.state_dict() for name, palette in self._palettes.items()}
            self._remove()
            self._install(wanted)
            for name, palette in self._palettes.items():
                palette.load_state_dict(held.get(name, {}), strict=False)
        self._moved = False

    def _unhook(self) -> None:
        drop_made_weights(self._run.model, only=self._palettes.values())

    def _remove(self) -> None:
        self._unhook()
        self._palettes = {}

    def detach(self) -> None:
        """Leaves weights that hold the values of their palettes, in layers as they were."""
        keep_made_weights(self._run.model, only=self._palettes.values())
        self._palettes, self._done = {}, True


def _channel_axes(model: nn.Module) -> dict[str, int]:
    """{name of a parameter: the dimension along which its output channels lie}."""
    return {name: channel_axis(module) if key == "weight" else 0 for name, module, key in targets.owners(model)}


def _parts(made: Any) -> tuple[str, ...]:
    return (*(() if made.direction is None else (made.direction,)), *made.others)
