"""What is quantized where, and what is not, from trace and scheme; a plan as plain data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify import export_onnx, quantize_model, verify_onnx
from sparsify.errors import StateError, TargetError
from sparsify.model.trace import trace
from sparsify.quantization.conversion import quantizers
from sparsify.quantization.forward_ops import switched_off
from sparsify.quantization.placement import make_plan
from sparsify.quantization.plan import LayerPlan, NormPlan, QuantizationPlan, QuantizerSite, apply_plan
from sparsify.quantization.scheme import NAMED, ActivationScheme, QuantizationSettings, Scheme, WeightScheme
from tests.loops import quantized
from tests.zoo.quantizable import (
    ZOO,
    BertLayer,
    DenseNet,
    InvertedResidual,
    PyramidDetector,
    ResidualNet,
    SqueezeExciteNet,
    Subclassed,
    Up,
    images,
    mlp,
)
from tests.zoo.small import written


def plan_of(model: nn.Module, *inputs: Tensor, **settings: object) -> QuantizationPlan:
    return make_plan(model, trace(model, inputs), QuantizationSettings(**settings))  # type: ignore[arg-type]


def test_sites_of_a_residual_network_are_those_that_onnxruntime_fuses() -> None:
    plan = plan_of(ResidualNet(), images())
    assert [site.name for site in plan.sites] == [
        "stem.input_quantizer",
        "relu_0_quantizer",
        "first.relu_0_quantizer",
        "first.bn2.output_quantizer",
        "first.relu_1_quantizer",
        "second.relu_0_quantizer",
        "second.bn2.output_quantizer",
        "second.relu_1_quantizer",
        "average_pool_0_quantizer",
    ]
    assert plan.folds == {
        "stem": "bn",
        "first.conv1": "first.bn1",
        "first.conv2": "first.bn2",
        "second.conv1": "second.bn1",
        "second.conv2": "second.bn2",
    }
    sources = {layer.name: layer.source for layer in plan.layers}
    assert sources["first.conv1"] == "relu_0_quantizer"
    assert sources["fc"] == "average_pool_0_quantizer"
    assert plan.left == ()


def test_an_add_without_a_relu_has_a_quantizer_of_its_own() -> None:
    plan = plan_of(InvertedResidual(), images())
    names = [site.name for site in plan.sites]
    assert "project.1.output_quantizer" in names and "again.1.output_quantizer" in names
    assert "add_0_quantizer" in names
    assert {site.ceiling for site in plan.sites if site.fused_relu} == {6.0}


def test_a_norm_that_computes_more_is_folded_and_what_it_computes_is_quantized() -> None:
    plan = plan_of(SqueezeExciteNet(), images())
    assert plan.folds == {"stem": "bn0", "expand": "bn1", "project": "bn2"}
    assert [site.name for site in plan.sites] == [
        "stem.input_quantizer",
        "bn0.act.output_quantizer",
        "bn1.output_quantizer",
        "bn1.act.output_quantizer",
        "average_pool_0_quantizer",
        "reduce.output_quantizer",
        "act.output_quantizer",
        "excite.output_quantizer",
        "gate_0_quantizer",
        "multiply_0_quantizer",
        "bn2.output_quantizer",
        "add_0_quantizer",
        "average_pool_1_quantizer",
    ]
    assert plan.left == ()


def test_layers_of_users_own_classes_are_quantized_like_those_of_torch() -> None:
    plan = plan_of(Subclassed(), images())
    layers = {layer.name: layer for layer in plan.layers}
    assert [layers[name].axis for name in ("conv", "mix", "head")] == [0, 1, 0]
    assert plan.folds == {"conv": "bn"} and plan.left == ()
    assert layers["mix"].source == "relu_0_quantizer" and layers["head"].source == "head.input_quantizer"


def test_a_tanh_between_floats_has_the_range_of_its_reader() -> None:
    plan = plan_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(2, 3))
    assert [(site.name, site.fixed) for site in plan.sites] == [
        ("0.input_quantizer", None),
        ("2.input_quantizer", None),
    ]
    plan = plan_of(nn.Sequential(nn.Conv1d(3, 4, 1), nn.Tanh(), nn.Conv1d(4, 2, 1)), torch.randn(2, 3, 5))
    assert ("1.output_quantizer", "tanh") in [(site.name, site.fixed) for site in plan.sites]


def test_in_attention_only_what_feeds_a_linear_is_quantized() -> None:
    plan = plan_of(BertLayer(), torch.randint(0, 20, (2, 5)))
    assert [(site.name, site.readers) for site in plan.sites] == [
        ("query.input_quantizer", ("key", "value")),
        ("out.input_quantizer", ()),
        ("up.input_quantizer", ()),
        ("down.input_quantizer", ()),
    ]
    assert plan.watched == {}


def test_concatenations_and_transposed_convolutions() -> None:
    plan = plan_of(Up(), images())
    layers = {layer.name: layer for layer in plan.layers}
    assert layers["up"].axis == 1 and layers["up"].norm == "bn"
    assert layers["up"].source == "concat_0_quantizer"
    assert layers["line"].source == "relu_0_quantizer"


def test_a_shared_layer_has_one_quantizer_for_all_that_it_reads_and_is_not_folded() -> None:
    model = written(
        lambda self, x: self.bn(self.conv(torch.relu(self.conv(x)))), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)
    )

    plan = plan_of(model, images())
    (layer,) = plan.layers
    assert layer.source == "conv.input_quantizer" and layer.norm is None
    # Its BatchNorm is a layer of its own, then.
    assert [(norm.name, norm.source) for norm in plan.alone] == [("bn", "conv.output_quantizer")] and plan.left == ()


def test_what_a_layer_reads_in_several_calls_lies_on_one_grid() -> None:
    plan = plan_of(PyramidDetector(), images())
    sites = {site.name: site for site in plan.sites}
    layers = {layer.name: layer for layer in plan.layers}
    assert layers["boxes.0"].source == layers["kinds.0"].source == "lateral.0.output_quantizer"
    like = "lateral.0.output_quantizer"
    assert [sites[f"lateral.{n}.output_quantizer"].shared_with for n in range(3)] == [None, like, like]
    # The ReLUs of one head come before those of the other; each head has its own grid.
    likes = [sites[f"relu_{n}_quantizer"].shared_with for n in range(6)]
    assert likes == [None, *2 * ["relu_0_quantizer"], None, *2 * ["relu_3_quantizer"]]
    assert layers["boxes.2"].source != layers["kinds.2"].source
    assert not any(site.in_place or site.producer for site in plan.sites if site.shared_with)
    # No tensor is quantized twice, and what a head gives leaves it as integers.
    assert not any(site.child == "input_quantizer" and site.module != "stem.0" for site in plan.sites)
    assert {"boxes.2.output_quantizer", "kinds.2.output_quantizer"} <= set(sites)
    assert QuantizationPlan.from_state(plan.to_state()) == plan


def test_a_layer_that_reads_the_input_too_brings_its_own_quantizer() -> None:
    model = written(
        lambda self, x: self.last(self.conv(torch.relu(self.conv(x)))),
        conv=nn.Conv2d(3, 3, 1),
        last=nn.Conv2d(3, 2, 1),
    )

    plan = plan_of(model, images())
    assert [site.name for site in plan.sites if not site.child.startswith("output")] == ["conv.input_quantizer"]
    assert {layer.name: layer.source for layer in plan.layers} == {
        "conv": "conv.input_quantizer",
        "last": "conv.output_quantizer",
    }


def test_a_product_with_what_stays_in_float_stays_there() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.relu(self.conv(x)) * torch.cos(x)
            return self.head(y), y

    plan = plan_of(Weighted(), images())
    # What is returned as well is rounded for its reader alone.
    names = {site.name for site in plan.sites}
    assert "head.input_quantizer" in names and not any("multiply" in name for name in names)


def test_a_sum_that_begins_at_zero_is_not_quantized_twice() -> None:
    """As timm's MobileOne writes its branches: x + 0 is x."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.branches = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            total: Tensor = 0  # type: ignore[assignment]
            for branch in self.branches:
                total = total + branch(x)
            return self.last(1 * total)

    model = Branches()
    plan = quantized(model, images())
    assert [site.name for site in plan.sites if site.module == ""] == ["relu_0_quantizer", "add_0_quantizer"]
    model(images())
    assert not switched_off(model)


