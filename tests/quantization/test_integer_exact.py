"""`integer_exact`: torch computes the integers of the exported file, to the bit, and is itself again afterwards."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import export_onnx, integer_exact, quantize_model, verify_onnx
from sparsify.errors import StateError
from sparsify.onnx.runtime import open_session, run_session
from sparsify.quantization.integer_sums import SumForm, WholeWeight, products
from sparsify.quantization.scheme import QuantizationSettings
from tests.loops import quantized_and_trained
from tests.zoo.quantizable import ZOO, ResidualNet, images, mlp

IN_INTEGERS = {"residual": False, "gated": False, "detector": True, "inverted": True, "up": True, "dense": True}
IN_INTEGERS |= {"subclassed": True, "mlp": False}
"""{network in integers from its first layer to the last: whether it is for `make test-all`}."""


def in_onnxruntime(model: nn.Module, x: Tensor, path: Path) -> list[Tensor]:
    """What the exported file gives."""
    export_onnx(model, x[:2], path)
    session = open_session(path, optimized=True, float_inputs=True)
    return [torch.from_numpy(each) for each in run_session(session, {session.get_inputs()[0].name: x.numpy()}).values()]


def flat(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [each for part in (outputs.values() if isinstance(outputs, dict) else outputs) for each in flat(part)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if slow else ()) for name, slow in IN_INTEGERS.items()]
)
def test_outputs_are_those_of_the_file_to_the_bit(name: str, tmp_path: Path) -> None:
    model, _ = quantized_and_trained(name)
    x = ZOO[name][1]()
    expected = in_onnxruntime(model.eval(), x, tmp_path / "model.onnx")
    with integer_exact(model):
        found = flat(model(x))
        single = [flat(model(x[i : i + 1])) for i in range(len(x))]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    # In batches of any size: no sum depends on its neighbours.
    assert all(
        torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*single, strict=True), found, strict=True)
    )


class Numbers(nn.Module):
    """Numbers beside integers, a learned one among them, a tanh, and pools; eval mode is off by steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2, groups=2)
        self.factor = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.first(x)))
        x = F.relu(self.second(x * -0.5 + 1.0))
        return F.relu(self.up(torch.tanh(self.third(x * self.factor))))


def test_what_quantize_model_gives_where_eval_mode_is_off_by_steps(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = quantize_model(Numbers(), [torch.randn(16, 3, 12, 12)]).model.eval()
    x = torch.randn(64, 3, 24, 24)
    (expected,) = in_onnxruntime(model, x, tmp_path / "model.onnx")
    with integer_exact(model) as same:
        assert same is model
        assert torch.equal(model(x), expected)
        with torch.inference_mode():
            assert torch.equal(model(x), expected)
    with torch.inference_mode(), integer_exact(model):
        assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert not torch.equal(model(x), expected)


@pytest.mark.slow
def test_what_is_in_float_is_computed_as_before(tmp_path: Path) -> None:
    model, ids = quantized_and_trained("attention")
    (expected,) = in_onnxruntime(model.eval(), ids, tmp_path / "model.onnx")
    with integer_exact(model):
        torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), expected, rtol=1e-3, atol=1e-3)


