"""Creates a recipe with evidence from a model, its profiles and a goal."""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sparsify.analysis.file_module import FileModule, module_or_file, refuse_file
from sparsify.analysis.loss import loss_profile
from sparsify.errors import ArgumentError, SparsifyWarning
from sparsify.model.wrappers import unwrapped
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.epochs import EpochRangeModifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier, GMPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.structured import StructuredPruningModifier
from sparsify.modifiers.training import TrainableParamsModifier
from sparsify.optimize.choices import Sources, WeightShares, by_channel_groups, by_latency_plan, by_layers
from sparsify.optimize.expectations import expected
from sparsify.optimize.goals import Goal, GoalArguments, goal_of
from sparsify.optimize.levels import Experiment
from sparsify.optimize.stages import (
    LearningRateSchedule,
    OriginalTraining,
    TrainingStage,
    check_schedule,
    learning_rates,
)
from sparsify.recipe.evidence import Evidence, Expected, cited
from sparsify.recipe.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from sparsify.analysis.layers import ModelAnalysis
    from sparsify.analysis.loss import LossProfile
    from sparsify.analysis.performance import PerformanceProfile
    from sparsify.model.signature import InputsLike
    from sparsify.optimize.latency import LatencyPlan
    from sparsify.optimize.pruning_profiles import PruningProfile, PruningSettings

__all__ = ["create_recipe"]

FIRST = 0.05
"""The sparsity that pruning starts with."""
LEVEL_TOLERANCE = 0.02
"""Whole channels that miss the share of parameters asked for by more than this are reported in the notes."""
UNKNOWN = OriginalTraining(90)
"""The original training where nothing is said about it: as many epochs, and no learning rates."""


def create_recipe(
    model: nn.Module | str | os.PathLike[str],
    sample_inputs: InputsLike | None = None,
    *,
    optim_level: float | None = None,
    experiment: Experiment = "training-aware",
    preset: str | None = None,
    sparsity: float | None = None,
    settings: PruningSettings | None = None,
    pruning_profile: PruningProfile | None = None,
    latency_plan: LatencyPlan | None = None,
    analysis: ModelAnalysis | None = None,
    performance: PerformanceProfile | None = None,
    loss: LossProfile | None = None,
    training: OriginalTraining | None = None,
    learning_rate: LearningRateSchedule | Sequence[Modifier] | None = None,
    quantize: bool | Mapping[str, Any] | None = None,
    distill: bool | Mapping[str, Any] = False,
    structured: bool | None = None,
) -> Recipe:
    """A recipe that compresses `model`, with the evidence for each of its numbers; the model is not touched.

    How much is said in one way: by `optim_level` (0.5 where nothing is said), `sparsity`, `settings`, a
    `pruning_profile` or a `latency_plan`. Over the layers it is spread by what each loses and costs: measured where
    profiles are given, otherwise by the magnitudes of the weights.

    The recipe's text cites the evidence as comments, `recipe.evidence` has it as data, and `recipe.to_yaml()` is read
    back as an equal recipe.

    Args:
        model: the dense model; for sparse transfer the one to transfer from. Or the path of an ONNX file: of one that
            `export_onnx` wrote the recipe is that of the model, of others it names initializers, and says so.
        sample_inputs: as the model is called with them. Without them MACs are not known, and channels cannot go.
        optim_level: 0 to 1; see `optim_level`.
        experiment: "training-aware", "one-shot" or "sparse-transfer"; see `optim_level`.
        preset: a name in `PRESETS`; alone, or with an optim level or a sparsity.
        sparsity: zeros / elements over all that may be pruned, 0 to 1.
        settings: an average sparsity with filters, caps and layers set by hand.
        pruning_profile: the result of `pruning_profile` for this model, edited or not.
        latency_plan: the result of `latency_plan` for this model.
        analysis, performance, loss: of this model; made here as far as they need no data and no measuring.
        training: how the dense model was trained. None: laid out for 90 epochs, without learning rates.
        learning_rate: the schedule of fine-tuning, or a list of learning-rate modifiers that stands for all of them.
        quantize: True, False, fields of the QuantizationModifier, or None: as the optim level says, else not.
        distill: whether the dense model teaches (`distillation_teacher` of `modify`); or fields of the
            DistillationModifier.
        structured: whether whole channels go, and the model gets smaller; None: as the preset says, else not.

    Raises:
        ArgumentError: an argument that cannot be meant, or two that contradict one another.
        TargetError: a name is not in the model, or nothing in it can be pruned.
    """
    said = GoalArguments(
        level=optim_level,
        experiment=experiment,
        preset=preset,
        sparsity=sparsity,
        settings=settings,
        profile=pruning_profile,
        latency=latency_plan,
        quantize=quantize,
        structured=structured,
    )
    goal = goal_of(said)
    _check_arguments(goal, training, learning_rate, distill, sample_inputs, loss)
    model = unwrapped(module_or_file(model))
    if goal.structured or latency_plan is not None:
        refuse_file(model, "create_recipe: the removal of channels")
    known = analysis
    if isinstance(model, FileModule) and known is None:
        known = model.analysis(sample_inputs)
    if loss is None and goal.prunes:
        loss = loss_profile(model, progress=False, layers=known if isinstance(model, FileModule) else None)
    found = Sources.of(model, sample_inputs, known, performance, loss, latency_plan)
    chosen = WeightShares()
    if latency_plan is not None:
        chosen = by_latency_plan(latency_plan, model, found)
    elif goal.settings is not None:
        if goal.structured:
            chosen = by_channel_groups(model, sample_inputs, goal.settings, pruning_profile, found)
        else:
            chosen = by_layers(goal.settings, pruning_profile, found)
    if isinstance(model, FileModule) and model.foreign:
        chosen.notes.append(model.note)
    draft = _Draft()
    stages = _lay_out(draft, model, goal, chosen, training, learning_rate, distill)
    figures = expected(
        model,
        draft.modifiers,
        {} if goal.structured else chosen.shares,
        inputs=sample_inputs,
        analysis=analysis or (found.analysis if sample_inputs is not None else None),
        profile=chosen.profile,
        performance=performance,
        latency=latency_plan,
    )
    evidence = _evidence(goal, training, found, chosen, figures, draft, stages)
    recipe = Recipe.from_modifiers(draft.modifiers, metadata={"made_by": "create_recipe", **evidence.metadata()})
    with warnings.catch_warnings():
        # What rounds to nothing is in its evidence and its plan.
        warnings.simplefilter("ignore", SparsifyWarning)
        recipe.check(model)
    return recipe