def test_a_norm_before_its_convolution_is_a_layer_between_integers() -> None:
    plan = plan_of(DenseNet(), images())
    names = ["block.one.norm", "block.two.norm", "norm"]
    # The last concatenation stands in a container: the quantizer behind it is that of who reads it.
    sources = ["block.one.concat_0_quantizer", "block.two.concat_0_quantizer", "norm.input_quantizer"]
    assert [(norm.name, norm.source, norm.rank, norm.q_max) for norm in plan.alone] == [
        (name, source, 4, 127) for name, source in zip(names, sources, strict=True)
    ]
    assert plan.left == () and {name for name in plan.watched if name.endswith("norm")} == {"block.two.norm"}
    assert QuantizationPlan.from_state(plan.to_state()) == plan


@pytest.mark.parametrize(
    ("settings", "alone"),
    [
        (QuantizationSettings(reduce_range=True), 3),
        (QuantizationSettings(ignore=("norm",)), 2),
        (QuantizationSettings(overrides={"norm": None}), 2),
        (QuantizationSettings(overrides={"norm": Scheme(weights=None)}), 2),
        (QuantizationSettings(ignore=("BatchNorm2d",)), 0),
        (QuantizationSettings(ignore=("block.two",)), 1),
        (QuantizationSettings(scheme=Scheme(weights=None)), 0),
        (QuantizationSettings(scheme=Scheme(input_activations=None)), 0),
    ],
)
def test_a_norm_stays_in_float_where_the_recipe_says_so(settings: QuantizationSettings, alone: int) -> None:
    model = DenseNet()
    plan = make_plan(model, trace(model, (images(),)), settings)
    assert len(plan.alone) == alone
    assert all(norm.q_max == (63 if settings.reduce_range else 127) for norm in plan.alone)


