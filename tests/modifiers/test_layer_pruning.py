"""Layers that become the identity: when, in which models, undone, saved, resumed and exported as nothing."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from sparsify.errors import StateError, TargetError
from sparsify.modifiers.layer_pruning import LayerPruningModifier
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.modifiers.quantization import QuantizationModifier
from sparsify.onnx.export import export_onnx
from sparsify.pruning.skipped_layers import Skipped
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import same_bits, train_step

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.n(self.a(x)).relu() + x


class Network(nn.Module):
    """`pruned`: layers that this one is written without, the reference."""

    def __init__(self, pruned: tuple[str, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3), Block(), Block()
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(4 * 36, 5)
        self.pruned = pruned

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x if "one" in self.pruned else self.one(x)
        x = self.two.n(x).relu() + x if "two.a" in self.pruned else self.two(x)
        return self.head(self.act(x).flatten(1))


def manager_of(layers: Any = ("one", "two.a"), **fields: Any) -> ScheduledModifierManager:
    return ScheduledModifierManager([LayerPruningModifier(layers=list(layers), **fields)])


def optimizer_of(model: nn.Module, kind: str = "sgd") -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("inputs", [None, X])
def test_training_is_that_of_a_network_written_without_the_layers(kind: str, inputs: Any) -> None:
    model, reference = Network(), Network()
    optimizer, plain = optimizer_of(model, kind), optimizer_of(reference, kind)
    manager = manager_of(start_epoch=1.0, end_epoch=2.0)
    manager.modify(model, optimizer, steps_per_epoch=3, sample_inputs=inputs)
    for step in range(9):
        inside = 3 <= step < 6
        reference.pruned = ("one", "two.a") if inside else ()
        assert isinstance(model.one, Skipped) == isinstance(model.two.a, Skipped) == inside
        assert train_step(model, optimizer, X) == train_step(reference, plain, X)
        assert same_bits(model.state_dict(), reference.state_dict())
    assert type(model.one) is Block and type(model.two.a) is nn.Conv2d


def test_a_pruned_layer_stays_where_it_is() -> None:
    model = Network()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    one, wanted = model.one, Network(("one", "two.a")).eval()(X)
    manager = manager_of()
    manager.modify(model, optimizer_of(model), steps_per_epoch=3)
    assert isinstance(model.one, Block) and isinstance(model.two.a, nn.Conv2d) and model.one is one
    assert list(model.state_dict()) == keys
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    manager.finalize(model)
    assert torch.equal(model.eval()(X), wanted), "for good"
    assert "SkippedBlock" in repr(model)


@pytest.mark.parametrize("end", [-1.0, 5.0])
def test_finalize_brings_back_what_was_to_come_back(end: float) -> None:
    model = Network()
    manager = manager_of(end_epoch=end)
    optimizer = optimizer_of(model)
    manager.modify(model, optimizer, steps_per_epoch=3)
    train_step(model, optimizer, X)
    manager.finalize(model)
    manager.finalize(model)
    assert isinstance(model.one, Skipped) == (end == -1.0)
    assert model.eval()(X).isfinite().all()


def test_a_recipe_whose_time_never_comes_changes_nothing() -> None:
    model, reference = Network(), Network()
    optimizer, plain = optimizer_of(model), optimizer_of(reference)
    manager_of(start_epoch=7.0).modify(model, optimizer, steps_per_epoch=3, sample_inputs=X)
    assert [train_step(model, optimizer, X) for _ in range(5)] == [train_step(reference, plain, X) for _ in range(5)]
    assert same_bits(model.state_dict(), reference.state_dict()), "the check left no trace in the statistics either"


def test_the_check_of_the_first_call_leaves_no_trace() -> None:
    class Noisy(Block):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.rand(3)
            self.calls.add_(1)
            return super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Noisy())
    manager_of(["1"]).modify(model, optimizer_of(model), steps_per_epoch=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    model(X)
    found = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(found, torch.rand(1))
    assert same_bits(model.state_dict(), before) and model[1].training and model[1].n.training
    calls: list[int] = []
    model[1].a.register_forward_hook(lambda *_: calls.append(1))
    model(X)
    assert not calls, "later calls compute nothing"


# ------------------------------------------------------------------------------------- copies, saved and resumed


def test_copies_and_pickles_of_a_pruned_model_are_pruned() -> None:
    model = Network()
    manager = manager_of()
    manager.modify(model, optimizer_of(model), steps_per_epoch=3, sample_inputs=X)
    wanted = model.eval()(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert isinstance(twin.one, Skipped) and isinstance(twin.one, Block) and twin.one is not model.one
        assert torch.equal(twin(X), wanted)
        assert list(twin.state_dict()) == list(model.state_dict())
    # And one goes on where its recipe says that they come back.
    twin = copy.deepcopy(model)
    back = manager_of(end_epoch=1.0)
    optimizer = optimizer_of(twin)
    back.modify(twin, optimizer, steps_per_epoch=1)
    train_step(twin, optimizer, X)
    assert type(twin.one) is Block


@pytest.mark.parametrize("to_none", [True, False])
def test_a_run_resumed_at_every_step_is_the_one_that_never_stopped(to_none: bool) -> None:
    fields = {"start_epoch": 1.0, "end_epoch": 2.0}
    model = Network()
    optimizer = optimizer_of(model, "adamw")
    manager = manager_of(**fields)
    manager.modify(model, optimizer, steps_per_epoch=3)
    saved = []
    for _ in range(8):
        saved.append(copy.deepcopy((manager.state_dict(), model.state_dict(), optimizer.state_dict())))
        train_step(model, optimizer, X, set_to_none=to_none)
    for step, (state, weights, memory) in enumerate(saved):
        again = Network()
        other = optimizer_of(again, "adamw")
        second = manager_of(**fields)
        second.modify(again, other, steps_per_epoch=3)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        again.load_state_dict(weights)
        other.load_state_dict(memory)
        assert isinstance(again.one, Skipped) == (3 <= step < 6)
        for _ in range(8 - step):
            train_step(again, other, X, set_to_none=to_none)
        assert same_bits(again.state_dict(), model.state_dict()), step


def test_the_structure_comes_from_an_epoch_or_a_state() -> None:
    manager = manager_of(start_epoch=1.0, end_epoch=3.0)
    for epoch, pruned in ((0.0, False), (1.0, True), (2.9, True), (3.0, False), (float("inf"), False)):
        assert isinstance(manager.apply_structure(Network(), epoch).one, Skipped) == pruned, epoch
    assert isinstance(manager_of().apply_structure(Network()).one, Skipped)
    model = Network()
    optimizer = optimizer_of(model)
    manager.modify(model, optimizer, steps_per_epoch=1)
    train_step(model, optimizer, X)
    fresh = manager_of(start_epoch=1.0, end_epoch=3.0).apply_structure(Network(), state=manager.state_dict())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(X), model.eval()(X)) and isinstance(fresh.two.a, Skipped)


def test_apply_prunes_without_inputs() -> None:
    model = manager_of().apply(Network())
    assert torch.equal(model.eval()(X), Network(("one", "two.a")).eval()(X))


# ------------------------------------------------------------------------------------- what cannot be pruned


class Pair(nn.Module):
    def __init__(self, second: Any) -> None:
        super().__init__()
        self.second, self.linear = second, nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, mask: Any = None) -> Any:
        return self.linear(x), (x if self.second else None)


class Reads(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    ("layer", "inputs", "text"),
    [
        (
            nn.Conv2d(3, 3, 3),
            X,
            r"'layer' reads a tensor of shape \(6, 3, 8, 8\) and gives one of shape \(6, 3, 6, 6\)",
        ),
        (nn.MaxPool2d(2), X, r"gives one of shape \(6, 3, 4, 4\)"),
        (Pair(True), torch.randn(2, 3), "'layer' gives a tuple of Tensor, Tensor, which is more than what it reads"),
        (nn.GRU(3, 3), torch.randn(2, 3), "which is more than what it reads"),
    ],
)
def test_layers_that_change_the_shape_are_refused(given: bool, layer: Any, inputs: Any, text: str) -> None:
    model = Reads(copy.deepcopy(layer))
    before = type(model.layer)
    manager = manager_of(["layer"])
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1)), *model.parameters()], lr=0.1)
    if given:
        with pytest.raises(TargetError, match=text):
            manager.modify(model, optimizer, 4, sample_inputs=inputs)
    else:
        manager.modify(model, optimizer, 4)
        with pytest.raises(TargetError, match=text):
            model(inputs)
    assert type(model.layer) is before
    manager.finalize()
    model(inputs)


@pytest.mark.parametrize(
    ("model", "name", "text"),
    [
        (nn.Sequential(nn.Linear(3, 4)), "0", "'0' reads 3 and gives 4 channels"),
        (nn.Sequential(nn.Embedding(3, 4)), "0", "is an Embedding"),
        (nn.ModuleDict({"a": nn.ModuleList([nn.Linear(3, 3)])}), "a", "is a ModuleList, which is not called itself"),
        (nn.TransformerEncoderLayer(4, 2), "norm1", "read by its TransformerEncoderLayer"),
        (nn.MultiheadAttention(4, 2), "out_proj", "read by its MultiheadAttention"),
        (Network(), "ones", r"matches nothing in Network.\n  Closest: 'one'"),
    ],
)
def test_what_can_be_seen_is_refused_at_once(model: nn.Module, name: str, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        manager_of([name]).modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)


def test_a_tuple_with_nothing_more_in_it_is_given_again() -> None:
    model = Reads(Pair(None))
    manager_of(["layer"]).modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    x = torch.randn(2, 3)
    assert torch.equal(model(x), x)
    first, rest = model.layer(x, mask=None)
    assert torch.equal(first, x) and rest is None


def test_what_works_in_place_does_not_reach_the_input() -> None:
    class Shortcut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.BatchNorm1d(3), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.norm(x)) + x

    model = Shortcut()
    manager_of(["norm"]).modify(model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    x = torch.randn(5, 3)
    assert torch.equal(model(x.clone()), x.relu() + x)


def test_a_forward_set_on_the_object_comes_back() -> None:
    model = Network()
    own = model.one.forward
    model.one.forward = lambda x: own(x) * 2
    wanted = model.eval()(X)
    manager = manager_of(end_epoch=5.0)
    manager.modify(model, optimizer_of(model), steps_per_epoch=3)
    assert torch.equal(model(X), Network(("one", "two.a")).eval()(X))
    manager.finalize()
    assert torch.equal(model(X), wanted)


def test_a_quantized_layer_is_refused() -> None:
    model = Network()
    optimizer = optimizer_of(model)
    manager = ScheduledModifierManager(
        [
            QuantizationModifier(start_epoch=0.0),
            LayerPruningModifier(layers=["two.a"], start_epoch=1.0),
        ]
    )
    manager.modify(model, optimizer, steps_per_epoch=1, sample_inputs=X)
    with pytest.raises(StateError, match=r"'two\.a' is quantized already.*start before QuantizationModifier"):
        train_step(model, optimizer, X)
    manager.finalize()
    assert model.eval()(X).isfinite().all()


# ------------------------------------------------------------------------------------- with others, and exported


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_nothing_of_them_is_exported(tmp_path: Path) -> None:
    model = manager_of().apply(Network()).eval()
    reference = Network(("one", "two.a")).eval()
    for name, network in (("ours", model), ("plain", reference)):
        export_onnx(network, X, tmp_path / f"{name}.onnx")
    assert operators(tmp_path / "ours.onnx") == operators(tmp_path / "plain.onnx")
    names = {tensor.name for tensor in onnx.load(tmp_path / "ours.onnx").graph.initializer}
    assert not [name for name in names if name.startswith("one.") or name.startswith("two.a")]


def test_it_works_with_pruning_and_quantization(tmp_path: Path) -> None:
    model = Network()
    optimizer = optimizer_of(model)
    manager = ScheduledModifierManager([
        LayerPruningModifier(layers=["one"]),
        GMPruningModifier(params=["two.a.weight"], final_sparsity=0.5, start_epoch=0.0, end_epoch=1.0,
                          update_frequency=0.5, init_sparsity=0.0),
        QuantizationModifier(start_epoch=1.0),
    ])  # fmt: skip
    manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=X)
    for _ in range(4):
        train_step(model, optimizer, X)
    manager.finalize(model)
    export_onnx(model, X, tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    assert "QuantizeLinear" in {node.op_type for node in graph.node}
    assert not [tensor.name for tensor in graph.initializer if tensor.name.startswith("one.")]


def test_a_compiled_model_is_pruned_too() -> None:
    model = Network().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    wanted = Network(("one", "two.a")).eval()(X)
    compiled(X)
    with pytest.raises(StateError, match="pass sample_inputs"):
        manager_of().modify(compiled, optimizer_of(model), steps_per_epoch=3)
    manager_of().modify(compiled, optimizer_of(model), steps_per_epoch=3, sample_inputs=X)
    assert torch.equal(compiled(X), wanted)