# ---------------------------------------------------------------------- what is done


@dataclass
class _Draft:
    """Modifiers in the order of the text, and the reasons for their numbers."""

    modifiers: list[Modifier] = field(default_factory=list)
    because: dict[str, str] = field(default_factory=dict)

    def add(self, modifier: Modifier, **reasons: str) -> None:
        self.modifiers.append(modifier)
        for place, reason in reasons.items():
            self.because[cited(type(modifier).__name__, place, getattr(modifier, place))] = reason


def _lay_out(
    draft: _Draft,
    model: nn.Module,
    goal: Goal,
    chosen: WeightShares,
    training: OriginalTraining | None,
    learning_rate: LearningRateSchedule | Sequence[Modifier] | None,
    distill: bool | Mapping[str, Any],
) -> tuple[TrainingStage, ...]:
    """The modifiers, and the stages that they are laid out on."""
    original = training or UNKNOWN
    transfer = goal.experiment == "sparse-transfer"
    trained = goal.experiment != "one-shot" and (transfer or bool(chosen.shares) or goal.quantize is not None)
    stages: tuple[TrainingStage, ...] = ()
    if trained:
        stages = original.stages(prune=bool(chosen.shares), quantize=goal.quantize is not None, transfer=transfer)
    by_name = {stage.name: stage for stage in stages}
    end = stages[-1].end if stages else 0.0
    draft.add(
        EpochRangeModifier(start_epoch=0.0, end_epoch=end),
        end_epoch=f"the stages that follow from {original.epochs:g} epochs of the original training"
        if trained
        else "nothing is trained",
    )
    if chosen.shares:
        _prune(draft, goal, chosen, original, by_name.get("pruning"))
    if goal.holds:
        draft.add(ConstantPruningModifier(params="__ALL_PRUNABLE__", start_epoch=0.0))
    if trained:
        _rates(draft, original, learning_rate, stages)
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        # Frozen parameters stay frozen, except those that are pruned, which must be able to adapt.
        learn: str | list[str] = list(chosen.shares) if frozen else "__ALL__"
        if learn:
            draft.add(TrainableParamsModifier(params=learn, trainable=True, start_epoch=0.0))
    if goal.quantize is not None:
        floating = {"ignore": chosen.floating} if chosen.floating else {}
        _quantization_stage(draft, {**floating, **goal.quantize}, by_name.get("quantization"))
    if distill is not False:
        given = dict(distill) if isinstance(distill, Mapping) else {}
        draft.add(DistillationModifier(**{"start_epoch": 0.0, "hardness": 0.5, "temperature": 2.0, **given}))
    return stages


