"""verify_onnx tells a file that computes what the model computes from one that does not, and says where."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from sparsify.errors import ArgumentError, DataError, DataFileError, ExportError
from sparsify.onnx import integer_kernels
from sparsify.onnx.export import export_onnx
from sparsify.onnx.runtime import open_session
from sparsify.onnx.verify import Verification, verify_onnx
from sparsify.onnx.verify_kernels import Gap, TensorDifference
from sparsify.quantization.qdq_ops import quantize_dequantize
from tests.loops import quantized, train
from tests.zoo.integer_forms import IntegerEncoder, IntegerResNet
from tests.zoo.small import written


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.drop(self.norm(self.layer(x)).relu())
        return {"hidden": hidden, "logits": self.head(hidden)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


Exported = tuple[nn.Module, Path, Tensor]
"""A model, its file, and inputs."""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A float network; not to be changed."""
    model, path = Net(), tmp_path_factory.mktemp("net") / "model.onnx"
    export_onnx(model, torch.randn(2, 6), path)
    return model, path, torch.randn(9, 6)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A network of integers; not to be changed."""
    torch.manual_seed(0)
    model, path = IntegerResNet(1, 8), tmp_path_factory.mktemp("resnet") / "model.onnx"
    export_onnx(model, torch.randn(2, 3, 16, 16), path)
    return model, path, torch.randn(4, 3, 16, 16)


@pytest.fixture(scope="module")
def proven(resnet: Exported) -> Verification:
    """The network of integers as it is."""
    return verify_onnx(*resnet)


def copied(exported: Exported, folder: Path) -> Exported:
    """With a file that may be changed."""
    model, path, x = exported
    return model, Path(shutil.copy(path, folder)), x


def change(path: Path, name: str, edit: Any) -> None:
    """Puts `edit(value)` in the place of an initializer."""
    proto = onnx.load(path)
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(edit(numpy_helper.to_array(tensor).copy())), name))
    onnx.save(proto, path)


def test_a_float_model_agrees_in_every_output_both_ways(path: Path) -> None:
    model = Net().train()
    export_onnx(model, torch.randn(2, 6), path)
    state = copy.deepcopy(model.state_dict())
    result = verify_onnx(model, path, torch.randn(9, 6))
    assert result.ok and result and not result.quantized
    assert [(each.output, each.optimized) for each in result.outputs] == [
        ("hidden", False),
        ("hidden", True),
        ("logits", False),
        ("logits", True),
    ]
    assert all(each.relative < 1e-5 and each.steps is None for each in result.outputs)
    assert result.tensors == () and result.first_divergence is None
    assert model.training and model.norm.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_a_changed_weight_is_found_and_named(net: Exported, tmp_path: Path) -> None:
    model, path, x = copied(net, tmp_path)
    change(path, "head.bias", lambda value: value + 0.01)
    result = verify_onnx(model, path, x)
    assert not result.ok and not result
    assert {each.output for each in result.outputs if not each.ok} == {"logits"}
    assert all(abs(each.max_abs - 0.01) < 1e-5 for each in result.outputs if each.output == "logits")
    assert "DIFFERS" in str(result) and str(result).count("<--") == 2
    assert verify_onnx(model, path, x, tolerance=0.5).ok


def test_a_quantized_network_agrees_tensor_by_tensor(proven: Verification) -> None:
    result = proven
    assert result.quantized and result.ok and result.exit_code == 0, str(result)
    names = [tensor.name for tensor in result.tensors]
    assert names[:3] == ["input/QuantizeLinear", "after_stem/QuantizeLinear", "layers.0.first/QuantizeLinear"]
    assert result.first_divergence is None and result.why is None and result.unproven is None
    assert "none diverges" in str(result)


def test_a_network_of_integer_kernels_is_exact_from_end_to_end(proven: Verification) -> None:
    result = proven
    assert result.exact and result.unfused == ()
    # 14 quantizers, and the last layer's result in float.
    assert len(result.tensors) == 15 and all(tensor.exact for tensor in result.tensors)
    for tensor in result.tensors:
        assert tensor.optimized is not None and tensor.total is not None
        assert tensor.optimized.count == tensor.total.count == 0
        assert (tensor.torch is None) == (tensor.kernel == "QGemm")
    assert {tensor.kernel for tensor in result.tensors} == {
        "QuantizeLinear",
        "QLinearConv",
        "QLinearAdd",
        "QLinearGlobalAveragePool",
        "QGemm",
    }
    assert "15 of 15 integer kernels of onnxruntime are exact, and so is the whole file" in str(result)


def test_the_first_tensor_that_diverges_is_named(resnet: Exported, tmp_path: Path) -> None:
    model, path, x = copied(resnet, tmp_path)
    change(path, "layers.1.conv2.bias_int32", lambda value: value + 20_000)
    result = verify_onnx(model, path, x)
    assert not result.ok and result.exit_code == 1
    assert result.first_divergence == "layers.1.second/QuantizeLinear"
    assert result.why is not None and "biases or ranges in the file are not those of the model" in result.why
    assert "the first that diverges is layers.1.second/QuantizeLinear: torch gives other integers" in str(result)
    # Kernel by kernel, the layers behind it are as they should be.
    assert [tensor.name for tensor in result.tensors if tensor.diverges] == ["layers.1.second/QuantizeLinear"]


def test_of_two_tensors_that_diverge_the_first_in_the_order_of_computation_is_named(
    resnet: Exported, tmp_path: Path
) -> None:
    model, path, x = copied(resnet, tmp_path)
    for layer in ("layers.2.conv2", "layers.1.conv2"):
        change(path, f"{layer}.bias_int32", lambda value: value + 20_000)
    result = verify_onnx(model, path, x)
    diverging = [tensor.name for tensor in result.tensors if tensor.diverges]
    assert diverging == ["layers.1.second/QuantizeLinear", "layers.2.second/QuantizeLinear"]
    assert result.first_divergence == diverging[0]


def test_a_bias_that_is_off_by_less_than_a_step_is_found(resnet: Exported, tmp_path: Path) -> None:
    model, path, x = copied(resnet, tmp_path)
    change(path, "layers.1.conv2.bias_int32", lambda value: value + 40)
    result = verify_onnx(model, path, x)
    changed = next(tensor for tensor in result.tensors if tensor.name == "layers.1.second/QuantizeLinear")
    assert changed.torch is not None and changed.torch.steps == 1 and changed.torch.share > 0.02
    assert result.first_divergence == changed.name


def test_an_integer_kernel_that_rounds_otherwise_is_found(resnet: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path, x = resnet
    original = integer_kernels.add

    def one_off(*operands: Any) -> Any:
        return original(*operands) ^ 1

    monkeypatch.setattr(integer_kernels, "add", one_off)
    result = verify_onnx(model, path, x)
    assert not result.ok and not result.exact and result.first_divergence == "layers.0.last/QuantizeLinear"
    assert result.why is not None and "onnxruntime's QLinearAdd gives other integers" in result.why


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("side", ["torch", "written", "optimized"])
def test_a_single_value_two_steps_aside_diverges_and_one_step_aside_does_not(side: str, weighted: bool) -> None:
    """Of computation in float: rounding moves a value from one step to the next, and no further."""

    def of(steps: float) -> TensorDifference:
        sides = {"torch": None, "written": None, "optimized": None, side: Gap(steps, 1e-4, 1)}
        return TensorDifference("x/QuantizeLinear", "QuantizeLinear", False, weighted, **sides, total=None)

    assert not of(1.0).diverges
    assert of(2.0).diverges


def test_an_encoder_agrees(path: Path) -> None:
    torch.manual_seed(0)
    model = IntegerEncoder()
    export_onnx(model, torch.randn(2, 7, 32), path)
    result = verify_onnx(model, path, torch.randn(3, 7, 32))
    assert result.ok and result.first_divergence is None and result.unproven is None
    quantizers = [tensor for tensor in result.tensors if tensor.torch is not None]
    assert len(quantizers) == 8 and all(tensor.steps <= 1 for tensor in quantizers)
    # Every Linear is an integer kernel, compared on onnxruntime's own inputs.
    integer = [tensor for tensor in result.tensors if tensor.kernel == "QGemm"]
    assert len(integer) == 12
    assert all(tensor.exact and tensor.optimized is not None and tensor.optimized.count == 0 for tensor in integer)


def test_what_runs_in_float_next_to_quantized_values_is_said(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ELU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 8, 8)
    quantized(model, x)
    train(model, x, 2)
    export_onnx(model.eval(), (x,), path)
    result = verify_onnx(model, path, (x,))
    assert result.ok and {each.operator for each in result.unfused} == {"Elu"}
    assert "1/Elu (Elu) runs in float: onnxruntime has no integer kernel" in str(result)


def test_a_file_that_the_reference_cannot_run_is_held_to_a_tolerance(
    resnet: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path, x = copied(resnet, tmp_path)

    def refuse(*operands: Any) -> Any:
        raise ValueError("of no use")

    monkeypatch.setattr(integer_kernels, "add", refuse)
    result = verify_onnx(model, path, x)
    assert result.ok and not result.exact and result.tolerance == 0.05 and result.tensors == ()
    assert result.unproven is not None and "ValueError: of no use" in result.unproven
    assert "not proven kernel by kernel" in str(result)
    change(path, "head.bias_int32", lambda value: value + 200_000)
    assert not verify_onnx(model, path, x).ok


class QuantizedOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero_point", torch.tensor(100, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return quantize_dequantize(self.layer(x), self.scale, self.zero_point).reshape(-1, 2, 4)


def test_a_quantized_output_is_measured_in_steps(path: Path) -> None:
    torch.manual_seed(0)
    model = QuantizedOutput()
    export_onnx(model, torch.randn(2, 6), path)
    result = verify_onnx(model, path, torch.randn(50, 6))
    assert result.ok
    for each in result.outputs:
        assert each.step == pytest.approx(0.02) and each.steps is not None and each.steps <= 1.01
    change(path, "layer.bias", lambda value: value + 0.2)
    result = verify_onnx(model, path, torch.randn(50, 6), tolerance=10.0)
    assert not result.ok
    assert all(each.steps == pytest.approx(10, abs=1.1) for each in result.outputs)


def test_nan_and_infinity_differ_from_numbers_and_agree_with_themselves(path: Path) -> None:
    class Logarithm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x)

    export_onnx(Logarithm(), torch.rand(2, 3), path)
    assert verify_onnx(Logarithm(), path, torch.tensor([[-1.0, 0.0, 2.0]])).ok

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    result = verify_onnx(Other(), path, torch.tensor([[-1.0, 0.0, 2.0]]))
    assert not result.ok and result.outputs[0].max_abs == np.inf


def test_what_does_not_fit_is_said(net: Exported, tmp_path: Path) -> None:
    model, path, x = copied(net, tmp_path)
    with pytest.raises(ArgumentError, match="model is a str"):
        verify_onnx("net", path, torch.randn(2, 6))  # type: ignore[arg-type]
    for tolerance in (0, -1.0, float("nan"), "low"):
        with pytest.raises(ArgumentError, match="give a positive number"):
            verify_onnx(model, path, x, tolerance=tolerance)  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"has the outputs hidden, logits; Linear returns output"):
        verify_onnx(nn.Linear(6, 3), path, torch.randn(2, 6))
    with pytest.raises(DataFileError, match="no such file"):
        verify_onnx(model, path.with_name("other.onnx"), torch.randn(2, 6))
    path.write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a usable ONNX model"):
        verify_onnx(model, path, x)


def test_half_precision_is_held_to_its_own_precision(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).half()
    export_onnx(model, torch.randn(2, 6).half(), path)
    result = verify_onnx(model, path, torch.randn(9, 6).half())
    assert result.ok and result.tolerance == 0.01 and not result.quantized


def test_a_file_with_a_fixed_batch_refuses_another(path: Path) -> None:
    model = Net()
    export_onnx(model, torch.randn(2, 6), path, dynamic_batch=False)
    assert verify_onnx(model, path, torch.randn(2, 6)).ok
    with pytest.raises(ExportError, match="onnxruntime failed on inputs"):
        verify_onnx(model, path, torch.randn(3, 6))


def test_inputs_that_the_model_does_not_take_are_an_argument_error(path: Path) -> None:
    export_onnx(nn.Linear(6, 3), torch.randn(2, 6), path)
    with pytest.raises(ArgumentError, match=r"inputs do not run through Linear: RuntimeError: .*export_onnx"):
        verify_onnx(nn.Linear(4, 3), path, torch.randn(2, 6))


class Saturating:
    """A session whose first output is off."""

    def __init__(self, session: Any, off: float) -> None:
        self.session, self.off = session, off

    def get_outputs(self) -> Any:
        return self.session.get_outputs()

    def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        first, *others = self.session.run(names, inputs)
        return [first + self.off * np.abs(first).max(), *others]


@pytest.mark.parametrize("off", [0.0, 0.6])
def test_a_session_without_the_option_is_told_of_and_the_file_is_right(
    resnet: Exported, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    model, path, x = resnet
    seen: list[bool] = []

    def opened(*args: Any, exact: bool = True, **others: Any) -> Any:
        # With the option on both sides, so that the CPU at hand does not matter.
        session = open_session(*args, **others)
        seen.append(exact)
        return session if exact else Saturating(session, off)

    monkeypatch.setattr("sparsify.onnx.verify.open_session", opened)
    result = verify_onnx(model, path, x)
    assert result.ok and result.exact and seen.count(False) == 1
    if off:
        assert result.stock == pytest.approx(off, rel=1e-5)
        assert "saturate in a session without session.x64quantprecision: outputs differ by 0.6 of" in str(result)
    else:
        assert result.stock is None and "x64quantprecision" not in str(result)


def test_a_float_file_has_no_sums_of_integers(net: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path, x = net

    def opened(*args: Any, exact: bool = True, **others: Any) -> Any:
        assert exact
        return open_session(*args, **others)

    monkeypatch.setattr("sparsify.onnx.verify.open_session", opened)
    assert verify_onnx(model, path, x).stock is None


def test_an_output_that_differs_behind_equal_integers_names_what_makes_it(path: Path) -> None:
    torch.manual_seed(0)
    model = written(
        lambda self, x: (self.b(self.a(x).relu()), x[:, None] * self.a.weight), a=nn.Linear(6, 4), b=nn.Linear(4, 3)
    )
    x = torch.randn(8, 6)
    quantized(model, x)
    model(x)
    export_onnx(model.eval(), x, path)
    assert verify_onnx(model, path, x).ok
    change(path, "a.weight", lambda value: value * 2)
    result = verify_onnx(model, path, x)
    assert not result.ok and result.why is not None and "a.weight" in result.why and "output_1" in result.why
    assert str(result.first_divergence) in str(result)
