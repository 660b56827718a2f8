"""The fields and the work that gradual pruners share: a ramp of sparsity on a grid of updates."""

from __future__ import annotations

import logging
import math
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from sparsify.errors import SparsifyWarning, TargetError
from sparsify.model import distributed, sharding, targets
from sparsify.model.layouts import input_dims
from sparsify.model.recomputed import recomputed_weights
from sparsify.modifiers.base import Active, Epoch, Modifier, ModifierKind, ParamNames, Run, check_frequency
from sparsify.modifiers.doubts import first_of, only_zeros, rounding_doubts
from sparsify.modifiers.schedule import Clock, Curve, OnceAfterLoading, UpdateGrid, between
from sparsify.output.field_errors import FieldProblem
from sparsify.pruning.masks import MaskType, compute_masks, sparing_one

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["GradualPruning"]

log = logging.getLogger("sparsify")

FROM_PARAM = "__FROM_PARAM__"
ScoreType = Literal["magnitude", "movement", "obs", "mfac"]

_WHOSE = {"movement": "MovementPruningModifier", "obs": "OBSPruningModifier", "mfac": "MFACPruningModifier"}
_MASK_NAME = re.compile(r"unstructured|block\d*|tensorrt|filter|channel|[1-9]\d*:[1-9]\d*")


def _in_unit_interval(name: str, value: float) -> float:
    if 0.0 <= value <= 1.0:
        return value
    hint = f"; did you mean {value / 100:g}?" if 1.0 < value <= 100.0 else "; 0.8 means that 80 % are zero"
    raise FieldProblem(name, f"{value} is not a fraction in [0, 1]{hint}")


