"""Training in tests: steps of any optimizer, a recipe at work on a small regression, comparisons of states."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsify.model.trace import trace
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.structured import StructuredPruningModifier
from sparsify.modifiers.top_kast import TopKASTPruningModifier
from sparsify.quantization.placement import make_plan
from sparsify.quantization.plan import QuantizationPlan, apply_plan, check_traced_ops
from sparsify.quantization.scheme import QuantizationSettings
from sparsify.training.manager import ScheduledModifierManager
from tests.optimizer_forms import FORMS
from tests.zoo.quantizable import ZOO
from tests.zoo.small import perceptron


def train_step(
    model: nn.Module,
    optimizer: Any,
    inputs: Tensor,
    target: Tensor | float = 0.0,
    *,
    update: Callable[[Tensor], Tensor] = lambda loss: loss,
    set_to_none: bool = True,
) -> float:
    """One step of any optimizer on the mean square of what the model is off; the loss before it."""

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = update((model(inputs) - target).square().mean())
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        return float(optimizer.step(closure).detach())
    loss = closure()
    optimizer.step()
    return float(loss.detach())


def reloaded(**states: Any) -> Any:
    """Through a file and back, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{path}.{i}").items()}
    return {path: value}


def assert_same_state(found: Any, wanted: Any, where: object) -> None:
    mine, theirs = _flat(found), _flat(wanted)
    assert mine.keys() == theirs.keys(), where
    for key, value in mine.items():
        other = theirs[key]
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype and torch.equal(value, other), (where, key)
        else:
            assert value == other or value != value, (where, key, value, other)


STEPS_PER_EPOCH, STEPS = 2, 14


def regression_model(seed: int = 0) -> nn.Module:
    return perceptron(6, 10, 4, seed=seed)


def regression_batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(500 + step)
    return torch.randn(8, 6, generator=draw), torch.randn(8, 4, generator=draw)


def regression_loss(model: nn.Module, step: int) -> Tensor:
    inputs, target = regression_batch(step)
    return (model(inputs) - target).square().mean()


def regress(model: nn.Module, optimizer: Any, steps: Sequence[int], after: Callable[[int], None] | None = None) -> None:
    """Steps of the regression, each on the batch of its number; `after` is called with the number of the next."""
    for step in steps:
        train_step(model, optimizer, *regression_batch(step))
        if after is not None:
            after(step + 1)


def regression_at_work(
    modifiers: Modifier | list[Modifier], form: str = "sgd momentum", seed: int = 0, **given: Any
) -> tuple[nn.Module, Any, ScheduledModifierManager]:
    model = regression_model(seed)
    optimizer = FORMS[form](model)
    manager = ScheduledModifierManager(modifiers if isinstance(modifiers, list) else [modifiers])
    manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH, **given)
    return model, optimizer, manager


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All weights by name, without their graphs."""
    return {name: p.detach() for name, p in model.named_parameters() if name.endswith("weight")}


def zeros_of(model: nn.Module) -> dict[str, int]:
    """Number of zeros of each weight."""
    return {name: int((w == 0).sum()) for name, w in weights_of(model).items()}


def pruning_fields(**changed: Any) -> dict[str, Any]:
    """Fields of a modifier that prunes all there is, from epoch 0 to 5."""
    return {"params": "__ALL_PRUNABLE__", "start_epoch": 0.0, "end_epoch": 5.0, "update_frequency": 1.0, **changed}


def gradual_pruning(start: float = 0.0, end: float = 2.0, frequency: float = 0.5, **fields: Any) -> GMPruningModifier:
    """Magnitude pruning of all layers from a sparsity of 0.1 to 0.8."""
    given = {"params": "__ALL_PRUNABLE__", "init_sparsity": 0.1, "final_sparsity": 0.8, **fields}
    return GMPruningModifier(start_epoch=start, end_epoch=end, update_frequency=frequency, **given)


def channel_pruning(**changed: Any) -> StructuredPruningModifier:
    """Half of the channels, from epoch 1 to 4."""
    ramp = {"init_sparsity": 0.1, "final_sparsity": 0.5, "update_frequency": 0.5, "multiple": 1}
    return StructuredPruningModifier(**pruning_fields(**{"start_epoch": 1.0, "end_epoch": 4.0, **ramp, **changed}))


def masks_of(manager: ScheduledModifierManager) -> dict[str, Tensor]:
    assert manager._session is not None
    return manager._session.masker.masks


def top_kast(**changed: Any) -> TopKASTPruningModifier:
    return TopKASTPruningModifier(**{**pruning_fields(), "forward_sparsity": 0.8, "backward_sparsity": 0.5, **changed})


def quantized(model: nn.Module, *inputs: Any, settings: QuantizationSettings | None = None) -> QuantizationPlan:
    """Quantizes `model` in place as its trace on `inputs` says; gives the plan."""
    plan = make_plan(model, trace(model, inputs), settings or QuantizationSettings())
    apply_plan(model, plan)
    check_traced_ops(model, inputs, {})
    return plan


_TRAINED: dict[object, tuple[nn.Module, Tensor, Tensor]] = {}


def quantized_and_trained(
    name: str, steps: int = 4, settings: QuantizationSettings | None = None, lr: float = 0.05
) -> tuple[nn.Module, Tensor]:
    """A quantized model of the zoo after a few steps, in training mode, and a batch; the random state is that after it.

    Trained once for all tests; each has a copy of its own.
    """
    key = name, steps, lr, repr(settings)
    if key not in _TRAINED:
        build, batch = ZOO[name]
        torch.manual_seed(0)
        model = build()
        inputs = batch()
        quantized(model, inputs, settings=settings)
        train(model, inputs, steps, lr)
        _TRAINED[key] = model, inputs, torch.get_rng_state()
    model, inputs, state = _TRAINED[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model), inputs.clone()


def train(model: nn.Module, inputs: Any, steps: int, lr: float = 0.05) -> list[float]:
    """The losses of a few steps of SGD with momentum that bring all outputs towards one."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return [train_step(model, optimizer, inputs, 1.0) for _ in range(steps)]


def holds_state(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """True if the model's state is this one, to the bit."""
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def same_bits(one: Any, two: Any) -> bool:
    """True if two states hold the same bits."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return set(one) == set(two) and all(same_bits(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same_bits, one, two))
    return bool(one == two)


def quantizing(**fields: Any) -> ScheduledModifierManager:
    """A manager whose recipe quantizes, and nothing else."""
    return ScheduledModifierManager([QuantizationModifier(**fields)])


def image_batches(count: int) -> list[Tensor]:
    """Batches for models that read images, the same each time."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 3, 12, 12, generator=generator) for _ in range(count)]
