"""Layers converted in place: what stays, what works on, what can be undone, what the user's own operations become."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparsify
from sparsify.errors import SparsifyWarning
from sparsify.quantization.calibration import calibrate
from sparsify.quantization.conversion import freeze_norms, original_type, quantized_layers, quantizers, weight_bits
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.fake_quantize import FakeQuantize
from sparsify.quantization.forward_ops import Watched, switched_off
from sparsify.quantization.layers import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from sparsify.quantization.plan import is_quantized, undo_plan
from sparsify.quantization.scheme import QuantizationSettings, Scheme
from sparsify.quantization.wiring import wiring_of
from tests.loops import quantized, quantized_and_trained, train
from tests.zoo.quantizable import ZOO, BertLayer, ResidualBlock, ResidualNet, SqueezeExciteNet, images


@pytest.mark.parametrize("name", ZOO)
def test_parameters_stay_the_same_objects_and_the_state_dict_only_gains_keys(name: str) -> None:
    build, batch = ZOO[name]
    model = build()
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    quantized(model, batch())
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    state = model.state_dict()
    assert [key for key in state if key in keys] == keys
    assert all("_quantizer." in key for key in state if key not in keys)
    assert all(isinstance(value, Tensor) for value in state.values())


@pytest.mark.parametrize("name", ZOO)
def test_undo_gives_back_classes_keys_and_values(name: str) -> None:
    build, batch = ZOO[name]
    model = build().eval()
    inputs = batch()
    types = {n: type(module) for n, module in model.named_modules()}
    attributes = {n: set(vars(module)) for n, module in model.named_modules()}
    expected = model(inputs)
    quantized(model, inputs)
    assert is_quantized(model)
    undo_plan(model)
    assert not is_quantized(model)
    assert {n: type(module) for n, module in model.named_modules()} == types
    assert {n: set(vars(module)) for n, module in model.named_modules()} == attributes
    assert torch.equal(model(inputs), expected)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_go_their_own_way(name: str, how: str) -> None:
    model, inputs = quantized_and_trained(name)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    state = torch.get_rng_state()
    losses = train(model, inputs, 2)
    torch.set_rng_state(state)
    assert train(other, inputs, 2) == losses
    assert torch.equal(model.eval()(inputs), other.eval()(inputs))
    mine = {id(q) for q in quantizers(model)}
    assert not any(id(q) in mine for q in quantizers(other))
    for module in other.modules():
        wiring = vars(module).get("_wiring")
        assert wiring is None or wiring.source is None or id(wiring.source) not in mine


def test_a_quantized_layer_is_still_one_of_its_kind() -> None:
    model = ResidualNet()
    quantized(model, images())
    assert type(model.fc) is QuantizedLinear and isinstance(model.fc, nn.Linear)
    assert type(model.stem) is QuantizedConv2d and isinstance(model.stem, nn.Conv2d)
    assert isinstance(model.first, ResidualBlock) and isinstance(model.first, Watched)


def test_links_of_converted_layers_are_read_in_their_room_alone() -> None:
    root = Path(sparsify.__file__).parent
    private = re.compile(r"\b_wiring\b|\._counts\b|\._off\b|_unquantized\b|_left_in_float\b")
    readers = {path.relative_to(root).as_posix() for path in root.rglob("*.py") if private.search(path.read_text())}
    assert readers and not {name for name in readers if not name.startswith("quantization/")}


def test_a_switched_off_layer_keeps_its_bits_for_later_and_computes_in_float() -> None:
    layer = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(3, 8)
    exact = layer(x)
    quantized(layer, x, settings=QuantizationSettings(scheme=Scheme(input_activations=None)))
    (name, linear), *others = quantized_layers(layer)
    assert (name, weight_bits(linear), original_type(linear), others) == ("0", 8, nn.Linear, [])
    wiring = wiring_of(linear)
    rounded = layer(x)
    wiring.enabled = False
    assert wiring.bits == 8 and wiring.q_max == 127 and weight_bits(linear) == 0 and not list(quantized_layers(layer))
    assert torch.equal(layer(x), exact) and torch.equal(layer.eval()(x), exact)
    wiring.enabled = True
    assert torch.equal(layer.train()(x), rounded) and not torch.equal(rounded, exact)


def test_undoing_a_plan_leaves_nothing_behind() -> None:
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 4, 16)
    before = {name: set(vars(module)) | set(module._modules) for name, module in model.named_modules()}
    types = {name: type(module) for name, module in model.named_modules()}
    quantized(model, x)
    assert model.activation_relu_or_gelu == 0
    undo_plan(model)
    assert {name: set(vars(module)) | set(module._modules) for name, module in model.named_modules()} == before
    assert {name: type(module) for name, module in model.named_modules()} == types
    assert model.activation_relu_or_gelu == 1


def test_hooks_of_the_user_go_on_working() -> None:
    model = ResidualNet()
    seen: list[str] = []
    model.fc.register_forward_hook(lambda *_: seen.append("fc"))
    model.first.register_forward_hook(lambda *_: seen.append("first"))
    quantized(model, images())
    model(images())
    assert seen[-2:] == ["first", "fc"]


def test_what_a_hook_kept_of_a_batch_norm_is_not_overwritten_by_the_relu() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    quantized(model, images())
    model(images())
    kept: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: kept.append(output))
    model(images())
    assert kept[0].min() < 0


def test_one_quantizer_a_tensor_in_a_residual_block() -> None:
    model = ResidualNet()
    quantized(model, images())
    assert [name for name, module in model.first.named_children() if isinstance(module, FakeQuantize)] == [
        "relu_0_quantizer",
        "relu_1_quantizer",
    ]
    assert "output_quantizer" in dict(model.first.bn2.named_children())
    assert not isinstance(dict(model.first.bn1.named_children()).get("output_quantizer"), FakeQuantize)


def test_values_between_layers_lie_on_the_grids() -> None:
    model, inputs = quantized_and_trained("residual")
    model.eval()
    got: dict[str, Tensor] = {}
    for name in ("conv1", "conv2"):
        getattr(model.second, name).register_forward_pre_hook(
            lambda module, args, name=name: got.update({name: args[0]})
        )
    model(inputs)
    for name, x in got.items():
        source = getattr(model.second, name)._wiring.source
        steps = x / source.scale
        assert torch.allclose(steps, steps.round(), atol=1e-4)
        assert steps.min() >= 0 and steps.max() <= 255


def test_operations_of_children_are_not_taken_for_the_parents() -> None:
    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.inner = Inner()
            self.other, self.last = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            # Also read in float, so that nothing is quantized where it is made.
            return self.last(self.conv(x) + self.conv_of(y)) * y.mean()

        def conv_of(self, y: Tensor) -> Tensor:
            return self.other(y)

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            # Twice as many adds in training as in the trace: nobody's business here.
            return x + 1.0 + 1.0 if self.training else x + 1.0

    model = Parent()
    plan = quantized(model, images())
    assert "add" in plan.watched[""]
    model.train()(images())
    assert switched_off(model) == []


def test_activations_that_stay_in_float_are_not_counted_as_their_callers() -> None:
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Linear(4, 4)
            self.relu, self.silu = nn.ReLU(), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x) + self.b(x)).mean((2, 3))
            return self.silu(self.relu(self.fc(x)))

    model = Tail()
    plan = quantized(model, images())
    assert not {site.module for site in plan.sites} & {"relu", "silu"}
    model(images()).sum().backward()
    assert switched_off(model) == []


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_functions_are_found_before_training() -> None:
    @torch.jit.script
    def both(a: Tensor, b: Tensor) -> Tensor:
        return torch.relu(a + b)

    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)
            self.b = nn.Conv2d(3, 4, 1)
            self.c = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.a(x)) + both(self.a(x), self.b(x)))

    model = Scripted()
    try:
        with pytest.warns(SparsifyWarning, match="stay in float"):
            quantized(model, images())
    except pytest.fail.Exception:
        pytest.skip("this torch does not trace into scripted functions")
    assert switched_off(model) == [""]
    model(images()).sum().backward()


@pytest.mark.parametrize("statement", ["out.add_(y)", "torch.add(out, y, out=out)", "out += y"])
def test_in_place_adds_write_what_was_quantized(statement: str) -> None:
    namespace: dict[str, Any] = {"torch": torch, "nn": nn}
    exec(
        "class Adds(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = nn.Conv2d(3, 4, 1)\n"
        "        self.b = nn.Conv2d(3, 4, 1)\n"
        "        self.c = nn.Conv2d(4, 2, 1)\n"
        "    def forward(self, x):\n"
        "        out = self.a(x)\n"
        "        y = self.b(x)\n"
        f"        {statement}\n"
        "        return self.c(out)\n",
        namespace,
    )
    model = namespace["Adds"]()
    plan = quantized(model, images())
    if not any(site.child == "add_0_quantizer" for site in plan.sites):
        pytest.skip("the trace does not follow this form")
    with torch.no_grad():
        model(images())
    model.eval()
    got: list[Tensor] = []
    model.c.register_forward_pre_hook(lambda module, args: got.append(args[0]))
    with torch.no_grad():
        model(images())
    steps = got[0] / model.add_0_quantizer.scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_a_norm_that_computes_more_trains_as_before_and_keeps_frozen_statistics() -> None:
    torch.manual_seed(0)
    model, inputs = SqueezeExciteNet(), images()
    twin = copy.deepcopy(model)
    quantized(model, inputs)
    for quantizer in quantizers(model):
        quantizer.enabled = False
    # 2^-15 of a weight's range: nothing to see, and training is the float model's.
    for layer in (module for module in model.modules() if isinstance(module, QuantizedLayer)):
        layer._wiring.q_max = 2**15 - 1
    torch.testing.assert_close(model(inputs), twin(inputs), rtol=1e-3, atol=1e-3)
    for name in ("bn0", "bn1", "bn2"):
        torch.testing.assert_close(getattr(model, name).running_var, getattr(twin, name).running_var, rtol=1e-3, atol=0)
    freeze_norms(model, True)
    before = model.bn1.running_mean.clone()
    model(inputs * 3).sum().backward()
    assert torch.equal(model.bn1.running_mean, before) and model.bn1.weight.grad is not None
    again = pickle.loads(pickle.dumps(model))
    assert type(again.bn1) is type(model.bn1) and again.bn1._wiring.layer is again.expand
    undo_plan(model)
    assert type(model.bn1) is type(twin.bn1) and list(model.state_dict()) == list(twin.state_dict())


def test_a_layer_that_does_something_else_in_training_stays_in_float_and_says_so() -> None:
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight + 0.1 * torch.randn_like(self.weight) if self.training else self.weight
            return F.linear(x, weight, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(Noisy(4, 8), nn.ReLU(), nn.Linear(8, 2))
    inputs = torch.randn(6, 4)
    quantized(model, inputs)
    with pytest.warns(SparsifyWarning, match=r"Noisy\.forward computed 0 layers, where its trace has 1 layer"):
        model(inputs)
    assert switched_off(model) == ["0"]
    model(inputs).sum().backward()
    model.eval()
    assert torch.equal(model[0](inputs), F.linear(inputs, model[0].weight, model[0].bias))
    deployed = deployment_copy(model)
    assert torch.equal(deployed(inputs), model(inputs)) and not hasattr(deployed[0], "weight_int8")


def test_a_norm_that_never_calls_batch_norm_is_not_folded() -> None:
    class ByHand(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return torch.batch_norm(
                *(x, self.weight, self.bias, self.running_mean, self.running_var),
                *(self.training, 0.1, self.eps, False),
            )

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), ByHand(4))
    with torch.no_grad():
        model[1].running_mean.fill_(0.5)
    float_model = copy.deepcopy(model).eval()
    inputs = images()
    with pytest.warns(SparsifyWarning, match="ByHand"):
        plan = quantized(model, inputs)
    assert plan.folds == {"0": "1"} and switched_off(model) == ["1"]
    calibrate(model, [inputs])
    torch.testing.assert_close(model.eval()(inputs), float_model(inputs), rtol=0.1, atol=0.1)
    assert torch.equal(deployment_copy(model)(inputs), model(inputs))


GATES = [
    nn.Sigmoid(),
    *(gate(inplace=inplace) for gate in (nn.SiLU, nn.Hardswish, nn.Hardsigmoid) for inplace in (False, True)),
]


@pytest.mark.parametrize("activation", GATES, ids=str)
def test_activations_with_a_gate_have_gradients_as_without_quantizers(activation: nn.Module) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.act = copy.deepcopy(activation)

        def forward(self, x: Tensor) -> Tensor:
            # Called twice: a function of its owner, not a module's own.
            x = self.act(self.a(x))
            y = self.b(x)
            y = y * torch.sigmoid(y)
            return self.act(y) + x

    torch.manual_seed(0)
    model, inputs = Functional(), images()
    twin = copy.deepcopy(model)
    names = [site.name for site in quantized(model, inputs).sites]
    assert {"gate_0_quantizer", "gate_1_quantizer", "gate_2_quantizer", "multiply_0_quantizer"} <= set(names)
    for each in (model, twin):
        each(inputs).square().sum().backward()
    for got, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert got.grad is not None and expected.grad is not None
        assert ((got.grad - expected.grad).norm() / expected.grad.norm()).item() < 0.1


def test_activation_checkpointing_sees_what_the_first_forward_saw() -> None:
    class Checkpointed(ResidualNet):
        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.relu(self.bn(self.stem(x))), 2)
            for block in (self.first, self.second):
                x = checkpoint(block, x, use_reentrant=False) if self.training else block(x)
            return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    inputs = images()
    losses = []
    for cls in (ResidualNet, Checkpointed):
        torch.manual_seed(0)
        model = cls()
        quantized(model, inputs)
        losses.append(train(model, inputs, 5))
        ranges = {name: value for name, value in model.state_dict().items() if "_quantizer" in name}
        losses.append(ranges)  # type: ignore[arg-type]
    assert losses[0] == losses[2]
    assert all(torch.equal(losses[1][name], value) for name, value in losses[3].items())  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler does that
def test_it_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    inputs = images()
    torch.manual_seed(0)
    model = ResidualNet()
    quantized(model, inputs)
    other = copy.deepcopy(model)
    compiled: Any = torch.compile(other, fullgraph=True, backend="aot_eager")
    losses = train(model, inputs, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    for expected in losses:
        optimizer.zero_grad()
        loss = (compiled(inputs) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected, rel=1e-2)
    other.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs), other(inputs))


def test_the_fast_path_of_a_transformer_layer_is_off_where_a_layer_changed() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, 16)
    plan = quantized(model, x)
    assert plan.slow == ("", "layers.0", "layers.1")
    model(x)
    model.eval()
    called: list[int] = []
    model.layers[0].linear1.register_forward_hook(lambda *_: called.append(1))
    del model.layers[0].linear1._forward_hooks  # a hook alone would switch the fast path off
    model.layers[0].linear1._forward_hooks = {}
    with torch.no_grad():
        slow = model(x)
        with torch.enable_grad():
            expected = model(x)
    assert torch.equal(slow, expected)
    assert not plan.left
    undo_plan(model)
    assert model.layers[0].activation_relu_or_gelu == 1


def test_shared_inputs_are_quantized_once() -> None:
    model = BertLayer()
    plan = quantized(model, torch.randint(0, 20, (2, 5)))
    (shared,) = (site for site in plan.sites if site.readers)
    assert shared.module == "query" and shared.readers == ("key", "value")
    model(torch.randint(0, 20, (2, 5)))
    assert model.query.input_quantizer.batches.item() == 1


def test_autocast_and_other_dtypes() -> None:
    model, inputs = quantized_and_trained("residual")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(inputs).float().square().mean()
    loss.backward()
    assert torch.isfinite(loss)
    wide = copy.deepcopy(model).double()
    assert wide(inputs.double()).dtype == torch.float64
    half = copy.deepcopy(model).to(torch.bfloat16)
    half(inputs.bfloat16()).float().sum().backward()


def test_gradients_reach_weights_in_eval_mode_too() -> None:
    model, inputs = quantized_and_trained("residual")
    model.eval()
    model.zero_grad()
    inputs.requires_grad_()
    model(inputs).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert inputs.grad is not None and inputs.grad.abs().sum() > 0
