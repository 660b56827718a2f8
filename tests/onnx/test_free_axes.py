"""Axes of any size beside the batch: named in the file, and computed rightly at sizes that the sample had not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify import ArgumentError, ExportError, export_onnx, quantize_model, verify_onnx


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ).eval()


SIDES = {"input": {2: "height", 3: "width"}}


def test_images_of_any_size_run_in_integers(tmp_path: Path) -> None:
    model = quantize_model(convolutions(), [torch.randn(16, 3, 16, 16)]).model
    found = export_onnx(model, torch.randn(2, 3, 16, 16), tmp_path / "m.onnx", dynamic_axes=SIDES)
    assert found.inputs == {"input": ("batch", 3, "height", "width")} and not found.floating
    for shape in ((2, 3, 16, 16), (1, 3, 8, 24), (3, 3, 21, 13)):
        assert verify_onnx(model, found, torch.randn(shape)).exact


class Tagger(nn.Module):
    """Attention over words with a mask, and a tag for each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(50, 16), nn.Embedding(64, 16)
        self.query, self.key, self.value, self.head = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        parts = (layer(hidden).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        found = functional.scaled_dot_product_attention(*parts, attn_mask=mask[:, None, None, :].bool())
        logits: Tensor = self.head(found.transpose(1, 2).flatten(2))
        return logits


def words(count: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(count, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    return {"ids": torch.randint(50, (count, length)), "mask": mask}


LENGTH = {"ids": {1: "length"}, "mask": {1: "length"}}


def test_texts_of_any_length_run_in_integers(tmp_path: Path) -> None:
    model = quantize_model(Tagger().eval(), [words(16, 12)]).model
    found = export_onnx(model, words(2, 12), tmp_path / "m.onnx", dynamic_axes=LENGTH)
    assert dict(found.inputs) == {"ids": ("batch", "length"), "mask": ("batch", "length")} and not found.floating
    assert found.outputs["output"] == ("batch", "length", 16)
    for length in (12, 5, 40):
        assert verify_onnx(model, found, words(3, length)).exact


def test_a_fixed_batch_goes_with_a_free_length(tmp_path: Path) -> None:
    found = export_onnx(Tagger(), words(1, 12), tmp_path / "m.onnx", dynamic_batch=False, dynamic_axes=LENGTH)
    assert found.inputs["ids"] == (1, "length") and verify_onnx(Tagger().eval(), found, words(1, 7))


WRONG: list[tuple[Any, str]] = [
    ([("input", 1)], "is no mapping"),
    ({"inputs": {2: "height"}}, "Did you mean 'input'"),
    ({"input": ["height"]}, "is no mapping of axes to names"),
    ({"input": {4: "depth"}}, "axes 0 to 3"),
    ({"input": {"2": "height"}}, "axes 0 to 3"),
    ({"input": {2: ""}}, "is no name"),
    ({"input": {0: "items"}}, "this is the batch"),
    ({"input": {2: "batch"}}, "give another name"),
    ({"input": {2: "side", 1: "side"}}, "is 3 here and 16"),
    ({"input": {2: "height", -2: "width"}}, "two names"),
]


@pytest.mark.parametrize(("axes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_axes_that_cannot_be_meant_are_refused(tmp_path: Path, axes: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        export_onnx(convolutions(), torch.randn(2, 3, 16, 16), tmp_path / "m.onnx", dynamic_axes=axes)
    assert not list(tmp_path.iterdir())


class Fixed(nn.Module):
    """Takes images of one size."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self._forward = nn.Linear(4, 4), forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.layer(x))


@pytest.mark.parametrize("forward", [lambda x: x.reshape(-1, 6, 4), lambda x: x + torch.ones(6, 1)])
def test_a_forward_that_fixes_a_size_is_refused(tmp_path: Path, forward: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ExportError, match="dynamic_axes"):
        export_onnx(Fixed(forward), torch.randn(2, 6, 4), tmp_path / "m.onnx", dynamic_axes={"x": {1: "length"}})
    assert not list(tmp_path.iterdir())


def test_a_size_of_one_is_refused_since_tracing_takes_it_for_a_constant(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="give 2 or more"):
        export_onnx(Tagger(), words(2, 1), tmp_path / "m.onnx", dynamic_axes=LENGTH)