def _prune(
    draft: _Draft, goal: Goal, chosen: WeightShares, original: OriginalTraining, stage: TrainingStage | None
) -> None:
    """One modifier for each distinct sparsity."""
    names: dict[float, list[str]] = defaultdict(list)
    for weight, share in chosen.shares.items():
        names[share].append(weight)
    when: dict[str, Any] = {"start_epoch": 0.0, "end_epoch": 0.0, "update_frequency": -1.0}
    reasons: dict[str, str] = {}
    if stage is not None:
        frequency = original.update_frequency
        when = {"start_epoch": stage.start, "end_epoch": stage.end, "update_frequency": frequency}
        reasons = {
            "start_epoch": f"after {stage.start:g} epoch of stabilization",
            "end_epoch": f"{stage.epochs:g} epochs, a third of {original.epochs:g}",
            "update_frequency": f"{stage.epochs / frequency:.3g} updates within the {stage.epochs:g} epochs",
        }
    for share in sorted(names):
        fields = {
            "params": names[share],
            "init_sparsity": min(FIRST, share) if stage is not None else share,
            "final_sparsity": share,
            **when,
        }
        if goal.structured:
            draft.add(StructuredPruningModifier(**fields, shrink=True), **reasons)
        else:
            draft.add(GMPruningModifier(**fields), **reasons)


def _rates(
    draft: _Draft,
    original: OriginalTraining,
    wanted: LearningRateSchedule | Sequence[Modifier] | None,
    stages: Sequence[TrainingStage],
) -> None:
    if wanted is not None and not isinstance(wanted, str):
        for modifier in wanted:
            draft.add(modifier)
        return
    if original.initial_lr is None:
        return
    for modifier in learning_rates(original, wanted, stages):
        draft.add(modifier)
    base = f"({original.initial_lr:g} + {original.final_lr:g}) / 2"
    tuned = f"a quarter of {base}" if any(stage.name == "pruning" for stage in stages) else base
    reasons = {
        "stabilization": ("", f"a tenth of {base}: the optimizer's averages are still empty"),
        "pruning": (base, ""),
        "fine-tuning": (tuned, tuned),
        "quantization": ("", "the final rate, or 2.5 times where fine-tuning ended"),
    }
    for modifier in draft.modifiers:
        stage = next((stage.name for stage in stages if stage.start == modifier.window.start), None)
        if modifier.kind != "learning_rate" or stage is None:
            continue
        fixed, first = reasons[stage]
        cites = {"learning_rate": fixed or base, "init_lr": first}
        found = {place: getattr(modifier, place, None) for place in cites}
        steps = getattr(modifier, "lr_kwargs", {}).get("step_size")
        cites["lr_kwargs.step_size"] = f"down to a tenth of {original.lowest_lr:g} by the end of fine-tuning"
        for place, value in (found | {"lr_kwargs.step_size": steps}).items():
            if value is not None and cites[place]:
                draft.because[cited(type(modifier).__name__, place, value)] = cites[place]


def _quantization_stage(draft: _Draft, given: Mapping[str, Any], stage: TrainingStage | None) -> None:
    if stage is None:
        draft.add(QuantizationModifier(**{"start_epoch": 0.0, **given}))
        return
    fields: dict[str, Any] = quantization_epochs(stage)
    reasons = {
        "start_epoch": "after fine-tuning" if stage.start else "nothing is pruned first",
        "disable_quantization_observer_epoch": "ranges have settled: half of the stage",
        "freeze_bn_stats_epoch": "the learning rate is small by then: three quarters of the stage",
    }
    draft.add(
        QuantizationModifier(**{**fields, **given}),
        **{place: reason for place, reason in reasons.items() if place not in given},
    )


