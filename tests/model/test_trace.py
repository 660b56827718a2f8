"""The traced view of a model: what it says of it, and that the model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.errors import ArgumentError
from sparsify.model.trace import trace
from tests.zoo.quantizable import ResidualBlock
from tests.zoo.small import Branching, Tied, written


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = ResidualBlock(bias=True)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.max_pool2d(self.block(x), 2)
        return {"logits": self.fc(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1))), "features": x}


def test_nodes_name_their_module_parameters_and_shape() -> None:
    seen = trace(Small(), (torch.randn(2, 4, 8, 8),))
    convs = [node for node in seen.nodes if node.kind == "conv"]
    assert [node.owner for node in convs] == ["block.conv1", "block.conv2"]
    assert convs[0].parameters == ("block.conv1.weight", "block.conv1.bias")
    assert convs[0].shape == (2, 4, 8, 8)
    assert [node.kind for node in seen.of_module("block")] == ["add"]
    assert [node.op for node in seen.of_module("block.relu")] == ["relu_", "relu_"]
    assert [node.stack[-1].number for node in seen.of_module("block.relu")] == [0, 1]
    assert seen.calls["block.relu"] == 2


def test_values_are_followed_through_data_movement_and_max_pooling() -> None:
    seen = trace(Small(), (torch.randn(2, 4, 8, 8),))
    (pool,) = (node for node in seen.nodes if node.kind == "max_pool")
    last_relu = seen.of_module("block.relu")[1]
    assert seen.root(pool.name) == last_relu.name
    assert seen.leaves(last_relu.name)
    assert [node.kind for node in seen.users(last_relu.name)] == ["average_pool"]
    (linear,) = (node for node in seen.nodes if node.kind == "linear")
    assert seen.by_name[seen.root(linear.inputs[0])].kind == "average_pool"


def test_pairs_of_convolution_and_batch_norm_say_why_not() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.bn = nn.BatchNorm2d(4)
            self.other = nn.Conv2d(4, 4, 1)
            self.last = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.last(self.other(self.bn(y) + y))

    pairs = {pair.layer: pair for pair in trace(Shared(), (torch.randn(1, 4, 4, 4),)).pairs}
    assert pairs["other"].why_not is None
    assert "also read by add" in str(pairs["conv"].why_not)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_the_random_state_and_the_buffers_stay_as_they_were(training: bool) -> None:
    model = Small().train(training)
    model.block.bn2.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    trace(model, (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_shared_module_is_told_apart_by_its_calls() -> None:
    block = ResidualBlock(bias=True)
    seen = trace(nn.Sequential(block, block), (torch.randn(1, 4, 4, 4),))
    adds = [node for node in seen.nodes if node.kind == "add"]
    assert [node.owner for node in adds] == ["0", "0"]
    assert [node.stack[-1].number for node in adds] == [0, 1]


def test_names_are_clean_of_wrappers() -> None:
    wrapper = written(lambda self, x: self._orig_mod(x), _orig_mod=nn.Linear(3, 2))

    (linear,) = (n for n in trace(nn.Sequential(wrapper), (torch.randn(1, 3),)).nodes if n.kind == "linear")
    assert linear.owner == "0"
    assert linear.parameters == ("0.weight", "0.bias")


def test_a_model_that_cannot_be_traced_is_named_with_the_place_in_its_code() -> None:

    model = Branching()
    with pytest.raises(ArgumentError, match=r"Branching cannot be traced on these inputs in forward \(small.py"):
        trace(model, (torch.randn(3),))
    assert model.training


def test_inputs_that_do_not_fit_are_an_argument_error() -> None:
    with pytest.raises(ArgumentError, match="sample_inputs"):
        trace(nn.Linear(3, 2), (torch.randn(1, 5),))


def test_a_tied_parameter_has_its_first_name() -> None:

    seen = trace(Tied(5, 4), (torch.tensor([[1, 2]]),))
    (linear,) = (node for node in seen.nodes if node.kind == "linear")
    assert linear.parameters == ("embed.weight",)