class GradualPruning(Modifier, ABC):
    """The fields of every modifier that prunes on a ramp from one sparsity to another, and their checks.

    A subclass changes defaults, adds its own fields, or sets `runs` to False while it cannot run yet.
    """

    kind: ClassVar[ModifierKind] = "pruning"
    without_effect: ClassVar[frozenset[str]] = frozenset({"log_types", "phased"})

    start_epoch: Epoch = Field(description="The epoch at which it starts, with `init_sparsity`; -1: epoch 0.")
    end_epoch: Epoch = Field(description="The epoch at which `final_sparsity` is reached, whatever the frequency.")
    update_frequency: Annotated[float, Field(allow_inf_nan=False)] = Field(
        description="Epochs between two updates of the masks; -1: every optimizer step."
    )
    init_sparsity: float | Literal["__FROM_PARAM__"] = Field(
        description="The fraction of zeros, 0 to 1, at start_epoch; __FROM_PARAM__: what is there when it starts. "
        "Above final_sparsity: the sparsity falls along the curve, and weights that are released train on from zero."
    )
    final_sparsity: float | dict[float, ParamNames] = Field(
        description="The fraction of zeros, 0 to 1, at end_epoch; or {fraction: [names]} with `params: []`."
    )
    params: ParamNames = Field(
        default=[],
        description="What to prune: names of parameters or layers, re:patterns, types, __ALL__, __ALL_PRUNABLE__.",
    )
    leave_enabled: bool = Field(
        default=True,
        description="Whether the masks stay after end_epoch; False: the weights may grow back from zero then.",
    )
    inter_func: Curve = Field(default="cubic", description="The curve from init_sparsity to final_sparsity.")
    mask_type: str | list[int] = Field(
        default="unstructured",
        description="What becomes zero together: unstructured; block4 (1x4 along the input channels); [a, b] blocks of "
        "a output by b input channels, -1 for all of them; N:M, of every M along the input channels N stay; tensorrt, "
        "which is 2:4; filter, whole output channels of each weight by itself, and channel, whole input channels "
        "(StructuredPruningModifier masks what hangs together with them too, so that they can be removed).",
    )
    input_dims: dict[str, int] = Field(
        default={},
        description="Dimension of the input channels, by name or pattern, of parameters whose module does not say it: "
        "{'re:.*experts.*': 2} for stacks (experts, outputs, inputs), 1 for (experts, inputs, outputs). Needed for "
        "blocks, N:M and channels of raw parameters alone.",
    )
    global_sparsity: bool = Field(
        default=False, description="Whether all parameters are ranked together, or each by itself."
    )
    score_type: ScoreType = Field(
        default="magnitude", description="The importance score of a weight; the lowest go first."
    )
    strict: bool = Field(
        default=True,
        description="Whether a name that matches nothing, or a layer that the mask type does not fit, is an error; "
        "otherwise it is left out and reported.",
    )

    @field_validator("update_frequency")
    @classmethod
    def _frequency(cls, value: float) -> float:
        check_frequency(value)
        return value

    @field_validator("init_sparsity", mode="before")
    @classmethod
    def _init(cls, value: object) -> object:
        if isinstance(value, bool) or not (isinstance(value, int | float) or value == FROM_PARAM):
            raise FieldProblem("init_sparsity", f"{value!r} is neither a fraction in [0, 1] nor {FROM_PARAM}")
        return value if isinstance(value, str) else _in_unit_interval("init_sparsity", value)

    @field_validator("final_sparsity", mode="before")
    @classmethod
    def _final_type(cls, value: object) -> object:
        for sparsity in value if isinstance(value, dict) else (value,):
            if isinstance(sparsity, bool) or not isinstance(sparsity, int | float):
                raise FieldProblem(
                    "final_sparsity", f"{value!r} is neither a fraction in [0, 1] nor {{fraction: [names]}}"
                )
        return value

    @field_validator("final_sparsity")
    @classmethod
    def _final(cls, value: float | dict[float, ParamNames]) -> float | dict[float, ParamNames]:
        for sparsity in value if isinstance(value, dict) else (value,):
            _in_unit_interval("final_sparsity", sparsity)
        if isinstance(value, dict) and not value:
            raise FieldProblem("final_sparsity", "{} names nothing to prune; give {0.8: [names of parameters]}")
        return value

    @field_validator("mask_type", mode="before")
    @classmethod
    def _mask_kind(cls, value: object) -> object:
        if not isinstance(value, str | list):
            raise FieldProblem("mask_type", f"{value!r} is no mask type; quote N:M, like '2:4'")
        return value

    @field_validator("mask_type")
    @classmethod
    def _mask(cls, value: str | list[int]) -> str | list[int]:
        if isinstance(value, list):
            if len(value) != 2 or any(size < 1 and size != -1 for size in value):
                raise FieldProblem(
                    "mask_type", f"{value} is no block; give [output channels, input channels], like [1, 4]"
                )
            return value
        if not _MASK_NAME.fullmatch(value) or value == "block0":
            raise FieldProblem(
                "mask_type",
                f"{value!r} is no mask type; give unstructured, block4, [1, 4], 2:4 (any N:M), tensorrt, filter or "
                "channel",
            )
        if ":" in value:
            keep, of = map(int, value.split(":"))
            if keep > of:
                raise FieldProblem("mask_type", f"{value!r} keeps more than there is; did you mean '{of}:{keep}'?")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> GradualPruning:
        if self.end_epoch == -1:
            raise FieldProblem("end_epoch", "-1 (never) cannot end a ramp; give the epoch that reaches final_sparsity")
        if isinstance(self.final_sparsity, dict):
            if self.params:
                raise FieldProblem("params", "final_sparsity names the parameters already; give params: [] with it")
            if self.global_sparsity and len(self.final_sparsity) > 1:
                raise FieldProblem(
                    "final_sparsity", "one ranking over all parameters has one sparsity; give a single number"
                )
        elif not self.params:
            raise FieldProblem("params", "names nothing to prune; give names, patterns or __ALL_PRUNABLE__")
        if self.score_type not in ("magnitude", type(self).model_fields["score_type"].default):
            raise FieldProblem("score_type", f"{self.score_type!r} is {_WHOSE[self.score_type]}'s; use that one")
        if self.falling() and MaskType.parse(self.mask_type).kind == "n_of_m":
            raise FieldProblem(
                "init_sparsity",
                f"{self.init_sparsity} lies above final_sparsity {min(self.falling())}, and a mask of "
                f"{MaskType.parse(self.mask_type).text} never has more zeros than at its end",
            )
        return self

    def falling(self) -> list[float]:
        """The final sparsities below `init_sparsity`: zeros are given back on the way there."""
        if isinstance(self.init_sparsity, str):
            return []
        return [final for final in self.final_by_names() if self.init_sparsity > final]

    def final_by_names(self) -> dict[float, list[str]]:
        """The names to prune, by the sparsity that they end with."""
        if isinstance(self.final_sparsity, dict):
            return {s: [n] if isinstance(n, str) else list(n) for s, n in self.final_sparsity.items()}
        return {self.final_sparsity: [self.params] if isinstance(self.params, str) else list(self.params)}

    def names(self) -> list[str]:
        return [name for names in self.final_by_names().values() for name in names]

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        field = "final_sparsity" if isinstance(self.final_sparsity, dict) else "params"
        return targets.resolve_parameters(
            model, self.names(), where=f"{type(self).__name__}.{field}", strict=self.strict, to_mask=True
        )

    def foreseen_zeros(self, clock: Clock, model: nn.Module) -> dict[str, float | None]:
        """The ramp, at the last point of the grid; with `global_sparsity` the share of all parameters together."""
        point = UpdateGrid(self.window, self.update_frequency).latest(clock)
        if point is None:
            return {}
        parameters = {name: p for name, p in self.targets(model).items() if isinstance(p, nn.Parameter)}
        if point >= self.window.end and not self.leave_enabled:
            return dict.fromkeys(parameters)
        zeros = {name: count / max(parameters[name].numel(), 1) for name, count in sharding.zeros(parameters).items()}
        weights = sum(p.numel() for p in parameters.values())
        overall = sum(zeros[name] * p.numel() for name, p in parameters.items()) / max(weights, 1)
        found: dict[str, float | None] = {}
        for name, module, final, units in self._units(model):
            last = self.last(name, module, units, final)
            there = min(overall if self.global_sparsity else zeros[name], last)
            initial = there if isinstance(self.init_sparsity, str) else self.init_sparsity
            share = between(self.inter_func, initial, last, self.window.progress(point))
            count = round(units * share)
            # Of single weights the share is exact enough, but where it comes to none or all of them.
            rounded = not self.global_sparsity and (self.mask_type != "unstructured" or count in (0, units))
            found[name] = count / units if rounded else share
        return found

    def _units(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, float, int]]:
        """The parameters that are pruned, each with its layer, its final sparsity and its number of units."""
        where = f"{type(self).__name__}.params"
        finals = {
            name: final
            for final, names in self.final_by_names().items()
            for name in targets.resolve_parameters(model, names, where=where, strict=self.strict, to_mask=True)
        }
        mask_type, dims = MaskType.parse(self.mask_type), input_dims(model, self.input_dims, where=type(self).__name__)
        for name, module, attribute in targets.owners(model):
            parameter = module._parameters[attribute]
            if name not in finals or parameter is None or not parameter.numel():
                continue
            dim = dims[name]
            if mask_type.why_unfit(parameter.shape, dim) is None:
                yield name, module, finals[name], mask_type.units(parameter.shape, 1 if dim is None else dim)

    def last(self, name: str, module: nn.Module, units: int, final: float) -> float:
        """The fraction of zeros at end_epoch, before it is rounded to whole units, of a parameter whose
        `final_sparsity` is `final`.

        Args:
            name: of the parameter.
            module: the layer that holds it.
            units: the number of its units.
            final: the fraction that is asked for.
        """
        shape = MaskType.parse(self.mask_type)
        return 1.0 - shape.keep / shape.of if shape.kind == "n_of_m" else final

    def doubts(self, model: nn.Module | None) -> list[str]:
        """That the sparsity falls; and shares that rounding makes nothing or all."""
        who, said = type(self).__name__, []
        if self.falling():
            said.append(
                f"{who}: init_sparsity {self.init_sparsity} lies above final_sparsity {min(self.falling())}: from "
                f"epoch {self.window.start:g} to {self.window.end:g} the sparsity falls, and weights that are released "
                "train on from zero. Were the two meant the other way round?"
            )
        if model is None or self.global_sparsity:
            return said
        kind = MaskType.parse(self.mask_type).kind
        what = {"block": "blocks", "filter": "filters", "channel": "channels"}.get(kind, "weights")
        shares = [
            (
                f"{name!r} ({final:g} of {units} {what})",
                final,
                round(units * self.last(name, module, units, final)),
                units,
            )
            for name, module, final, units in self._units(model)
        ]
        return [*said, *rounding_doubts(who, shares)]

    def activity(self, clock: Clock) -> str:
        """The words "pruning", and "holding zeros" from its end on."""
        point = UpdateGrid(self.window, self.update_frequency).latest(clock)
        if point is None:
            return ""
        if point < self.window.end:
            return "pruning"
        return "holding zeros" if self.leave_enabled else ""

    @abstractmethod
    def attach(self, run: Run) -> Active: ...


