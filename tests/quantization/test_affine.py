"""Affine weights: a zero point beside each scale, in training as in a file; zeros stay zeros."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify import QuantizationModifier, ScheduledModifierManager, export_onnx, quantize_model, verify_onnx
from sparsify.errors import ArgumentError
from sparsify.quantization.deployment import deployment_copy
from sparsify.quantization.plan import QuantizationPlan
from sparsify.quantization.scheme import QuantizationSettings, Scheme, WeightScheme
from sparsify.quantization.weight_grid import affine_grid, affine_integers, fake_affine
from tests.loops import quantized
from tests.zoo.quantizable import GptBlock, ResidualNet, images


def affine(bits: int = 4, block: Any = None, strategy: Any = "channel") -> QuantizationSettings:
    strategy = "block" if block else strategy
    return QuantizationSettings(
        scheme=Scheme(
            input_activations=None,
            weights=WeightScheme(num_bits=bits, strategy=strategy, block_size=block, symmetric=False),
        )
    )


def shifted(model: nn.Module) -> nn.Module:
    """Weights that do not lie around zero, a row of zeros, and rows of one sign."""
    with torch.no_grad():
        for module in model.modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() > 1:
                weight += 0.5 * weight.abs().max()
                weight[0] = 0.0
                weight[1].abs_()
                weight[2].abs_().neg_()
    return model


def by_hand(weight: Tensor, bits: int, block: int) -> Tensor:
    """(out, in) on the grid, one block after another, number by number."""
    result, levels = weight.clone(), 2**bits - 1
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], block):
            values = weight[row, start : start + block].double()
            low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
            scale = max((high - low) / levels, 1e-12)
            zero = round(-low / scale)
            q = ((values / scale).round() + zero).clamp(0, levels)
            result[row, start : start + block] = ((q - zero) * scale).to(weight.dtype)
    return result


finite = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@settings(deadline=None)
@given(
    st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([None, 0, 1]),
)
# The zero point and the largest weight both lie halfway between two integers, and both are rounded up.
@example([[-1.5, 1.5, 0.0]], 2, None)
def test_zero_is_exact_and_nothing_is_further_than_half_a_step(
    rows: list[list[float]], bits: int, axis: int | None
) -> None:
    weight, levels = torch.tensor([[0.0, *row] for row in rows]), 2**bits - 1
    scale, zero = affine_grid(weight, axis=axis, levels=levels)
    q = affine_integers(weight, scale, zero, levels) + zero
    assert bool((scale > 0).all() and scale.isfinite().all())
    assert torch.equal(zero, zero.round()) and bool((zero >= 0).all() and (zero <= levels).all())
    assert torch.equal(q, q.round()) and bool((q >= 0).all() and (q <= levels).all())
    found = fake_affine(weight, axis=axis, levels=levels)
    torch.testing.assert_close(found, (q - zero) * scale, rtol=0, atol=0)
    assert bool((found[weight == 0] == 0).all())
    error = (found.double() - weight.double()).abs()
    assert bool((error <= scale.double() * (0.5 + 1e-4)).all()), (error / scale).max()
    # No wider than needed: the range is reached to half a step on both sides.
    least = min(weight.min().item(), 0.0) if axis is None else weight.amin(1 - axis, keepdim=True).clamp(max=0.0)
    assert bool(((0 - zero) * scale <= torch.as_tensor(least) + scale * 0.5001).all())


def test_the_gradient_of_every_weight_passes() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    slope = torch.randn(4, 6)
    fake_affine(weight, axis=0, levels=15).backward(slope)
    assert weight.grad is not None and torch.equal(weight.grad, slope)


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks_lie_on_the_grid_worked_out_by_hand(bits: int, block: int) -> None:
    torch.manual_seed(0)
    model, x = shifted(GptBlock()), torch.randn(2, 3, 70)
    plain = copy.deepcopy(model)
    quantized(model, x, settings=affine(bits, block))
    with torch.no_grad():
        for layer in (plain.inner, plain.head):
            layer.weight.copy_(by_hand(layer.weight, bits, block))
        plain.turned.weight.copy_(by_hand(plain.turned.weight.t(), bits, block).t())
    torch.testing.assert_close(model(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(x), plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("bits", "block", "strategy"), [(4, 32, ""), (3, None, "channel"), (2, 16, ""), (8, 128, "")])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_file_computes_the_same_in_the_fused_kernel(
    bits: int, block: int | None, strategy: str, dims: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = shifted(GptBlock()), torch.randn(3, 4, 70)
    x = x if dims == 3 else x[0]
    quantized(model, x, settings=affine(bits, block, strategy))
    deployed = deployment_copy(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), deployed(x))
    file = export_onnx(model, x, tmp_path / "net.onnx")
    assert ("uint4" in file.initializers) == (bits <= 4) == ("qdq_matmulnbits_accuracy_level" in str(file))
    verification = verify_onnx(model, file, x)
    assert verification.ok and verification.unproven is None, str(verification)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of a file for this machine
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(file.path), options)
    nodes = onnx.load(tmp_path / "optimized.onnx").graph.node
    found = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(found) == 3 and all(len(node.input) >= 4 and node.input[3] for node in found)
    # The integers of the file are those of the layer, two in a byte or not.
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file.path).graph.initializer}
    for name in ("inner", "head"):
        layer: Any = deployed.get_submodule(name)
        assert np.array_equal(stored[f"{name}.weight_uint8"].astype(np.uint8).T, layer.weight_uint8.numpy())


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_batchnorm_of_either_sign_folds_into_the_integers_of_training(
    bits: int, strategy: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = shifted(ResidualNet()), images()
    quantized(model, x, settings=affine(bits, None, strategy))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.weight.normal_()
                module.weight[:2] = torch.tensor([-0.7, 0.0])
    deployed = deployment_copy(model)
    stem: Any = deployed.get_submodule("stem")
    assert stem.weight_uint8.dtype == stem.weight_zero_point.dtype == torch.uint8
    original, norm = model.stem, model.bn
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).reshape(-1, 1, 1, 1)
    axis = None if strategy == "tensor" else 0
    with torch.no_grad():
        wanted = fake_affine(original.weight, axis=axis, levels=2**bits - 1) * factor
        torch.testing.assert_close(stem.weight, wanted, rtol=1e-5, atol=1e-7)
        model.eval()
        assert torch.equal(model(x), deployed(x))
    file = export_onnx(model, x, tmp_path / "net.onnx")
    assert ("uint4" if bits == 4 else "uint8") in file.initializers
    verification = verify_onnx(model, file, x)
    assert verification.ok, str(verification)


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_a_table_of_embeddings_gives_the_rows_of_its_grid(strategy: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shifted(nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 4)))
    ids = torch.randint(0, 30, (5, 7))
    table = fake_affine(model[0].weight, axis=None if strategy == "tensor" else 0, levels=15).detach()
    quantized(model, ids, settings=affine(4, None, strategy))
    assert torch.equal(model[0](ids), table[ids])
    deployed = deployment_copy(model)
    with torch.no_grad():
        torch.testing.assert_close(deployed[0](ids), table[ids], rtol=0, atol=0)
    file = export_onnx(model.eval(), ids, tmp_path / "net.onnx")
    assert verify_onnx(model, file, ids)


def test_masked_weights_stay_zero_in_training_and_in_the_file() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(8, 32)
    manager = ScheduledModifierManager.from_yaml("""