def quantization_epochs(stage: TrainingStage) -> dict[str, float]:
    """The fields of a QuantizationModifier that are epochs, for its stage."""
    return {
        "start_epoch": stage.start,
        "disable_quantization_observer_epoch": stage.start + stage.epochs / 2,
        "freeze_bn_stats_epoch": stage.start + 0.75 * stage.epochs,
    }


# ---------------------------------------------------------------------- what is said


def _evidence(
    goal: Goal,
    training: OriginalTraining | None,
    found: Sources,
    chosen: WeightShares,
    figures: Expected,
    draft: _Draft,
    stages: Sequence[TrainingStage],
) -> Evidence:
    notes = list(chosen.notes)
    if training is None and stages:
        notes.append(f"the original training is not known: laid out for one of {UNKNOWN.epochs:g} epochs.")
    if stages and not any(modifier.kind == "learning_rate" for modifier in draft.modifiers):
        notes.append("learning rates are left to the training loop: the original ones are not known.")
    notes += _level_missed(goal, figures)
    measured = found.performance
    asked = dict(goal.asked) | ({} if measured is None else {"batch_size": measured.batch_size})
    asked |= {} if training is None else {"training": asdict(training)}
    return Evidence(
        goal=goal.text,
        asked=asked,
        sources=dict(found.texts) if chosen.shares else {},
        layers=chosen.evidence,
        dense=chosen.dense,
        expected=figures,
        stages={stage.name: (stage.start, stage.end) for stage in stages},
        because=draft.because,
        notes=notes,
    )


def _level_missed(goal: Goal, figures: Expected) -> list[str]:
    """Says how many parameters go with whole channels, where they are not as many as was asked for."""
    if not goal.structured or goal.settings is None or not figures.parameters_before:
        return []
    gone = 1.0 - figures.parameters / figures.parameters_before
    if abs(gone - goal.settings.sparsity) <= LEVEL_TOLERANCE:
        return []
    other = "more" if gone < goal.settings.sparsity else "less"
    return [
        f"{gone:.1%} of the parameters go, where {goal.settings.sparsity:.1%} were asked for: inputs and outputs of "
        f"the model keep their channels, and layers differ in width. Ask for {other}, or give a latency_plan."
    ]


# ---------------------------------------------------------------------- what may be said


def _check_arguments(
    goal: Goal,
    training: OriginalTraining | None,
    learning_rate: object,
    distill: object,
    sample_inputs: InputsLike | None,
    loss: LossProfile | None,
) -> None:
    """Refuses what cannot be meant, before any work."""
    if training is not None and not isinstance(training, OriginalTraining):
        raise ArgumentError(f"training: a {type(training).__name__} is none; give OriginalTraining(epochs, ...).")
    if isinstance(learning_rate, str) or learning_rate is None:
        check_schedule(learning_rate)
        if learning_rate is not None and (training is None or training.initial_lr is None):
            raise ArgumentError("learning_rate: a schedule needs the rates of `training`; give OriginalTraining(...).")
    elif not isinstance(learning_rate, list | tuple) or not all(
        isinstance(modifier, Modifier) and modifier.kind == "learning_rate" for modifier in learning_rate
    ):
        raise ArgumentError("learning_rate: give the name of a schedule, or a list of learning-rate modifiers.")
    if goal.experiment == "one-shot":
        for name, value in (("training", training), ("learning_rate", learning_rate), ("distill", distill or None)):
            if value is not None:
                raise ArgumentError(f"{name}: one-shot trains nothing; leave it out, or take training-aware.")
    if not isinstance(distill, bool | Mapping):
        raise ArgumentError(f"distill: {distill!r} is neither True, False nor a mapping of fields.")
    if goal.structured and sample_inputs is None:
        raise ArgumentError("sample_inputs: which channels go together is found on inputs of the model; give some.")
    if loss is not None and loss.of != "pruning":
        raise ArgumentError("loss: a profile of quantization; give one of pruning, loss_profile(..., of='pruning').")
