"""Models under `fully_shard` on gloo ranks: the same run as of the whole model, and refusals of what cannot work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sparsify.errors import StateError
from sparsify.integrations.fsdp import load_sharded_checkpoint, save_sharded_checkpoint
from sparsify.model import sharding
from sparsify.modifiers.base import Modifier
from sparsify.modifiers.distillation import DistillationModifier
from sparsify.modifiers.learning_rate import SetLearningRateModifier
from sparsify.modifiers.magnitude_pruning import ConstantPruningModifier, GlobalMagnitudePruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.modifiers.sparse_training import ACDCPruningModifier, MovementPruningModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import channel_pruning, gradual_pruning, pruning_fields
from tests.ranks import on_ranks, on_two_ranks
from tests.zoo.small import perceptron

STEPS, STEPS_PER_EPOCH = 8, 4
QAT = QuantizationModifier(start_epoch=1.0)


def _model() -> nn.Module:
    # Five and three rows: uneven over two ranks, and over four some have none.
    return perceptron(8, 5, 3, seed=3)


def _shard(model: nn.Module, **options: Any) -> nn.Module:
    fully_shard(model[2], **options)  # type: ignore[index]
    return fully_shard(model, **options)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.05)


def _at_work(
    model: nn.Module, modifiers: list[Modifier], **given: Any
) -> tuple[ScheduledModifierManager, torch.optim.Optimizer]:
    manager, optimizer = ScheduledModifierManager(modifiers), _adam(model)
    manager.modify(model, optimizer, steps_per_epoch=STEPS_PER_EPOCH, **given)
    return manager, optimizer


def _batch(step: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(step))


def _train(
    model: nn.Module, manager: ScheduledModifierManager, optimizer: torch.optim.Optimizer, steps: range, pieces: int = 2
) -> list[float]:
    """Every rank on the same batches, so that means of gradients over ranks are those of one."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        for piece in _batch(step).chunk(pieces):
            loss = manager.update_loss(model(piece).square().mean())
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
        optimizer.step()
        with torch.no_grad():
            model(_batch(step))  # leaves the outermost module with whole parameters
    return losses


def _whole(model: nn.Module) -> dict[str, Tensor]:
    sharding.reshard(model)
    return {name: sharding.gathered(value).clone() for name, value in model.state_dict().items()}


def _equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), (name, found[name], value)


def _same_as_alone(modifiers: list[Modifier], make: Callable[[nn.Module], nn.Module], **given: Any) -> None:
    """Trains the model whole and sharded; weights, zeros, losses and the manager's state are the same to the bit."""
    found = []
    for shard in (lambda model: model, make):
        model = shard(_model())
        manager, optimizer = _at_work(model, modifiers, **given)
        losses = _train(model, manager, optimizer, range(STEPS))
        state = manager.state_dict()
        sparsity = manager.sparsity()
        sharding.reshard(model)
        memory = get_optimizer_state_dict(model, optimizer)["state"]
        moments = {f"{name}.{key}": sharding.gathered(m) for name, of in memory.items() for key, m in of.items()}
        manager.finalize(model)
        found.append((_whole(model), losses, sparsity, state["checksum"], moments))
    (alone, losses, sparsity, checksum, memory), (sharded, *others, moments) = found
    _equal(sharded, alone)
    _equal(moments, memory)
    assert others[:2] == [losses, sparsity], (others, losses, sparsity)
    assert others[2] == checksum


def _prunes(rank: int, folder: str) -> None:
    _same_as_alone([gradual_pruning(), SetLearningRateModifier(start_epoch=1.0, learning_rate=0.01)], _shard)


def _prunes_every_way(rank: int, folder: str) -> None:
    teacher = perceptron(8, 5, 3, seed=4)
    ramp = dict(params="__ALL_PRUNABLE__", start_epoch=0.0, end_epoch=2.0, update_frequency=0.5, init_sparsity=0.05)
    recipes: list[list[Modifier]] = [
        [GlobalMagnitudePruningModifier(**ramp, final_sparsity=0.8)],
        [gradual_pruning(params=["re:0.*weight"], final_sparsity=0.5, mask_type="2:4")],
        [ACDCPruningModifier(**pruning_fields(end_epoch=2.0, update_frequency=0.5), compression_sparsity=0.7)],
        [gradual_pruning(), DistillationModifier(hardness=0.5)],
        [gradual_pruning(end=1.0), QAT],
        [QuantizationModifier(start_epoch=0.5, scheme={"weights": {"observer": "lsq"}})],
    ]
    ways: list[dict[str, Any]] = [{}, {"reshard_after_forward": False}, {"reshard_after_forward": True}]
    if dist.get_world_size() == 4:
        ways.append({"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))})
    for modifiers in recipes:
        for way in ways:
            _same_as_alone(
                modifiers, partial(_shard, **way), distillation_teacher=teacher, sample_inputs=torch.ones(4, 8)
            )


def _holds_zeros(rank: int, folder: str) -> None:
    model = _model()
    with torch.no_grad():
        model[0].weight[1:3] = 0.0  # type: ignore[index]
    model = _shard(model)
    manager, optimizer = _at_work(model, [ConstantPruningModifier(params=["re:0.*weight"])])
    _train(model, manager, optimizer, range(STEPS))
    assert manager.sparsity() == {"0.weight": 0.4}
    assert int((_whole(model)["0.weight"] == 0).sum()) == 16


def _in_mixed_precision(rank: int, folder: str) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for modifiers in ([gradual_pruning()], [gradual_pruning(end=1.0), QAT]):
        model = _shard(_model(), mp_policy=policy)
        manager, optimizer = _at_work(model, modifiers, sample_inputs=torch.ones(4, 8))
        _train(model, manager, optimizer, range(STEPS))
        manager.finalize()
        zeros = {name: int((weight == 0).sum()) for name, weight in _whole(model).items() if name.endswith("weight")}
        assert zeros == {"0.weight": 32, "2.weight": 12}


def _is_masked_before_it_is_sharded(rank: int, folder: str) -> None:
    # As accelerate does: the optimizer gets the sharded parameters for its own.
    model = _model()
    manager, optimizer = _at_work(model, [gradual_pruning()])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]]
    _shard(model)
    sharded = dict(model.named_parameters())
    optimizer.param_groups[0]["params"] = [sharded[name] for name in order]
    _train(model, manager, optimizer, range(STEPS))
    manager.finalize()
    alone = _model()
    manager, optimizer = _at_work(alone, [gradual_pruning()])
    _train(alone, manager, optimizer, range(STEPS))
    _equal(_whole(model), _whole(alone))