def test_norms_of_rows_or_without_statistics_stay_in_float() -> None:
    rows = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    moving = nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4, track_running_stats=False))
    for model in (rows, moving):
        assert plan_of(model, images()).alone == ()


def test_what_is_left_in_float_is_named_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 4)
            self.scaled = Scaled(4, 4)
            self.sub = Sub(4, 4)
            self.normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_zero_attn=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(*[self.normed(self.scaled(self.sub(self.used(x))))] * 3)[0]

    class Sub(nn.Linear):
        pass

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight * 2.0, self.bias)

    plan = plan_of(Odd(), torch.randn(2, 3, 4))
    why = {left.what: left.why for left in plan.left}
    assert why["unused"] == "was not called on the example inputs"
    assert why["scaled"] == "what Scaled computes is not one operation on its weight and bias"
    assert "recomputed before every forward" in why["normed"]
    assert "add_zero_attn" in why["attention"]
    assert [layer.name for layer in plan.layers] == ["used", "sub"]
    assert "unused: was not called" in str(plan)


@pytest.mark.parametrize("ignore", [("first",), ("re:first",), ("ResidualBlock",)])
def test_ignore_leaves_a_layer_and_all_below_it_in_float(ignore: tuple[str, ...]) -> None:
    plan = plan_of(ResidualNet(), images(), ignore=ignore)
    names = {layer.name for layer in plan.layers}
    assert not any(name.startswith("first") for name in names)
    assert not any(site.module.startswith("first") for site in plan.sites)
    assert ("second.conv1" in names) == (ignore != ("ResidualBlock",))
    assert any(left.why == "left out by the recipe" for left in plan.left)


def test_ignoring_relus_quantizes_at_the_layer_that_reads() -> None:
    plan = plan_of(mlp(), torch.randn(4, 6), ignore=("ReLU",))
    assert all(site.child == "input_quantizer" for site in plan.sites)
    assert len(plan.sites) == 3


def test_within_quantizes_only_there() -> None:
    plan = plan_of(ResidualNet(), images(), within=("second",))
    assert {layer.name for layer in plan.layers} == {"second.conv1", "second.conv2"}


def test_overrides_by_name_beat_those_by_type_and_fill_in_the_rest() -> None:
    settings = QuantizationSettings(
        overrides={
            "Conv2d": Scheme(weights=WeightScheme(num_bits=4)),
            "stem": Scheme(input_activations=None),
            "fc": None,
        }
    )
    model = ResidualNet()
    plan = make_plan(model, trace(model, (images(),)), settings)
    layers = {layer.name: layer for layer in plan.layers}
    assert "fc" not in layers
    assert layers["first.conv1"].q_max == 7
    assert layers["stem"].source is None and layers["stem"].q_max == 127


def test_tensorrt_reduce_range_and_one_scale() -> None:
    plan = plan_of(mlp(), torch.randn(4, 6), scheme=NAMED["tensorrt"], reduce_range=True)
    assert all(site.symmetric for site in plan.sites)
    assert {layer.q_max for layer in plan.layers} == {63}
    one = Scheme(weights=WeightScheme(strategy="tensor"))
    assert {layer.axis for layer in plan_of(mlp(), torch.randn(4, 6), scheme=one).layers} == {None}


def test_weights_alone_and_outputs_as_well() -> None:
    weights = plan_of(ResidualNet(), images(), scheme=Scheme(input_activations=None))
    assert weights.sites == () and len(weights.layers) == 6
    outputs = plan_of(mlp(), torch.randn(4, 6), scheme=Scheme(output_activations=ActivationScheme()))
    assert "6.output_quantizer" in [site.name for site in outputs.sites]


def test_a_name_that_matches_nothing_is_an_error_unless_not_strict() -> None:
    with pytest.raises(TargetError, match=r"quantize\.ignore: 'frist'"):
        plan_of(ResidualNet(), images(), ignore=("frist",))
    with pytest.warns(UserWarning, match="frist"):
        plan_of(ResidualNet(), images(), ignore=("frist",), strict=False)


