"""The interface of modifiers: what a recipe says (`Modifier`, data), its work (`Active`), the objects it uses (`Run`).

To add a modifier, write one file with a `Modifier` subclass and an `Active` subclass. The class registers itself under
its name, which is its tag in a recipe; each field's `description` is its reference documentation and its JSON schema.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparsify.errors import StateError
from sparsify.modifiers.schedule import Clock, Window
from sparsify.output.booleans import read_booleans
from sparsify.output.field_errors import FieldProblem, recipe_error

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from sparsify.model.gradients import GradSampler
    from sparsify.model.signature import CallArguments
    from sparsify.model.trace import Trace
    from sparsify.modifiers.learning_rate_ledger import Entry, LearningRateLedger
    from sparsify.modifiers.run_log import RunLog
    from sparsify.pruning.groups import ChannelGroups
    from sparsify.pruning.masker import Masker
    from sparsify.pruning.removal import Removal

__all__ = ["Active", "Modifier"]

ModifierKind = Literal[
    "range",
    "learning_rate",
    "pruning",
    "quantization",
    "palettization",
    "distillation",
    "parameters",
    "structure",
    "regularization",
    "logging",
]

Epoch = Annotated[float, Field(allow_inf_nan=False)]
ParamNames = str | list[str]


class Modifier(BaseModel, ABC):
    """One `- !Name {fields}` of a recipe: what it says and nothing else. Frozen, comparable, free of run state.

    A subclass declares its fields and `kind`, and implements `attach`. Nothing here knows the manager, the recipe or
    another modifier.

    Raises:
        RecipeError: on construction, for an unknown field, a wrong type or a value out of range; `field` names it.
    """

    model_config = ConfigDict(
        defer_build=True, frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=False
    )

    registry: ClassVar[dict[str, type[Modifier]]] = {}
    """Every concrete modifier by its name in recipes."""
    kind: ClassVar[ModifierKind]
    holds: ClassVar[bool] = False
    """True for one that changes nothing between its start and its end, but keeps what is there."""
    traces: ClassVar[bool] = False
    """True for one that looks at the traced model when it starts, and so needs inputs of it."""
    whole_channels: ClassVar[bool] = False
    """True for one that masks channels in all weights that share them, also in weights that it does not name."""
    reroutes: ClassVar[bool] = False
    """True for one that changes which layers the model runs through."""
    resizable: ClassVar[bool] = True
    """False for one that keeps something for each weight, and cannot go on where channels are removed."""
    sharded: ClassVar[bool] = True
    """False for one that cannot work on parameters that are sharded over ranks (fully_shard)."""
    without_effect: ClassVar[frozenset[str]] = frozenset()
    """Fields of older recipe files that are read, said once to be without effect, and dropped."""

    start_epoch: Epoch = Field(default=-1.0, description="The epoch at which it starts; -1: at once.")
    end_epoch: Epoch = Field(default=-1.0, description="The epoch at which it ends; -1: never.")

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if not getattr(cls, "__abstractmethods__", None):
            Modifier.registry[cls.__name__] = cls

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise recipe_error(type(self), error, fields) from None

    @model_validator(mode="before")
    @classmethod
    def _booleans(cls, fields: object) -> object:
        return read_booleans(cls, fields)

    @model_validator(mode="before")
    @classmethod
    def _drop_without_effect(cls, fields: object) -> object:
        if not isinstance(fields, Mapping):
            return fields
        dropped = [name for name in fields if name in cls.without_effect and name not in cls.model_fields]
        for name in dropped:
            # The one legacy switch that would change what is trained, were it on.
            if name == "phased" and fields[name] not in (False, None):
                raise FieldProblem("phased", "phases that are switched on and off are ACDCPruningModifier's; remove it")
            _say_without_effect(cls.__name__, name)
        return {name: value for name, value in fields.items() if name not in dropped}

    @model_validator(mode="after")
    def _epochs_in_order(self) -> Modifier:
        for name in ("start_epoch", "end_epoch"):
            value = getattr(self, name)
            if value < 0 and value != -1:
                raise FieldProblem(name, f"{value} is not an epoch; give 0 or more, or -1 for {_OPEN[name]}")
        if self.end_epoch != -1 and self.start_epoch > self.end_epoch:
            raise FieldProblem("start_epoch", f"{self.start_epoch} lies after end_epoch {self.end_epoch}")
        return self

    @property
    def window(self) -> Window:
        """When it is at work."""
        return Window.of(self.start_epoch, self.end_epoch)

    def cuts(self) -> tuple[float, ...]:
        """The epochs at which it removes channels for good."""
        return ()

    def names(self) -> list[str]:
        """The names and patterns of parameters or layers that it says, before a model is known."""
        return []

    def targets(self, model: nn.Module) -> Mapping[str, nn.Parameter | nn.Module]:
        """The parameters or layers of `model` that those names mean; touches nothing.

        Raises:
            TargetError: a name that matches nothing or cannot be used.
        """
        return {}

    def rate(self) -> Entry | None:
        """The learning rate that it sets, if it sets one, as it enters the ledger."""
        return None

    def foreseen_zeros(self, clock: Clock, model: nn.Module) -> dict[str, float | None]:
        """The fraction of zeros, 0 to 1, that its fields say each parameter of `model` will have at `clock`, by name.

        Of channels, where it masks `whole_channels`. None: what is there by then. Absent: not its business. Changes
        nothing, and needs no data.
        """
        return {}

    def foreseen_bits(self, clock: Clock, model: nn.Module) -> dict[str, int]:
        """The bits that weights of `model` will have in the exported file from `clock` on, by the parameter's name."""
        return {}

    def doubts(self, model: nn.Module | None) -> list[str]:
        """Sentences on what its fields will not do as their writer may expect, to `model` where there is one.

        For `check`, `plan` and `modify`, which say them; they are no errors. Changes nothing, and needs no data.
        """
        return []

    def activity(self, clock: Clock) -> str:
        """Its work at `clock` in a word or two, "pruning"; empty before its start and after its end."""
        return "active" if clock.reached(self.window.start) and not clock.reached(self.window.end) else ""

    @abstractmethod
    def attach(self, run: Run) -> Active:
        """Its work on the model of `run`. Checks everything that can be wrong, and changes nothing yet: `Active.update`
        does.

        Raises:
            TargetError, DataError, ArgumentError, StateError: what it needs is missing or does not fit.
        """