def _is_refused(rank: int, folder: str) -> None:
    before = _whole(_model())
    for modifier, given, message in (
        (channel_pruning(), {"sample_inputs": torch.ones(4, 8)}, "StructuredPruningModifier .*'0.weight'.*checkpoint"),
        (MovementPruningModifier(**pruning_fields(final_sparsity=0.5, init_sparsity=0.1)), {}, "'0.weight'.*GMPruning"),
        (QAT, {}, "pass sample_inputs"),
        (DistillationModifier(), {"distillation_teacher": "self"}, "deepcopy.* before fully_shard"),
    ):
        model = _shard(_model())
        with pytest.raises(StateError, match=message):
            _at_work(model, [modifier], **given)
        _equal(_whole(model), before)


def _save(rank: int, folder: str, modifiers: list[Modifier]) -> None:
    model = _shard(_model())
    manager, optimizer = _at_work(model, modifiers, sample_inputs=torch.ones(4, 8))
    _train(model, manager, optimizer, range(5))
    save_sharded_checkpoint(Path(folder) / "saved", manager, model, optimizer)
    whole = _whole(model)
    losses = _train(model, manager, optimizer, range(5, STEPS))
    torch.save((whole, _whole(model), losses), Path(folder) / f"wanted{rank}.pt")


def _resume(rank: int, folder: str, modifiers: list[Modifier], exact: bool) -> None:
    at_save, at_end, losses = torch.load(Path(folder) / "wanted0.pt")
    model = _shard(perceptron(8, 5, 3, seed=9))
    manager, optimizer = _at_work(model, modifiers, sample_inputs=torch.ones(4, 8))
    load_sharded_checkpoint(Path(folder) / "saved", manager, model, optimizer)
    assert manager.step == 5
    _equal(_whole(model), at_save)
    assert _train(model, manager, optimizer, range(5, STEPS)) == losses or not exact
    found = _whole(model)
    assert found.keys() == at_end.keys()
    for name, value in at_end.items():
        assert torch.equal(found[name], value) if exact else torch.allclose(found[name].float(), value.float()), name
        assert torch.equal(found[name] == 0, value == 0)
    with pytest.raises(StateError, match="no state of a manager"):
        load_sharded_checkpoint(Path(folder) / "nothing", manager, model, optimizer)


PRUNED: list[Modifier] = [gradual_pruning()]
QUANTIZED: list[Modifier] = [gradual_pruning(end=1.0), QAT]


def test_a_sharded_run_is_that_of_the_whole_model(tmp_path: Path) -> None:
    on_two_ranks(_prunes, tmp_path)


def test_what_cannot_work_sharded_is_refused_before_anything_changes(tmp_path: Path) -> None:
    on_two_ranks(_is_refused, tmp_path)


def test_a_sharded_checkpoint_resumes_bit_for_bit(tmp_path: Path) -> None:
    on_two_ranks(partial(_save, modifiers=PRUNED), tmp_path)
    on_two_ranks(partial(_resume, modifiers=PRUNED, exact=True), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "work", [_prunes, _prunes_every_way, _holds_zeros, _in_mixed_precision, _is_masked_before_it_is_sharded]
)
def test_every_recipe_works_on_every_kind_of_sharding(work: Any, ranks: int, tmp_path: Path) -> None:
    on_ranks(ranks, work, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("modifiers", [PRUNED, QUANTIZED])
@pytest.mark.parametrize("saved,resumed", [(4, 2), (2, 4), (4, 4)])
def test_a_checkpoint_resumes_on_another_number_of_ranks(
    saved: int, resumed: int, modifiers: list[Modifier], tmp_path: Path
) -> None:
    on_ranks(saved, partial(_save, modifiers=modifiers), tmp_path)
    on_ranks(resumed, partial(_resume, modifiers=modifiers, exact=saved == resumed), tmp_path)


@pytest.fixture(autouse=True)
def _gloo() -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
