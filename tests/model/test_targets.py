"""Names -> parameters and layers, over every form a recipe may use."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from sparsify.errors import DataError, SparsifyWarning, TargetError
from sparsify.model import targets
from sparsify.model.targets import named_modules, named_parameters, resolve_layers, resolve_parameters
from sparsify.model.wrappers import clean_name
from tests.zoo.quantizable import Conv1D

WHERE = "GMPruningModifier.params"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8, bias=False)])
        self.embedding = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 10)
        self.head.weight = self.embedding.weight  # tied


class QuantizedLinear(nn.Linear):
    """Stands for a layer that was converted in place, with a quantizer as a child."""


def names(model: nn.Module, said: str | list[str], **options: object) -> list[str]:
    return list(resolve_parameters(model, said, where=WHERE, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("conv1.weight", ["conv1.weight"]),
        ("conv1", ["conv1.weight"]),
        (["layers.1", "conv1.bias"], ["conv1.bias", "layers.1.weight"]),
        ("re:layers.*weight", ["layers.0.weight", "layers.1.weight"]),
        (r"re:layers\.\d$", ["layers.0.weight", "layers.1.weight"]),
        ("re:ayers.*weight$|conv1.w", ["conv1.weight"]),
        ("Linear", ["layers.0.weight", "layers.1.weight", "embedding.weight"]),
        ("Conv2d", ["conv1.weight"]),
        ("BatchNorm2d", ["bn.weight"]),
        ("embedding.weight", ["embedding.weight"]),
        ("head.weight", ["embedding.weight"]),
        ("head", ["embedding.weight"]),
        (["head", "embedding"], ["embedding.weight"]),
        ("__ALL_PRUNABLE__", ["conv1.weight", "layers.0.weight", "layers.1.weight", "embedding.weight"]),
        ("module.conv1.weight", ["conv1.weight"]),
        (r"re:module\.layers.*weight", ["layers.0.weight", "layers.1.weight"]),
        (r"re:module.layers\.\d$", ["layers.0.weight", "layers.1.weight"]),
    ],
)
def test_every_form_of_a_name_finds_its_parameters(said: str | list[str], expected: list[str]) -> None:
    assert names(Net(), said) == expected


def test_all_means_every_parameter_once() -> None:
    model = Net()
    found = resolve_parameters(model, "__ALL__", where=WHERE)
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert len({id(p) for p in found.values()}) == len(found)


@pytest.mark.parametrize("said", ["Linear", "__ALL_PRUNABLE__", "weight"])
def test_a_model_that_is_one_layer_is_found_too(said: str) -> None:
    model = nn.Linear(2, 2)
    assert names(model, said) == ["weight"] == names(nn.DataParallel(model), said)
    with pytest.raises(TargetError, match="'' matches nothing"):
        names(model, "")


@pytest.mark.parametrize("said", ["re:m", "re:mod.*weight", "re:my_module.conv1"])
def test_a_pattern_means_a_wrapper_only_by_its_whole_name(said: str) -> None:
    with pytest.raises(TargetError, match="matches nothing"):
        names(Net(), said)


def test_a_misspelled_keyword_is_shown_the_right_one() -> None:
    with pytest.raises(TargetError, match="Closest: '__ALL_PRUNABLE__', '__ALL__'"):
        names(Net(), "__ALL_PRUNEABLE__")


def test_ignore_takes_names_out_again() -> None:
    assert names(Net(), "__ALL_PRUNABLE__", ignore=["Conv2d", "re:layers.0", "nothing.like.it"]) == [
        "layers.1.weight",
        "embedding.weight",
    ]


def test_wrappers_are_transparent() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    for wrapped in (nn.DataParallel(model), compiled, nn.DataParallel(compiled)):
        assert list(named_parameters(wrapped)) == list(named_parameters(model))
        assert list(named_modules(wrapped)) == list(named_modules(model))
        assert named_modules(wrapped)["conv1"] is model.conv1
        assert names(wrapped, "conv1") == ["conv1.weight"]
    model.layers[0] = torch.compile(model.layers[0], backend="eager")  # type: ignore[assignment]
    assert "layers.0.weight" in named_parameters(model)
    assert isinstance(named_modules(model)["layers.0"], nn.Linear)


def test_only_whole_components_are_prefixes() -> None:
    assert clean_name("my_module.module.a.weight") == "my_module.a.weight"


def test_a_user_s_own_layer_called_module_does_not_hide_another() -> None:
    model = nn.Module()
    model.fc = nn.Linear(2, 2, bias=False)
    model.module = nn.Module()
    model.module.fc = nn.Linear(2, 2, bias=False)
    found = named_parameters(model)
    assert len(found) == 2
    assert found["fc.weight"] is model.fc.weight
    assert found["module.fc.weight"] is model.module.fc.weight


def test_conv1d_of_transformers_is_prunable_by_its_class_name() -> None:
    model = nn.Sequential(Conv1D(6, 4))
    assert names(model, "__ALL_PRUNABLE__") == ["0.weight"] == names(model, "Conv1D")
    assert targets.input_dim(model[0]) == 0


def test_a_converted_layer_is_found_under_both_types() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].__class__ = QuantizedLinear
    model[0].quantizer = nn.Identity()
    assert names(model, "__ALL_PRUNABLE__") == names(model, "Linear") == names(model, "QuantizedLinear") == ["0.weight"]
    assert list(resolve_layers(model, "__ALL__", where=WHERE)) == ["0"]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("conv1", ["conv1"]),
        ("conv1.weight", ["conv1"]),
        ("re:layers", ["layers", "layers.0", "layers.1"]),
        ("Linear", ["layers.0", "layers.1", "head"]),
        ("__ALL__", ["conv1", "bn", "layers.0", "layers.1", "embedding", "head"]),
        ("__ALL_PRUNABLE__", ["conv1", "layers.0", "layers.1", "embedding", "head"]),
    ],
)
def test_layers_are_found_the_same_ways(said: str, expected: list[str]) -> None:
    assert list(resolve_layers(Net(), said, where=WHERE)) == expected


def test_a_name_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(TargetError) as caught:
        names(Net(), "conv1.weigth")
    assert str(caught.value).startswith(
        "GMPruningModifier.params: 'conv1.weigth' matches nothing in Net.\n  Closest: 'conv1.weight'"
    )
    assert str(caught.value).endswith("Use 're:...' for a regular expression.")


@pytest.mark.parametrize("said", ["", "nothing", "re:zzz.*", "ReLU", "conv1.weight.data", "weight"])
def test_nothing_is_an_error_unless_the_switch_is_off(said: str) -> None:
    with pytest.raises(TargetError, match="matches nothing"):
        names(Net(), said)
    with pytest.warns(SparsifyWarning, match="matches nothing"):
        assert names(Net(), [said, "conv1"], strict=False) == ["conv1.weight"]


def test_a_broken_pattern_is_a_target_error() -> None:
    with pytest.raises(TargetError, match=r"'re:\(' is no regular expression"):
        names(Net(), "re:(")


def test_a_layer_without_a_weight_says_so() -> None:
    with pytest.raises(TargetError, match=r"'layers' is a ModuleList without a weight.*'layers.0.weight'"):
        names(Net(), "layers")


def test_weights_that_cannot_be_ranked_are_refused_by_name() -> None:
    def refuse(model: nn.Module) -> None:
        targets.refuse_unusable(named_parameters(model), where=WHERE)

    with pytest.raises(TargetError, match=r"GMPruningModifier.params: '0.weight' has no shape yet"):
        refuse(nn.Sequential(nn.LazyLinear(3)))
    for dtype in (torch.int8, torch.float8_e4m3fn):
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(4).to(dtype), requires_grad=False)
        with pytest.raises(TargetError, match=f"'w' is {str(dtype)[6:]}; only float16"):
            refuse(model)
    for value in (float("nan"), float("inf"), float("-inf")):
        linear = nn.Linear(3, 3)
        linear.weight.data[1, 1] = value
        with pytest.raises(DataError, match="'weight' holds NaN or infinity"):
            refuse(linear)
    huge = nn.Linear(3, 3).double()
    huge.weight.data.fill_(1e308)  # their sum overflows, they do not
    refuse(huge)


def test_resolving_touches_nothing() -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    resolve_parameters(model, "__ALL__", where=WHERE)
    resolve_layers(model, "__ALL__", where=WHERE)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert list(before) == list(model.state_dict())


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, -2.0], True),
        ([], True),
        ([1.0, float("nan")], False),
        ([float("inf"), 1.0], False),
        # Their sum is NaN, and that of the next overflows: neither tells by itself.
        ([float("inf"), float("-inf")], False),
        ([1.7e308, 1.7e308], True),
    ],
)
def test_values_are_finite_or_not(values: list[float], finite: bool) -> None:
    assert targets.is_finite(torch.tensor(values, dtype=torch.float64)) is finite
    assert targets.is_finite(nn.Parameter(torch.tensor(values, dtype=torch.float64))) is finite


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64])
def test_values_that_are_no_floats_are_looked_at_one_by_one(dtype: torch.dtype) -> None:
    assert targets.is_finite(torch.ones(3).to(dtype))
    assert not targets.is_finite(torch.tensor([complex(0.0, float("nan"))]))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTM(4, 5, 2), nn.GRU(4, 4), nn.RNN(4, 4)
        self.cell = nn.LSTMCell(3, 3)
        self.several = nn.ParameterList([nn.Parameter(torch.randn(3, 3)) for _ in range(2)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(3, 3))})
        self.attention = nn.MultiheadAttention(4, 2)
        self.bare = nn.ReLU()


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("LSTM", "'lstm.weight_ih_l0', 'lstm.weight_hh_l0', 'lstm.weight_ih_l1', 'lstm.weight_hh_l1', 'lstm.bias_ih"),
        ("GRU", "'gru.weight_ih_l0', 'gru.weight_hh_l0', 'gru.bias_ih_l0'"),
        ("RNN", "'rnn.weight_ih_l0'"),
        ("RNNBase", "'lstm.weight_ih_l0'"),
        ("LSTMCell", "'cell.weight_ih', 'cell.weight_hh'"),
        ("ParameterList", "'several.0', 'several.1', or several by a pattern, like 're:several\\..*'"),
        ("ParameterDict", "'named.a'"),
        ("MultiheadAttention", "'attention.in_proj_weight', 'attention.out_proj.weight'"),
        ("lstm", "'lstm.weight_ih_l0', 'lstm.weight_hh_l0'"),
        ("several", "'several.0', 'several.1'"),
    ],
)
def test_a_layer_without_a_weight_of_its_own_names_its_parameters(said: str, names: str) -> None:
    model = Recurrent()
    with pytest.raises(TargetError) as caught:
        resolve_parameters(model, said, where="GMPruningModifier.params")
    text = str(caught.value)
    assert f"Name the parameters, like {names}" in text and "Closest" not in text
    pattern = re.findall(r"'(re:[^']*)'", text)[0]
    assert resolve_parameters(model, pattern, where="x")
    with (
        pytest.warns(SparsifyWarning, match="Name the parameters") if said[0].isupper() else pytest.raises(TargetError)
    ):
        resolve_parameters(model, said, where="x", strict=False)


def test_a_model_that_is_a_recurrent_layer_and_a_layer_without_parameters_are_told_apart() -> None:
    with pytest.raises(TargetError, match=r"the type of the model itself.*'weight_ih_l0'.*'re:weight.*'"):
        resolve_parameters(nn.LSTM(2, 3), "LSTM", where="x")
    with pytest.raises(TargetError, match=r"'ReLU' is the type of 'bare'.*There is no parameter inside"):
        resolve_parameters(Recurrent(), "ReLU", where="x")