class Active:
    """One modifier at work on one model; all run state lives here. Overrides only what it needs.

    Order in a step: every `before_step`; the optimizer steps; every `after_step`; masks are applied; the clock ticks;
    every `update`. So `update` prepares what the *next* forward and step see.

    Checkpoint: nothing, unless a subclass overrides `state_dict`; then its docstring says what is saved and what is
    recomputed.
    """

    innermost: ClassVar[bool] = False
    """True where `before_step` changes the variables in which the optimizer steps: it is the last one before the
    step, and its `after_step` the first one after."""
    each_optimizer: ClassVar[bool] = False
    """True where `before_step` and `after_step` are called around the steps of every optimizer, where there are
    several; otherwise around those of the counting one alone. `Run.stepped` tells whose parameters they are."""
    needs_outputs: ClassVar[bool] = False
    """True where `loss` reads the model's inputs or outputs, which are then captured."""
    structural: ClassVar[bool] = False
    """True where its state is the structure of the model, and nothing of what training has made of it."""

    def update(self, clock: Clock) -> None:
        """Puts in force what is due at `clock`. Called on attach, after every tick and after loading; idempotent."""

    def before_step(self) -> None:
        """Just before the optimizer steps, also twice. Gradients are those of this step, unless `Run.closure`; after
        this those of masked weights are set to zero."""

    def after_closure(self) -> None:
        """Just after a closure has computed gradients inside of the optimizer's step, before those of masked weights
        are set to zero; several times a step under LBFGS."""

    def after_step(self) -> None:
        """Just after a real optimizer step, before masks are applied. Called once a step."""

    def loss(self, loss: Tensor, *, outputs: Any, inputs: Any, labels: Any) -> Tensor:
        """`loss` with what this modifier adds to it.

        Args:
            loss: the loss so far, a scalar.
            outputs: what the model returned; None: it was not seen.
            inputs: (args, kwargs) of that call; None: it was not seen.
            labels: the targets of the batch, where the training loop gave them.
        """
        return loss

    def structure(self, epoch: float, state: Mapping[str, Any] | None) -> None:
        """Gives the model its structure (quantized layers) at `epoch`, or the one in `state`. Channels were removed
        before."""

    def resized(self, removal: Removal) -> None:
        """Called after `removal` was done on the model, the optimizer's state and the masks."""

    def detach(self) -> None:
        """Ends the work and leaves a usable model; may be called at any moment, and twice."""

    def state_dict(self) -> dict[str, Any]:
        """Plain ints, floats, strings, lists, dicts and tensors; empty where the clock says it all."""
        return {}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuses a state that does not fit this model, with a StateError; changes nothing."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, first putting the model into the structure that it had."""

    def take_over(self, state: Mapping[str, Any]) -> str | None:
        """Continues from what fits of the state of another recipe or model; gives the reason why something was left
        out, None where nothing was known not to fit.

        Tensors and names that do not fit are left out by `load_state_dict` already, where that is overridden so.
        """
        try:
            self.check_state(state)
        except StateError as error:
            return str(error)
        self.load_state_dict(state)
        return None


