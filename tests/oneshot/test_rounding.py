"""Which neighbour on the grid a weight becomes, and what that does to a layer's output."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsify.oneshot.rounding import adaround, clipped_scale, gptq, nearest, output_error
from sparsify.quantization.straight_through import weight_integers, weight_scale

LARGEST = 7
SHAPES = [(1, 24, 64), (16, 1, 9), (2, 8, 36)]


def drawn(groups: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and inputs (G, n, K) to calibrate on and held out, whose columns hang together as in a network."""
    torch.manual_seed(columns)
    mix = torch.randn(groups, columns, columns) / columns**0.5
    x = torch.randn(groups, 4000, columns) @ mix + 0.7 * torch.randn(groups, 4000, 1)
    return 0.1 * torch.randn(groups, rows, columns), x[:, :2000], x[:, 2000:]


def moment(x: Tensor) -> Tensor:
    return x.mT @ x / x.shape[1]


def error_on(x: Tensor, weight: Tensor, rounded: Tensor) -> float:
    """The mean squared error of the output, computed the long way."""
    return ((x @ rounded.mT - x @ weight.mT) ** 2).mean().item()


def scale_of(weight: Tensor, second: Tensor) -> Tensor:
    return clipped_scale(weight, second.diagonal(dim1=1, dim2=2), q_max=LARGEST)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "share"), [(adaround, 0.9), (gptq, 0.9)])
def test_learned_rounding_lowers_the_error_of_the_output_on_held_out_inputs(
    method: object, share: float, shape: tuple[int, int, int]
) -> None:
    weight, x, held = drawn(*shape)
    second = moment(x)
    scale = scale_of(weight, second)
    plain = error_on(held, weight, nearest(weight, scale, LARGEST))
    assert error_on(held, weight, method(weight, second, scale, LARGEST)) < share * plain  # type: ignore[operator]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [nearest, adaround, gptq])
def test_a_layer_that_quantizes_once_more_leaves_rounded_weights_as_they_are(
    method: object, shape: tuple[int, int, int]
) -> None:
    weight, x, _ = drawn(*shape)
    second = moment(x)
    scale = scale_of(weight, second)
    arguments = (weight, scale, LARGEST) if method is nearest else (weight, second, scale, LARGEST)
    rows = method(*arguments).reshape(-1, shape[2])  # type: ignore[operator]
    again = weight_integers(rows, weight_scale(rows, axis=0, q_max=LARGEST))
    wanted = (rows / scale.reshape(-1, 1)).round()
    assert torch.equal(again, wanted)
    assert wanted.abs().amax(1).eq(LARGEST).all()


def test_adaround_moves_no_weight_further_than_to_its_other_neighbour() -> None:
    weight, x, _ = drawn(1, 8, 36)
    second = moment(x)
    scale = scale_of(weight, second)
    inside = weight.abs() < scale * LARGEST
    moved = ((adaround(weight, second, scale, LARGEST) - weight) / scale).abs()[inside]
    assert moved.max() < 1.0 + 1e-4
    assert moved.max() > 0.5


def test_gptq_is_nearest_where_inputs_do_not_hang_together() -> None:
    weight, _, _ = drawn(1, 8, 36)
    second = torch.eye(36).expand(1, 36, 36)
    scale = scale_of(weight, second)
    assert torch.equal(gptq(weight, second, scale, LARGEST), nearest(weight, scale, LARGEST))


def test_rounding_by_blocks_is_rounding_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, _ = drawn(1, 8, 64)
    second = moment(x)
    scale = scale_of(weight, second)
    whole = gptq(weight, second, scale, LARGEST)
    monkeypatch.setattr("sparsify.oneshot.rounding.BLOCK", 5)
    assert (gptq(weight, second, scale, LARGEST) != whole).float().mean() < 0.01


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    weight, x, _ = drawn(1, 8, 36)
    x[..., :30] = 0.0
    second = moment(x)
    scale = scale_of(weight, second)
    for method in (gptq, adaround):
        assert method(weight, second, scale, LARGEST).isfinite().all()
    assert gptq(weight, torch.zeros_like(second), scale, LARGEST).isfinite().all()


def test_a_clipped_scale_has_less_error_than_the_largest_weight_asks_for() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 4, 400)
    weight[:, 0] = 0.0
    importance = torch.ones(1, 400)
    for bits in (3, 4):
        q_max = 2 ** (bits - 1) - 1
        whole = weight.abs().amax(-1, keepdim=True).clamp(min=1e-12) / q_max
        found = clipped_scale(weight, importance, q_max=q_max)
        assert (found <= whole).all() and (found > 0).all()

        def error(scale: Tensor, q_max: int = q_max) -> Tensor:
            return (nearest(weight, scale, q_max) - weight).square().sum(-1)[:, 1:]

        assert (error(found) < 0.9 * error(whole)).all()


def test_one_scale_for_all_rows_is_one_scale() -> None:
    weight = torch.randn(2, 4, 10)
    scale = clipped_scale(weight, torch.ones(2, 10), q_max=7, shared=True)
    assert scale.shape == (2, 4, 1) and scale.unique().numel() == 1


def test_the_error_of_the_output_is_the_mean_square_of_what_a_layer_gives() -> None:
    difference, x, _ = drawn(2, 8, 36)
    wanted = (x @ difference.mT).square().mean(1)
    assert torch.allclose(output_error(difference, moment(x)), wanted, rtol=1e-4)
