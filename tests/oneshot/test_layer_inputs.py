"""What layers read, as moments; and biases that take back a shifted mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsify.oneshot import layer_inputs
from sparsify.oneshot.bias_correction import can_correct, correct, mean_shift
from sparsify.oneshot.layer_inputs import Moments, as_matrix, columns, gather, set_matrix

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(6, 4), (3, 5, 6)),
    (nn.Linear(6, 4, bias=False), (6,)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 9)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 9, 7)),
    (nn.Conv2d(4, 8, (3, 1), padding="same", dilation=2, groups=4, padding_mode="reflect"), (2, 4, 9, 7)),
    (nn.Conv2d(4, 4, 3, padding=(1, 2), padding_mode="circular", bias=False), (4, 9, 7)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS)
def test_a_layer_is_its_matrix_times_the_columns_that_it_reads(layer: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    matrix = as_matrix(layer)
    got = (matrix @ columns(layer, x)).flatten(0, 1)
    y: Tensor = layer(x)
    if isinstance(layer, nn.Linear):
        wanted = y.reshape(-1, y.shape[-1]).T
    else:
        y = y if y.dim() == len(layer.kernel_size) + 2 else y.unsqueeze(0)
        wanted = y.transpose(0, 1).flatten(1)
    if layer.bias is not None:
        wanted = wanted - layer.bias[:, None]
    assert torch.allclose(got, wanted, atol=1e-5)
    set_matrix(layer, 2 * matrix.detach())
    assert torch.equal(as_matrix(layer), 2 * matrix.detach()) or torch.allclose(as_matrix(layer), matrix)


def test_moments_of_batches_are_those_of_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(5, 2)
    x, y = torch.randn(40, 5), torch.randn(40, 5)
    moments = Moments(layer)
    for start, stop in ((0, 7), (7, 8), (8, 40)):
        moments.add(x[start:stop], y[start:stop])
    assert torch.allclose(moments.mean[0], x.mean(0), atol=1e-6)
    assert torch.allclose(moments.mean_float[0], y.mean(0), atol=1e-6)
    assert torch.allclose(moments.second[0], x.T @ x / 40, atol=1e-6)
    assert moments.cross is not None and torch.allclose(moments.cross[0], x.T @ y / 40, atol=1e-6)
    monkeypatch.setattr(layer_inputs, "ROWS_AT_ONCE", 10)
    few = Moments(layer)
    few.add(x)
    assert few.rows == 10
    assert torch.allclose(few.mean[0], x.mean(0), atol=1e-6)


def test_layers_are_watched_call_by_call_and_no_further_than_needed() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 4)
            self.after = nn.Linear(4, 1)
            self.ran = 0

        def forward(self, x: Tensor) -> Tensor:
            x = self.line(self.line(x))
            self.ran += 1
            return self.after(x)

    model = Twice()
    x = torch.randn(6, 4)
    found = gather(model, ["line"], [x], reference=model, calls={"line": 2})["line"]
    assert model.ran == 0 and found.columns == 12
    both = torch.cat([x, model.line(x)])
    assert torch.allclose(found.mean[0], both.mean(0), atol=1e-6)
    assert found.cross is not None and torch.allclose(found.cross, found.second, atol=1e-6)
    gather(model, ["line"], [x])
    assert model.ran == 1


@pytest.mark.parametrize("with_norm", [False, True])
def test_correcting_takes_back_the_shift_of_the_mean(with_norm: bool) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, bias=not with_norm)
    norm = nn.BatchNorm2d(5).eval() if with_norm else None
    if norm is not None:
        with torch.no_grad():
            for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                tensor.copy_(torch.rand(5) + 0.5)
            norm.weight[0] = -0.7
    x = torch.rand(8, 3, 6, 6)

    def mean() -> Tensor:
        y = conv(x) if norm is None else norm(conv(x))
        return y.mean((0, 2, 3)).detach()

    before, weight = mean(), as_matrix(conv).detach().clone()
    rounded = (weight * 3).round() / 3
    set_matrix(conv, rounded)
    assert (mean() - before).abs().max() > 0.02
    moments = Moments(conv, with_second=False)
    moments.add(x)
    assert can_correct(conv, norm)
    correct(conv, norm, mean_shift(weight, moments.mean_float, rounded, moments.mean))
    assert (mean() - before).abs().max() < 1e-5


def test_a_layer_without_bias_or_norm_cannot_be_corrected() -> None:
    assert not can_correct(nn.Linear(2, 2, bias=False), None)