class RunInputs(Protocol):
    """The inputs of the model, for a modifier that traces it."""

    given: CallArguments | None
    """(args, kwargs) of the user's `sample_inputs`: known before the first forward."""
    calibration_data: Iterable[Any] | None
    """Batches of inputs; a modifier that reads an iterator puts back what it read."""

    def when_known(self, callback: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        """Calls `callback(args, kwargs)`: at once where inputs are known, otherwise in the first forward, before it
        computes."""

    def trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        """The traced view of the model on these inputs, taken once and shared."""


class RunChannels(Protocol):
    """The channels of the model, for a modifier that masks or removes them."""

    def groups(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ChannelGroups:
        """The channel groups that a dry run on these inputs found to be exact; found once and shared."""

    def claim(self, modifier: Modifier, channel_groups: Mapping[str, Iterable[str]]) -> None:
        """Notes that `modifier` masks these channel groups, {name: tensors}.

        Raises:
            RecipeError: another modifier is at work on one of them.
        """

    def remove(self, removal: Removal) -> None:
        """Removes channels from the model, the optimizer's state and the masks, and tells every modifier. Call between
        steps."""

    def rerouted(self) -> None:
        """To be called where the model runs through other layers than before: what was traced is forgotten."""


@dataclass
class Run:
    """The objects that modifiers work on and share. One for all modifiers of a manager.

    `model` is the user's module without DDP's or torch.compile's wrapper; names are given without their prefixes.
    """

    model: nn.Module
    optimizer: Optimizer | None
    """The one whose steps count; None: nothing is trained."""
    masker: Masker
    learning_rates: LearningRateLedger
    log: RunLog
    inputs: RunInputs
    channels: RunChannels
    teacher: nn.Module | Literal["self"] | None = None
    grad_sampler: GradSampler | None = None
    closure: bool = False
    """True while a step computes its gradients itself: before it they are old, after it they are there."""
    steps_per_epoch: int | None = None
    optimizers: tuple[Any, ...] = ()
    """All optimizers, `optimizer` among them, in the user's order."""
    stepping: Any = None
    """The optimizer whose step is at hand, during `before_step` and `after_step`."""
    goes_on: bool = False
    """True where a state is loaded next whose structure the model may have already."""

    @property
    def counts(self) -> bool:
        """True if the step at hand is one of the optimizer whose steps count."""
        return self.stepping is self.optimizer

    def stepped(self, parameters: Mapping[str, nn.Parameter]) -> Mapping[str, nn.Parameter]:
        """Those of `parameters` that the optimizer at hand moves; all of them where there is one optimizer."""
        if len(self.optimizers) < 2:
            return parameters
        mine = {id(parameter) for group in self.stepping.param_groups for parameter in group["params"]}
        return {name: parameter for name, parameter in parameters.items() if id(parameter) in mine}


def check_frequency(value: float) -> None:
    """Refuses an `update_frequency` at which nothing would ever be due; for validators."""
    if value <= 0 and value != -1:
        raise FieldProblem("update_frequency", f"{value} is no frequency; give epochs above 0, or -1 for every step")


_OPEN = {"start_epoch": "at once", "end_epoch": "never"}


@cache
def _say_without_effect(modifier: str, name: str) -> None:
    logging.getLogger("sparsify").warning("%s.%s is without effect; the recipe can do without it.", modifier, name)
