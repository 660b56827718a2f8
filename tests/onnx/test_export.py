"""A model goes into one checked file, as it was, and comes out of onnxruntime with the same numbers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import sparsify
from sparsify import ScheduledModifierManager
from sparsify.errors import ArgumentError, DataFileError, ExportError, SparsifyWarning
from sparsify.onnx.export import export_onnx
from sparsify.onnx.exported import ExportedModel
from sparsify.onnx.runtime import open_session, optimized_operators, run_session
from sparsify.onnx.verify import verify_onnx
from sparsify.quantization.scheme import NAMED, QuantizationSettings
from tests.loops import quantized, train
from tests.zoo.integer_forms import IntegerEncoder, IntegerResNet
from tests.zoo.quantizable import Up, images


class Net(nn.Module):
    """Convolution, BatchNorm, a residual add, both kinds of pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(x + self.conv2(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, image: Tensor, text: Tensor, gain: float = 1.0) -> dict[str, Any]:
        both = self.left(image) + gain * self.right(text)
        return {"logits": both, "inner": {"hidden": both.relu()}, "nothing": None}


class Handed(nn.Module):
    """One tensor under two names, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layer(x)
        return {"first": y, "second": y, "x": x}


def run(path: Any, *inputs: Tensor, optimized: bool = True) -> list[np.ndarray]:
    session = open_session(path, optimized=optimized)
    feed = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return list(run_session(session, feed).values())


def close(found: np.ndarray, expected: Tensor) -> None:
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> ExportedModel:
    """A float network, alone in its folder."""
    return export_onnx(Net(), torch.randn(2, 3, 8, 8), tmp_path_factory.mktemp("net") / "model.onnx")


@pytest.fixture(scope="module")
def integer(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ExportedModel]:
    """A small quantized network, exported as by default."""
    torch.manual_seed(0)
    model = IntegerResNet(1, 4)
    return model, export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path_factory.mktemp("integer") / "model.onnx")


def test_what_is_returned_twice_or_handed_through_has_outputs_of_its_own(path: Path) -> None:
    model, x = Handed(), torch.randn(2, 4)
    exported = export_onnx(model, x, path)
    assert list(exported.outputs) == ["first", "second", "x_output"]
    first, second, handed = run(path, x)
    close(first, model(x)["first"])
    assert np.array_equal(first, second) and np.array_equal(handed, x.numpy())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size_runs_whatever_the_sample_had(path: Path, batch: int) -> None:
    model = Net().eval()
    export_onnx(model, torch.randn(batch, 3, 8, 8), path)
    for size in (1, 3, 16):
        x = torch.randn(size, 3, 8, 8)
        for optimized in (False, True):
            close(run(path, x, optimized=optimized)[0], model(x))


def test_a_fixed_batch_stays_fixed(path: Path) -> None:
    exported = export_onnx(Net(), torch.randn(2, 3, 8, 8), path, dynamic_batch=False)
    assert exported.inputs == {"x": (2, 3, 8, 8)}
    with pytest.raises(ExportError, match="onnxruntime failed on inputs x float32"):
        run(path, torch.randn(3, 3, 8, 8))


def test_the_result_says_what_is_in_the_file_and_is_a_path(net: ExportedModel) -> None:
    exported, path = net, net.path
    assert isinstance(exported, ExportedModel) and os.fspath(exported) == str(path)
    assert exported.size_bytes == path.stat().st_size > exported.gzip_bytes > 0
    assert exported.opset == onnx.load(exported).opset_import[0].version == 20
    assert exported.inputs == {"x": ("batch", 3, 8, 8)} and exported.outputs == {"output": ("batch", 5)}
    assert exported.quantized == () and set(exported.floating) == {"conv1/Conv", "conv2/Conv", "head/Gemm"}
    assert set(exported.initializers) <= {"float", "int64"}
    for word in (str(path), "opset 20", "gzipped", "x (batch, 3, 8, 8)", "in float: 3"):
        assert word in str(exported)


def test_there_is_one_file_and_no_trace_of_the_exporting_machine(net: ExportedModel) -> None:
    path = net.path
    assert os.listdir(path.parent) == [path.name]
    content = path.read_bytes()
    assert str(Path(__file__).parent).encode() not in content and b"stack_trace" not in content
    proto = onnx.load(path)
    assert not proto.graph.value_info and not proto.metadata_props
    assert {"conv1.weight", "head.weight"} & {tensor.name for tensor in proto.graph.initializer}


def test_the_model_is_as_it_was(path: Path) -> None:
    model = Net().train()
    model.conv2.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parameters, modes = list(model.parameters()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    export_onnx(model, torch.randn(1, 3, 8, 8, generator=torch.Generator()), path)
    assert [module.training for module in model.modules()] == modes
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(random, torch.get_rng_state())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_several_inputs_and_outputs_bear_their_names(path: Path) -> None:
    model = Two().eval()
    image, text = torch.randn(2, 4), torch.randn(2, 6)
    for sample in ((image, text), {"text": text, "image": image}, [image, text]):
        exported = export_onnx(model, sample, path)
        assert set(exported.inputs) == {"image", "text"} and list(exported.outputs) == ["logits", "inner_hidden"]
    image, text = torch.randn(7, 4), torch.randn(7, 6)
    expected = model(image, text)
    found = run(path, image, text)
    close(found[0], expected["logits"])
    close(found[1], expected["inner"]["hidden"])


def test_arguments_that_are_no_tensors_become_constants(path: Path) -> None:
    model = Two().eval()
    image, text = torch.randn(2, 4), torch.randn(2, 6)
    exported = export_onnx(model, {"image": image, "text": text, "gain": 3.0}, path)
    assert set(exported.inputs) == {"image", "text"}
    close(run(path, image, text)[0], model(image, text, 3.0)["logits"])


def test_names_can_be_given(path: Path) -> None:
    sample = (torch.randn(2, 4), torch.randn(2, 6))
    exported = export_onnx(Two(), sample, path, input_names=["a", "b"], output_names=["linear", "val_0"])
    assert list(exported.inputs) == ["a", "b"] and list(exported.outputs) == ["linear", "val_0"]
    for wrong, message in (
        ({"input_names": ["a"]}, "1 names for 2 inputs"),
        ({"input_names": "ab"}, "give a list of names"),
        ({"output_names": ["a", "a"]}, "stands there twice"),
        ({"output_names": ["image", "y"]}, "the name of an input"),
    ):
        with pytest.raises(ArgumentError, match=message):
            export_onnx(Two(), sample, path, **wrong)


class Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(4, 4), make

    def forward(self, x: Tensor) -> Any:
        return self.make(x, self.layer(x))


@dataclass
class Answer:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    loss: Tensor | None = None


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda x, y: (y, y), ["output_0", "output_1"]),
        (lambda x, y: (x, y), ["output_0", "output_1"]),
        (lambda x, y: {"x": y, "y": y + 1}, ["x_output", "y"]),
        (lambda x, y: OrderedDict(a=y, b=[y - 1, y + 1]), ["a", "b_0", "b_1"]),
        (lambda x, y: Answer(y, (x + 1, y)), ["logits", "hidden_0", "hidden_1"]),
        (lambda x, y: torch.return_types.max((y, y.argmax(1))), ["output_0", "output_1"]),
    ],
)
def test_every_kind_of_output_is_flattened(path: Path, make: Any, names: list[str]) -> None:
    from sparsify.model.signature import named_outputs

    model = Returns(make).eval()
    exported = export_onnx(model, torch.randn(2, 4), path)
    assert list(exported.outputs) == names
    x = torch.randn(3, 4)
    for found, expected in zip(run(path, x), named_outputs(model(x))[0].values(), strict=True):
        close(found, expected)


def test_a_weight_can_be_an_output(path: Path) -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(x), self.layer.weight

    model, x = Shows(), torch.randn(3, 4)
    assert list(export_onnx(model, torch.randn(2, 4), path).outputs) == ["output_0", "output_1"]
    for found, expected in zip(run(path, x), model(x), strict=True):
        close(found, expected)


def test_an_output_that_is_no_tensor_is_left_out_with_a_warning(path: Path) -> None:
    with pytest.warns(SparsifyWarning, match=r"also returns cache: object, which an ONNX file cannot hold"):
        exported = export_onnx(Returns(lambda x, y: {"y": y, "cache": object()}), torch.randn(2, 4), path)
    assert list(exported.outputs) == ["y"]
    with pytest.raises(ExportError, match="returns no tensor"):
        export_onnx(Returns(lambda x, y: None), torch.randn(2, 4), path)


def transformers_of_this_place() -> Any:
    """transformers, where it is installed; conftest declares the operators of torchvision that it asks for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers")


def test_a_transformer_of_hugging_face_goes_through(path: Path) -> None:
    transformers = transformers_of_this_place()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(0, 50, (2, 9))
    sample = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    exported = export_onnx(model, sample, path)
    assert list(exported.inputs) == ["input_ids", "attention_mask"] and list(exported.outputs) == ["logits"]
    ids = torch.randint(0, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    close(run(path, ids, mask)[0], model(input_ids=ids, attention_mask=mask).logits)


def test_pruned_weights_are_zeros_in_the_file(path: Path) -> None:
    model = Net()
    with torch.no_grad():
        model.conv1.weight[torch.rand_like(model.conv1.weight) < 0.8] = 0.0
    export_onnx(model, torch.randn(2, 3, 8, 8), path)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert [name for name, value in stored.items() if (value == 0).mean() > 0.7]


def test_wrappers_come_off(path: Path) -> None:
    model = Net().eval()
    x = torch.randn(2, 3, 8, 8)
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        export_onnx(wrapped, x, path)
        close(run(path, x)[0], model(x))


# --- quantized ---------------------------------------------------------------------------------------------------


def test_a_resnet_20_runs_in_integers_from_end_to_end(path: Path) -> None:
    torch.manual_seed(0)
    exported = export_onnx(IntegerResNet(), torch.randn(2, 3, 32, 32), path)
    found = optimized_operators(exported)
    assert (found["QLinearConv"], found["QLinearAdd"]) == (21, 9)
    assert (found["QLinearGlobalAveragePool"], found["QGemm"]) == (1, 1)
    assert found["QuantizeLinear"] == 1 and found["DequantizeLinear"] == 0
    assert not {"Conv", "Add", "Relu", "Gemm", "MatMul", "ReduceMean", "GlobalAveragePool"} & set(found)
    assert len(exported.quantized) == 22 and exported.floating == ()


def test_max_pool_moves_integers(path: Path) -> None:
    torch.manual_seed(0)
    model, x = IntegerResNet(1, 8, max_pool=True).eval(), torch.randn(3, 3, 32, 32)
    export_onnx(model, x, path)
    found = optimized_operators(path)
    assert found["DequantizeLinear"] == 0 and not {"Conv", "MaxPool"} & set(found)
    # Not closer: a value on the edge between two steps falls either way.
    np.testing.assert_allclose(run(path, x, optimized=False)[0], model(x).numpy(), atol=0.05)


def test_an_encoder_runs_its_linear_layers_as_integer_gemms(path: Path) -> None:
    torch.manual_seed(0)
    model, x = IntegerEncoder().eval(), torch.randn(2, 11, 32)
    exported = export_onnx(model, x, path)
    found = optimized_operators(exported)
    assert found["QGemm"] == 12 and found["Gemm"] == found["DequantizeLinear"] == 0
    # Query, key and value share one quantized tensor.
    assert sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node) == 8
    for batch in (1, 5):
        x = torch.randn(batch, 11, 32)
        np.testing.assert_allclose(run(path, x)[0], model(x).detach().numpy(), atol=0.05)


class Residual(nn.Module):
    """A model as users write it, to be quantized by a recipe."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def test_a_model_pruned_and_quantized_by_a_recipe_is_deployed_as_it_was_trained(path: Path) -> None:
    torch.manual_seed(0)
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    manager = ScheduledModifierManager.from_yaml("""
modifiers:
  - !ConstantPruningModifier
    start_epoch: 0.0
    params: ["conv1.weight", "conv2.weight"]
  - !QuantizationModifier
    start_epoch: 0.0
""")
    with torch.no_grad():
        for layer in (model.conv1, model.conv2):
            layer.weight[torch.rand_like(layer.weight) < 0.7] = 0.0
    manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs=torch.randn(4, 3, 16, 16))
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 16, 16)).square().mean().backward()
        optimizer.step()
    manager.finalize(model)
    zeros = {name: getattr(model, name).weight.detach().numpy() == 0 for name in ("conv1", "conv2")}
    model.train()
    exported = export_onnx(model, torch.randn(2, 3, 16, 16), path)
    assert model.training and exported.floating == () and len(exported.quantized) == 4
    found = optimized_operators(path)
    assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"]) == (3, 1, 1)
    assert not {"Conv", "Add", "Relu", "Gemm", "MaxPool", "DequantizeLinear", "GlobalAveragePool"} & set(found)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for name, zero in zeros.items():
        assert zero.mean() > 0.6 and (stored[f"{name}.weight_int8"][zero] == 0).all()
    result = verify_onnx(model, path, torch.randn(5, 3, 16, 16))
    assert result.ok and result.first_divergence is None, str(result)
    assert Counter(tensor.kernel for tensor in result.tensors) == {
        "QuantizeLinear": 1,
        "QLinearConv": 3,
        "QLinearAdd": 1,
        "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
    }


def test_gpt_2_is_trained_and_runs_with_all_its_layers_in_integers(path: Path) -> None:
    transformers = transformers_of_this_place()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=16,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = transformers.GPT2LMHeadModel(config)
    ids = torch.randint(0, 50, (3, 9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    manager = ScheduledModifierManager.from_yaml("modifiers:\n  - !QuantizationModifier\n    start_epoch: 0.0\n")
    manager.modify(model, optimizer, steps_per_epoch=2, sample_inputs={"input_ids": ids})
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
    manager.finalize(model)
    exported = export_onnx(model, {"input_ids": ids}, path)
    assert exported.floating == () and len(exported.quantized) == 6
    # Four of the block, and the head; positions and words are looked up.
    assert optimized_operators(path)["QGemm"] == 5 and not optimized_operators(path)["Gemm"]
    assert verify_onnx(model, path, {"input_ids": ids})


def test_what_onnxruntime_computes_in_float_is_said(path: Path) -> None:
    model, x = Up(), images()
    quantized(model, x, settings=QuantizationSettings(scheme=NAMED["tensorrt"]))
    train(model, x, 2)
    exported = export_onnx(model, x, path)
    # Signed activations, which nothing on x86 reads in integers.
    assert exported.unaccelerated == ("up/ConvTranspose",)
    assert "integer weights, computed in float by onnxruntime: up/ConvTranspose" in str(exported)
    assert optimized_operators(path)["ConvTranspose"] == 1


@pytest.mark.parametrize("opset", [18, 20, 21])
def test_opsets_are_what_was_asked_for(path: Path, integer: tuple[nn.Module, ExportedModel], opset: int) -> None:
    model, exported = integer
    if opset != 20:
        exported = export_onnx(model, torch.randn(2, 3, 8, 8), path, opset=opset)
    assert exported.opset == onnx.load(exported).opset_import[0].version == opset
    assert optimized_operators(exported)["QLinearConv"] == 9


def test_zeros_of_pruned_weights_are_zeros_of_the_integers(integer: tuple[nn.Module, ExportedModel]) -> None:
    model, path = integer
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    weights = {name: value for name, value in stored.items() if name.endswith("weight_int8")}
    assert len(weights) == 10
    for name, value in weights.items():
        np.testing.assert_array_equal(value, model.get_buffer(name).numpy())
        assert (value == 0).mean() > 0.3


# --- what goes wrong ---------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x + 1
        return x


class FixesBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 3, 2, 2).flatten(1) if x.shape[0] == 2 else x


class NoTranslation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Conv1d(3, 3, 1).bfloat16(), r"Conv1d has weights in bfloat16"),
        (Branches(), r"Branches cannot be traced .*test_export.py:\d+, in forward"),
        (NoTranslation(), r"NoTranslation cannot be written as ONNX"),
    ],
)
def test_a_model_that_cannot_be_exported_says_where(path: Path, model: nn.Module, message: str) -> None:
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=message):
        export_onnx(model, torch.randn(2, 3, 3), path)
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == [path.name]


def test_a_batch_size_fixed_in_forward_names_the_way_out(path: Path) -> None:
    with pytest.raises(ExportError, match="dynamic_batch=False"):
        export_onnx(FixesBatch(), torch.randn(2, 12), path)
    export_onnx(FixesBatch(), torch.randn(2, 12), path, dynamic_batch=False)


def test_an_unwritable_path_is_refused_before_the_work_starts(tmp_path: Path) -> None:
    class Never(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("traced")

    for path in (tmp_path / "missing" / "model.onnx", tmp_path):
        with pytest.raises(DataFileError, match="cannot write"):
            export_onnx(Never(), torch.randn(2, 3), path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "net"}, "model is a str"),
        ({"sample_inputs": 3}, "give a tensor, a tuple"),
        ({"sample_inputs": ()}, "do not fit Net.forward"),
        ({"sample_inputs": ([],)}, "no tensor among the inputs"),
        ({"sample_inputs": {"y": torch.ones(1)}}, "do not fit Net.forward"),
        ({"sample_inputs": torch.ones(0, 3, 8, 8)}, "an empty batch"),
        ({"opset": 13}, "give one of 18 to 23"),
        ({"opset": "20"}, "give one of 18 to 23"),
        ({"opset": True}, "give one of 18 to 23"),
        ({"path": 7}, "give the path of a file"),
    ],
)
def test_wrong_arguments_are_named(path: Path, arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": Net(), "sample_inputs": torch.randn(2, 3, 8, 8), "path": path} | arguments
    with pytest.raises(ArgumentError, match=message):
        export_onnx(**given)
    assert not path.exists()


def test_a_model_beyond_one_file_is_refused(path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(30_000, 20_000)
    with pytest.raises(ExportError, match=r"2\.24 GiB of weights; one ONNX file holds 1\.80 GiB"):
        export_onnx(model, torch.randn(2, 30_000), path)


def test_killed_while_writing_the_old_file_stays(path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
import torch
from sparsify.onnx.export import export_onnx
write = Path.write_bytes
def slowly(self, content):
    write(self, content[: len(content) // 2])
    print("half", flush=True)
    import time; time.sleep(60)
Path.write_bytes = slowly
export_onnx(torch.nn.Linear(4, 4), torch.randn(2, 4), sys.argv[1])
"""
    path.write_bytes(b"old")
    environment = {**os.environ, "PYTHONPATH": str(Path(sparsify.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == b"old"
