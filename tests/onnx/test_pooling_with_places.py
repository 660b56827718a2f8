"""Max pooling that also gives where it found its values, as SegNet's: the places are integers of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify import export_onnx, verify_onnx
from sparsify.onnx.float_kernels import compute
from sparsify.onnx.runtime import open_session, run_session
from tests.loops import quantized, train
from tests.zoo.quantizable import images
from tests.zoo.small import written


def segnet(self: Any, x: Tensor) -> Tensor:
    """Down and up again, to the places that the maxima had."""
    x, places = F.max_pool2d(F.relu(self.first(x)), 2, return_indices=True)
    return self.last(F.max_unpool2d(F.relu(self.inner(x)), places, 2))


def by_modules(self: Any, x: Tensor) -> Tensor:
    """The same in modules, with windows that overlap and reach over the edge."""
    x, places = self.pool(F.relu(self.first(x)))
    return self.last(self.unpool(F.relu(self.inner(x)), places, output_size=(12, 12)))


def pooled_only(self: Any, x: Tensor) -> Tensor:
    """The places are an answer of the network."""
    values, places = F.adaptive_max_pool2d(F.relu(self.first(x)), (4, 4), return_indices=True)
    return self.last(F.relu(self.inner(values))) + places.float().mean() * 0


def network(forward: Any) -> Any:
    torch.manual_seed(0)
    layers = {name: nn.Conv2d(*shape, 3, padding=1) for name, shape in CHANNELS.items()}
    pool = nn.MaxPool2d(3, 2, 1, return_indices=True)
    return written(forward, **layers, pool=pool, unpool=nn.MaxUnpool2d(3, 2, 1))


CHANNELS = {"first": (3, 6), "inner": (6, 6), "last": (6, 2)}


@pytest.mark.parametrize("forward", [segnet, by_modules, pooled_only])
def test_the_values_go_on_in_integers_and_the_places_are_those_of_torch(forward: Any, tmp_path: Path) -> None:
    model, inputs = network(forward), images()
    quantized(model, inputs)
    train(model, inputs, 2)
    model.eval()
    path = export_onnx(model, (inputs,), tmp_path / "model.onnx").path
    found = verify_onnx(model, path, (inputs,))
    assert found.ok and found.exact, str(found)
    assert not {each.operator for each in found.unfused} & {"Conv", "MaxPool", "Relu"}


def test_places_that_the_model_returns_are_those_of_torch(tmp_path: Path) -> None:
    model: Any = written(
        lambda self, x: F.max_pool2d(F.relu(self.first(x)), 2, return_indices=True), first=nn.Conv2d(3, 6, 3)
    )
    inputs = images()
    quantized(model, inputs)
    model(inputs)
    model.eval()
    path = export_onnx(model, (inputs,), tmp_path / "model.onnx").path
    session = open_session(path)
    values, places = run_session(session, {session.get_inputs()[0].name: inputs.numpy()}).values()
    expected, where = model(inputs)
    assert np.array_equal(places, where.numpy()) and np.allclose(values, expected.detach().numpy(), atol=1e-6)


def test_the_reference_has_the_places_of_torch() -> None:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 6, (2, 3, 7, 6)).astype(np.uint8)
    node = helper.make_node("MaxPool", ["x"], ["y", "at"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    values, places = compute(node, [x], 18)
    expected, where = F.max_pool2d(torch.tensor(x).float(), 3, 2, 1, return_indices=True)
    # torch counts within a channel, ONNX in all of the tensor.
    planes = np.arange(6).reshape(2, 3, 1, 1) * 42
    assert np.array_equal(values, expected.numpy()) and np.array_equal(places, where.numpy() + planes)
    assert places.dtype == helper.tensor_dtype_to_np_dtype(TensorProto.INT64)