def test_containers_do_not_get_quantizers_among_their_layers() -> None:
    class Listing(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            found = [torch.relu(layer(x)) for layer in self.values()]
            return torch.cat(found, 1)

    model = nn.Sequential(Listing({"a": nn.Conv2d(3, 2, 1), "b": nn.Conv2d(3, 2, 1)}), nn.Conv2d(4, 2, 1))
    quantized(model, images())
    assert list(model[0]) == ["a", "b"]
    model(images())


def test_a_saved_plan_keeps_its_keys() -> None:
    site = QuantizerSite("conv", "output_quantizer", 8, False, 0.01, fused_relu=True, shared_with="other")
    plan = QuantizationPlan(
        layers=(LayerPlan("conv", 0, 127, None, None),), sites=(site,), alone=(NormPlan("bn", "site", 4, 63),)
    )
    state = plan.to_state()
    # As the first release wrote them; the fields have other names since.
    assert state["layers"][0]["largest"] == 127 and state["alone"][0]["largest"] == 63
    assert state["sites"][0]["relu"] is True and state["sites"][0]["like"] == "other"
    assert not {"q_max", "fused_relu", "shared_with"} & {*state["layers"][0], *state["sites"][0], *state["alone"][0]}
    assert QuantizationPlan.from_state(state) == plan


@pytest.mark.parametrize("name", ZOO)
def test_a_plan_survives_as_plain_data_and_rebuilds_a_fresh_model(name: str) -> None:
    build, batch = ZOO[name]
    model, inputs = build(), batch()
    plan = quantized(model, inputs)
    again = QuantizationPlan.from_state(json.loads(json.dumps(plan.to_state())))
    assert again == plan
    model(inputs)
    fresh = build()
    apply_plan(fresh, again)
    fresh.load_state_dict(model.state_dict())
    assert [type(m) for m in fresh.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(fresh.eval()(inputs), model.eval()(inputs))
    assert len(list(quantizers(fresh))) == sum(site.shared_with is None for site in plan.sites)


def test_a_plan_of_another_model_is_refused_before_anything_changes() -> None:
    plan = plan_of(ResidualNet(), images())
    other = mlp()
    types = [type(module) for module in other.modules()]
    with pytest.raises(StateError, match="does not have"):
        apply_plan(other, plan)
    assert [type(module) for module in other.modules()] == types
    twice = ResidualNet()
    apply_plan(twice, plan)
    with pytest.raises(StateError, match="quantized already"):
        apply_plan(twice, plan)


@pytest.mark.parametrize("state", [{}, {"format": 99}, {"format": 1, "layers": [{}]}, {"format": 1, "layers": 3}])
def test_a_state_that_holds_no_plan_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(StateError, match=r"plan"):
        QuantizationPlan.from_state(state)


def test_a_convolution_read_by_others_is_not_folded_but_works() -> None:
    class Leaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.bn(y), y

    model = Leaks()
    plan = quantized(model, images())
    assert plan.folds == {}
    assert [norm.name for norm in plan.alone] == ["bn"] and plan.left == ()
    model(images())
    model.eval()
    normed, y = model(images())
    with torch.no_grad():
        assert torch.equal(normed, model.bn(y)) and normed.any()


def test_the_trace_and_the_settings_are_all_that_a_plan_depends_on() -> None:
    torch.manual_seed(0)
    first = plan_of(ResidualNet(), images())
    torch.manual_seed(1)
    model = ResidualNet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    assert plan_of(model, images()) == first


def test_weight_only_leaves_what_layers_read_in_float() -> None:
    plan = plan_of(mlp(), torch.randn(4, 6), scheme=NAMED["weight_only"])
    assert not plan.sites and [layer.q_max for layer in plan.layers] == [127] * 3
    assert NAMED["onnxruntime"] == NAMED["default"]


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_that_reads_a_parameter_is_quantized(bits: int, tmp_path: Path) -> None:
    class Learned(nn.Module):
        """Queries that learn, through a layer of their own."""

        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(3, 8))
            self.own, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (self.own(self.queries) @ self.key(x).transpose(-2, -1)).softmax(-1) @ x

    torch.manual_seed(0)
    model, x = Learned(), torch.randn(2, 5, 8)
    found = quantize_model(model, [x], least_samples=2, scheme={"weights": {"num_bits": bits}})
    assert [layer.name for layer in found.plan.layers] == ["own", "key"] and not found.plan.left
    assert found.plan.layers[0].source == "own.input_quantizer"
    torch.testing.assert_close(found.model(x), model(x), rtol=0.2, atol=0.2)
    file = export_onnx(found.model, x, tmp_path / "learned.onnx")
    assert verify_onnx(found.model, file.path, x).ok
