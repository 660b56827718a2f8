"""Behind a top-k or a sort places of equal scores are compared as sets, and what differs otherwise is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsify.onnx.export import export_onnx
from sparsify.onnx.ties import ScoreOrder, in_one_order
from sparsify.onnx.verify import verify_onnx
from tests.loops import quantized
from tests.zoo.small import written


def detections(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best of all pixels and classes, their labels and boxes."""
    hidden = F.relu(self.backbone(x))
    scores = self.classes(hidden).flatten(2).transpose(1, 2).sigmoid().flatten(1)
    boxes = self.boxes(hidden).flatten(2).transpose(1, 2)
    best, at = scores.topk(12)
    return best, at % 3, boxes.gather(1, (at // 3).unsqueeze(-1).expand(-1, -1, 4))


def test_detections_of_equal_scores_come_in_any_order_and_it_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, x = tmp_path / "model.onnx", torch.randn(8, 3, 6, 6)
    model = written(detections, backbone=nn.Conv2d(3, 8, 3), classes=nn.Conv2d(8, 3, 1), boxes=nn.Conv2d(8, 4, 1))
    quantized(model, x)
    model(x)
    export_onnx(model.eval(), (x,), path)
    found = verify_onnx(model, path, (x,))
    assert found.ok and found.unproven is None, str(found)
    assert all(each.tied > 0 for each in found.outputs if each.output != "output_0")
    assert "places of equal scores were compared as sets" in str(found)
    with torch.no_grad():
        model.boxes.bias += 1.0
    assert not verify_onnx(model, path, (x,))


def test_a_sort_of_many_zeros_agrees_also_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, x = tmp_path / "model.onnx", torch.randn(8, 16)
    model = written(lambda self, x: F.relu(self.layer(x)).sort(-1, descending=True), layer=nn.Linear(16, 40))
    export_onnx(model.eval(), (x,), path)
    found = verify_onnx(model, path, (x,))
    assert found.ok and {each.tied for each in found.outputs if each.output == "output_1"} != {0}, str(found)


def test_rows_of_equal_scores_are_one_set_and_the_cut_end_is_left_out() -> None:
    ranking = ScoreOrder("scores", "best", -1)
    scores = np.float32([[0.5, 0.9, 0.5, 0.1, 0.1, 0.1]])
    values = {"scores": scores, "best": np.float32([[0.9, 0.5, 0.5, 0.1]])}
    same = in_one_order(np.int64([[1, 0, 2, 3]]), np.int64([[1, 2, 0, 5]]), ranking, values)
    assert (same.expected == same.found).all() and (same.places, same.cut) == (3, 1)
    other = in_one_order(np.int64([[1, 0, 2, 3]]), np.int64([[1, 0, 0, 3]]), ranking, values)
    assert (other.expected != other.found).sum() == 1
    swapped = in_one_order(np.int64([[1, 0, 2, 3]]), np.int64([[0, 1, 2, 3]]), ranking, values)
    assert (swapped.expected != swapped.found).any()
    boxes = np.float32([[[0, 0], [1, 5], [2, 6], [3, 3]]])
    paired = in_one_order(boxes, boxes[:, [0, 2, 1, 3]] + np.float32(1e-7), ranking, values)
    assert np.allclose(paired.expected, paired.found, atol=1e-6)