modifiers:
  - !ConstantPruningModifier {params: __ALL_PRUNABLE__, start_epoch: 0.0}
  - !QuantizationModifier
    start_epoch: 0.0
    scheme: {input_activations: null, weights: {num_bits: 4, symmetric: false, strategy: block, block_size: 16}}
""")
    with torch.no_grad():
        zeros = torch.rand_like(model[0].weight) < 0.6
        model[0].weight.add_(0.1)[zeros] = 0.0
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = manager.modify(model, optimizer, 4, sample_inputs=(x,))
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    manager.finalize(model)
    deployed: Any = deployment_copy(model)
    assert bool((deployed[0].weight[zeros] == 0).all()) and bool((deployed[0].weight[~zeros] != 0).any())


def test_a_checkpoint_brings_the_grid_back_and_old_states_are_symmetric() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 70)
    model = shifted(GptBlock())
    plan = quantized(model, x, settings=affine(4, 32))
    state = plan.to_state()
    assert QuantizationPlan.from_state(state) == plan and all(layer.affine for layer in plan.layers)
    for layer in state["layers"]:
        del layer["affine"]
    old = QuantizationPlan.from_state(state)
    assert old.layers == tuple(dataclasses.replace(layer, affine=False) for layer in plan.layers)

    def made() -> tuple[ScheduledModifierManager, nn.Module, Any]:
        net = shifted(GptBlock())
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
        manager = ScheduledModifierManager([QuantizationModifier(start_epoch=0.0, scheme=affine(4, 32).scheme)])
        return manager, net, manager.modify(net, optimizer, 4, sample_inputs=(x,))

    manager, net, optimizer = made()
    net(x).square().mean().backward()
    optimizer.step()
    again, other, _ = made()
    again.load_state_dict(manager.state_dict())
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(net.eval()(x), other.eval()(x))


def test_without_training_affine_weights_are_rounded_to_the_nearest() -> None:
    torch.manual_seed(0)
    model, data = shifted(GptBlock()), [torch.randn(8, 70) for _ in range(4)]
    chosen = affine(4, 32).scheme
    found = quantize_model(model, data, scheme=chosen, least_samples=8)
    assert {one.rounding for one in found.layers} == {"nearest"}
    inner: Any = found.model.get_submodule("inner")
    wanted = by_hand(inner.weight.detach(), 4, 32)
    with torch.no_grad():
        got = inner(data[0])
        torch.testing.assert_close(got, nn.functional.linear(data[0], wanted, inner.bias), rtol=1e-5, atol=1e-5)
    for rounding in ("gptq", "adaround"):
        with pytest.raises(ArgumentError, match=r"the weights of inner are affine .* rounding='auto'"):
            quantize_model(model, data, scheme=chosen, least_samples=8, rounding=rounding)  # type: ignore[arg-type]