def exact(form: SumForm, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    sums = form.compute(x.double(), weight.double(), None if bias is None else bias.double())
    return sums.to(torch.int64).to(torch.int32)


@pytest.mark.parametrize("large_bias", [False, True])
@pytest.mark.parametrize("inner", [3, 700, 4000])
def test_sums_are_exact_however_long(inner: int, large_bias: bool) -> None:
    """Of the largest integers, so that one in float32 alone is wrong."""
    torch.manual_seed(0)

    def whole(low: int, *shape: int) -> Tensor:
        return torch.randint(low, low + 6, shape).float()

    bias = torch.full((6,), 2**31 - 1 if large_bias else 9, dtype=torch.int32)
    geometry = ([1, 1], [1, 1], [1, 1])
    cases: list[tuple[SumForm, Tensor, Tensor]] = [
        (SumForm(), whole(249, 4, inner), whole(121, inner, 6)),
        (SumForm(1, False, geometry, [0, 0]), whole(249, 1, inner, 4, 4), whole(121, 6, inner, 3, 3)),
        (SumForm(2, False, geometry, [0, 0]), whole(249, 1, 2 * inner, 4, 4), whole(121, 6, inner, 3, 3)),
        (SumForm(2, True, geometry, [0, 0]), whole(249, 1, 2 * inner, 4, 4), whole(121, 2 * inner, 3, 3, 3)),
    ]
    for form, x, weight in cases:
        known = WholeWeight(weight, torch.ones(()), None)
        for added in (None, bias):
            sums = known.sums(x, added, form)
            assert torch.equal(sums.float(), exact(form, x, weight, added).float())
    a, b = whole(249, 2, 3, inner), whole(-127, 2, inner, 5)
    assert torch.equal(products(a, b).float(), (a.double() @ b.double()).to(torch.int32).float())
    if inner == 4000:
        x, weight = cases[0][1:]
        assert not torch.equal(x @ weight, exact(SumForm(), x, weight, None).float())


def test_the_model_is_what_it_was_also_after_an_exception() -> None:
    model, x = quantized_and_trained("residual")
    model.eval()
    with torch.no_grad():
        before = model(x)
    state = copy.deepcopy(model.state_dict())
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), integer_exact(model):
        model(x)
        raise ZeroDivisionError
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(model(x), before)
    with integer_exact(model):
        pass


def test_weights_and_ranges_that_change_meanwhile_count() -> None:
    model, x = quantized_and_trained("residual")
    other, _ = quantized_and_trained("residual", steps=6)
    model.eval(), other.eval()
    with integer_exact(other):
        expected = other(x)
    with integer_exact(model):
        assert not torch.equal(model(x), expected)
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("scheme", ["tensorrt", "weight_only"])
def test_schemes_without_integer_kernels_compute_as_before(scheme: str) -> None:
    model = quantize_model(mlp(), [torch.randn(16, 6)], scheme=scheme).model.eval()
    x = torch.randn(16, 6)
    with torch.no_grad():
        expected = model(x)
    with integer_exact(model):
        torch.testing.assert_close(model(x), expected)


def refused(match: str) -> Any:
    return pytest.raises(StateError, match=match)


def test_what_cannot_be_exact_is_refused_before_anything_changes() -> None:
    with refused("ResidualNet is not quantized"), integer_exact(ResidualNet().eval()):
        pass
    model, _ = quantized_and_trained("mlp")
    with refused("is in training mode"), integer_exact(model):
        pass
    model.eval()
    half = copy.deepcopy(model).half()
    with refused("weight is in float16"), integer_exact(half):
        pass
    with integer_exact(model), refused("entered already"), integer_exact(copy.deepcopy(model)):
        pass
    fresh = quantized_and_trained("mlp", steps=0)[0].eval()
    with refused("no values were ever observed"), integer_exact(fresh):
        pass


def in_thread(work: Callable[[], object]) -> list[BaseException]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised


def test_what_would_not_be_exact_within_is_refused(tmp_path: Path) -> None:
    model, x = quantized_and_trained("mlp")
    with integer_exact(model.eval()):
        with refused("under autocast"), torch.autocast("cpu"):
            model(x)
        with refused("leave it before the model is exported"):
            export_onnx(model, x, tmp_path / "model.onnx")
        (raised,) = in_thread(lambda: model(x))
        assert isinstance(raised, StateError) and "another thread" in str(raised)

        def enter() -> None:
            with integer_exact(model):
                pass

        (raised,) = in_thread(enter)
        assert isinstance(raised, StateError) and "in another thread" in str(raised)
        model.train()
        with refused("set to training mode"):
            model(x)
    assert model.training


def test_a_compiled_model_is_computed_with_as_it_is() -> None:
    model, x = quantized_and_trained("mlp")
    compiled = torch.compile(model.eval(), backend="eager")
    with integer_exact(model):
        expected = model(x)
    with integer_exact(compiled):
        assert torch.equal(compiled(x), expected)


@pytest.mark.slow
def test_integers_of_few_bits_and_of_two_activations(tmp_path: Path) -> None:
    settings = QuantizationSettings(reduce_range=True)
    model, _ = quantized_and_trained("residual", settings=settings)
    x = images()
    (expected,) = in_onnxruntime(model.eval(), x, tmp_path / "model.onnx")
    with integer_exact(model):
        assert torch.equal(model(x), expected)
    assert verify_onnx(model, tmp_path / "model.onnx", x).exact