class Gradual(Active):
    """A gradual pruning at work: by magnitude, or by the `scores` of a subclass.

    Checkpoint: the point of the grid that is in force, whether the masks were released, the sparsity that was found at
    the start, and which parameters are left out: frozen ones, and those that held only zeros so far. The masks are the
    Masker's.
    """

    def __init__(self, modifier: GradualPruning, run: Run) -> None:
        self.modifier = modifier
        self.run = run
        self.grid = UpdateGrid(modifier.window, modifier.update_frequency)
        self.mask_type = MaskType.parse(modifier.mask_type)
        self.finals, self.input_dims = self._targets()
        self.point: float | None = None
        self.released = False
        self.initials: dict[str, float] = {}
        self.frozen: list[str] = []
        self.postponed: list[str] = []
        self.after_loading = OnceAfterLoading()
        self.come_late = False

    def _targets(self) -> tuple[dict[str, float], dict[str, int]]:
        """The final sparsity and the dimension of the input channels by parameter, in the model's order; all is
        checked here."""
        modifier, model = self.modifier, self.run.model
        where = f"{type(modifier).__name__}.{'params' if modifier.params else 'final_sparsity'}"
        finals: dict[str, float] = {}
        for final, names in modifier.final_by_names().items():
            parameters = targets.resolve_parameters(model, names, where=where, strict=modifier.strict, to_mask=True)
            for name in parameters:
                if name in finals:
                    raise TargetError(
                        f"{where}: {name!r} has two sparsities, {finals[name]} and {final}. Name it once."
                    )
                finals[name] = final
            targets.refuse_unusable(parameters, where=where)
        self.divided = divided_by_norms(model, finals, self.mask_type, where=where)
        return fitting(
            model, finals, self.mask_type, where=where, strict=modifier.strict, said_input_dims=modifier.input_dims
        )

    def update(self, clock: Clock) -> None:
        point = self.grid.latest(clock)
        if point is None or self.released:
            return
        late = self._late(clock)
        self.come_late = bool(late)
        if point == self.point and not late:
            return
        self.run.masker.refresh()
        parameters = targets.named_parameters(self.run.model)
        if self.point is None or late or self.postponed:
            names = self.finals if self.point is None else [*late, *self.postponed]
            self._start(targets.still_there(parameters, names, where=type(self.modifier).__name__))
        progress = self.modifier.window.progress(point)
        self._prune({name: parameters[name] for name in self.initials}, progress, clock)
        self.point = point
        if point >= self.modifier.window.end and not self.modifier.leave_enabled:
            for name in self.initials:
                self.run.masker.remove(name)
            self.released = True

    def _late(self, clock: Clock) -> list[str]:
        """Parameters without a mask though pruning has started: the saved recipe did not name them, or their masks did
        not fit. Asked once, a step after loading: the weights of the checkpoint are loaded after this state."""
        if self.point is None or not self.after_loading.due(clock):
            return []
        left_out = {*self.frozen, *self.postponed}
        return [name for name in self.finals if name not in left_out and name not in self.run.masker]

    def _start(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Fixes what is pruned and from which sparsity on: read when the modifier starts, not when it is attached."""
        # Asked again: channels may have been removed since.
        who, strict = type(self.modifier).__name__, self.modifier.strict
        said = self.modifier.input_dims
        self.finals, self.input_dims = fitting(
            self.run.model, self.finals, self.mask_type, where=who, strict=strict, said_input_dims=said
        )
        given = {name: parameter for name, parameter in parameters.items() if name in self.finals}
        parameters = trainable(given, who)
        self.frozen += [name for name in given if name not in parameters]
        empty = [name for name in only_zeros(parameters) if name not in self.run.masker]
        new = [name for name in empty if name not in self.postponed]
        if new and isinstance(self.modifier.init_sparsity, str):
            # Asked for: zeros that are there are those to begin with.
            log.warning("%s: %s: all zeros are held, as __FROM_PARAM__ says.", who, first_of(list(map(repr, new))))
            empty = []
        elif new:
            warnings.warn(
                f"{who}: {first_of(list(map(repr, new)))} hold{'s' * (len(new) == 1)} nothing but zeros, which are "
                "initial values and no pruned weights: no score tells them apart. Left out until training has moved "
                "them; from the next update of the masks on they are pruned as the others.",
                SparsifyWarning,
                stacklevel=2,
            )
        self.postponed = empty
        parameters = {name: parameter for name, parameter in parameters.items() if name not in empty}
        zeros = sharding.zeros(parameters)
        overall = sum(zeros.values()) / max(sum(p.numel() for p in parameters.values()), 1)
        for name, parameter in parameters.items():
            initial = self.modifier.init_sparsity
            if isinstance(initial, str):
                initial = overall if self.modifier.global_sparsity else zeros[name] / parameter.numel()
                if initial > self.finals[name]:
                    warnings.warn(
                        f"{type(self.modifier).__name__}: {name!r} starts with {initial:.4f} zeros, above its "
                        f"final_sparsity {self.finals[name]}. It is held at that; give a higher final_sparsity to hold "
                        "all of its zeros.",
                        SparsifyWarning,
                        stacklevel=2,
                    )
                    initial = self.finals[name]
            self.initials[name] = initial
        self.initials = {name: self.initials[name] for name in self.finals if name in self.initials}

    def falls(self, names: Sequence[str]) -> bool:
        """True if the sparsity of these parameters, which have one ramp, falls: zeros are given back."""
        return self.initials[names[0]] > self.finals[names[0]]

    def scores(self, parameters: Mapping[str, nn.Parameter]) -> tuple[Mapping[str, Tensor], bool]:
        """Importance scores of the weights by parameter, and True if their absolute values count."""
        return parameters, True

    def sparing_norms(
        self, scores: Mapping[str, Tensor], before: Mapping[str, Tensor], absolute: bool
    ) -> Mapping[str, Tensor]:
        """`scores` in which a weight of each slice that is divided by its norm (weight_norm) is masked last."""
        if not self.divided:
            return scores
        spared = {
            name: sparing_one(scores[name], dims, before.get(name), absolute)
            for name, dims in self.divided.items()
            if name in scores
        }
        return {**scores, **spared}

    def _prune(self, parameters: Mapping[str, nn.Parameter], progress: float, clock: Clock) -> None:
        masker = self.run.masker
        together = self.modifier.global_sparsity
        before = masker.masks
        scores, absolute = self.scores(parameters)
        scores = self.sparing_norms(scores, before, absolute)
        curve = self.modifier.inter_func
        masks = compute_masks(
            {name: scores[name] for name in parameters},
            {name: between(curve, self.initials[name], self.finals[name], progress) for name in parameters},
            self.mask_type,
            previous={name: before[name] for name in parameters if name in before},
            input_dims=self.input_dims,
            together=together,
            absolute=absolute,
            releases=[name for name in parameters if self.falls([name])],
        )
        distributed.check_same(masks)
        for name, mask in masks.items():
            masker.set(name, mask, fresh=self.falls([name]))
        done = masker.sparsity()
        for name in masks:
            self.run.log.scalar(f"sparsity/{name}", done[name], clock.step)

    def state_dict(self) -> dict[str, Any]:
        return {
            "point": -1.0 if self.point is None else self.point,
            "released": self.released,
            "initials": dict(self.initials),
            "frozen": list(self.frozen),
            "postponed": list(self.postponed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.point = None if state["point"] < 0 else float(state["point"])
        self.released = bool(state["released"])
        self.initials = {name: float(value) for name, value in state["initials"].items() if name in self.finals}
        self.frozen = [name for name in state["frozen"] if name in self.finals]
        self.postponed = [name for name in state.get("postponed", ()) if name in self.finals]
        self.after_loading.loaded()


def fitting(
    model: nn.Module,
    finals: Mapping[str, float],
    mask_type: MaskType,
    *,
    where: str,
    strict: bool,
    said_input_dims: Mapping[str, int] | None = None,
) -> tuple[dict[str, float], dict[str, int]]:
    """The final sparsity and the dimension of the input channels of what the mask type fits, in the model's order.

    Raises:
        TargetError: one that it does not fit, unless `strict` is off: then that is a warning, and it is left out.
    """
    found: dict[str, float] = {}
    dims: dict[str, int] = {}
    known = input_dims(model, said_input_dims, where=where.partition(".")[0])
    for name, module, attribute in targets.owners(model):
        parameter = module._parameters[attribute]
        if name not in finals or parameter is None or not parameter.numel():
            continue
        dim = known[name]
        problem = mask_type.why_unfit(parameter.shape, dim)
        if problem is None:
            exact = 1.0 - mask_type.keep / mask_type.of
            if mask_type.kind == "n_of_m" and abs(finals[name] - exact) > 0.005:
                raise TargetError(
                    f"{where}: {name!r}: mask_type {mask_type.text} ends at sparsity {exact:g}, but final_sparsity is "
                    f"{finals[name]}. Give final_sparsity: {exact:g}."
                )
            # A final 2/3 may be written .667: the ramp ends at the exact share.
            found[name] = exact if mask_type.kind == "n_of_m" else finals[name]
            dims[name] = 1 if dim is None else dim
            continue
        message = f"{where}: mask_type {mask_type.text} does not fit: {name!r} {problem}."
        if strict:
            raise TargetError(f"{message} Leave it out of params, or give strict: False to have it left out.")
        warnings.warn(f"{message} Left out.", SparsifyWarning, stacklevel=2)
    return found, dims


def divided_by_norms(
    model: nn.Module, finals: Mapping[str, float], mask_type: MaskType, *, where: str
) -> dict[str, tuple[int, ...]]:
    """The dimensions over which weights in `finals` are divided by their norm before every forward, by name.

    Raises:
        TargetError: the mask type or the sparsity would leave a norm of zero, and NaN behind it.
    """
    found: dict[str, tuple[int, ...]] = {}
    parameters = targets.named_parameters(model)
    for made in recomputed_weights(model).values():
        name = made.direction
        if name is None or name not in finals or not made.divided_over:
            continue
        shape = parameters[name].shape
        # At least one unit of every slice stays.
        slices = math.prod(size for dim, size in enumerate(shape) if dim not in made.divided_over)
        size = math.prod(shape[i] if b == -1 else b for i, b in enumerate(mask_type.block[: len(shape)]))
        units = shape.numel() // size if mask_type.kind == "block" else shape.numel()
        if mask_type.kind in ("filter", "channel") or (
            mask_type.kind != "n_of_m" and round(units * finals[name]) > units - slices
        ):
            raise TargetError(
                f"{where}: {name!r} is divided by the norm of each of its {slices} slices before every forward, by "
                f"{made.kind}; mask_type {mask_type.text} at sparsity {finals[name]:g} leaves slices of zeros alone, "
                "and 0 / 0 is NaN. Give a lower final_sparsity, scattered or N:M masks, or remove the norm first."
            )
        found[name] = made.divided_over
    return found


def trainable(parameters: Mapping[str, nn.Parameter], who: str) -> dict[str, nn.Parameter]:
    """The parameters that are trained; warns of frozen ones, which stay as they are."""
    frozen = [name for name, parameter in parameters.items() if not parameter.requires_grad]
    if frozen:
        warnings.warn(
            f"{who}: {len(frozen)} frozen parameter{'s are' if len(frozen) > 1 else ' is'} left alone: "
            f"{', '.join(frozen[:5])}{', ...' if len(frozen) > 5 else ''}. Set requires_grad to prune them.",
            SparsifyWarning,
            stacklevel=2,
        )
    return {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
