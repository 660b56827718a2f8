"""Masks against a reference by sorting, and the Masker against every optimizer and every way a model is replaced."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify.errors import DataError, StateError, TargetError
from sparsify.model import distributed
from sparsify.pruning import selection
from sparsify.pruning.masker import Masker
from sparsify.pruning.masks import MaskType, compute_masks

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda w: w,
    "tied": lambda w: (w * 2).round() / 2,
    "equal": lambda w: torch.full_like(w, -0.5),
    "zeros": lambda w: torch.zeros_like(w),
    "mostly zeros": lambda w: w * (w.abs() > 1.2),
    "tiny": lambda w: w * 1e-40,  # denormals
    "signed zeros": lambda w: torch.where(w > 0, 0.0, -0.0) * (w.abs() > 0.3) + w * (w.abs() <= 0.3),
}


def draw(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return VALUES[kind](torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def sorted_reference(scores: list[Tensor], kept: list[Tensor | None], count: int, absolute: bool) -> list[Tensor]:
    """The same by a stable sort of all scores, those gone first: slow and plain."""
    keys = []
    for score, mask in zip(scores, kept, strict=True):
        key = np.array([float(v) for v in score.reshape(-1)])
        key = (np.abs(key) if absolute else key) + 0.0
        keys.append(key if mask is None else np.where(mask.reshape(-1).numpy(), key, -np.inf))
    pruned = np.argsort(np.concatenate(keys), kind="stable")[:count]
    flat = np.ones(sum(len(k) for k in keys), bool)
    flat[pruned] = False
    masks, at = [], 0
    for score, mask in zip(scores, kept, strict=True):
        own = torch.from_numpy(flat[at : at + score.numel()].copy()).view(score.shape)
        masks.append(own if mask is None else own & mask)
        at += score.numel()
    return masks


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3),
    dtype=st.sampled_from(DTYPES),
    fraction=st.floats(0, 1),
    pruned=st.floats(0, 1),
    absolute=st.booleans(),
    chunk=st.sampled_from([7, 64, 1 << 16]),
    small=st.sampled_from([0, 50_000]),
    seed=st.integers(0, 1000),
)
def test_the_selection_equals_a_stable_sort(
    kinds: list[str],
    dtype: torch.dtype,
    fraction: float,
    pruned: float,
    absolute: bool,
    chunk: int,
    small: int,
    seed: int,
) -> None:
    shapes = [(5, 60), (17,), (2, 3, 4)]
    scores = {str(i): draw(kind, shapes[i], dtype, seed + i) for i, kind in enumerate(kinds)}
    total = sum(score.numel() for score in scores.values())
    some = torch.rand(5, 60, generator=torch.Generator().manual_seed(seed)) >= pruned
    kept = {"0": some} if seed % 2 else {}
    count = round(fraction * total)
    expected = sorted_reference(list(scores.values()), [kept.get(n) for n in scores], count, absolute)
    with pytest.MonkeyPatch.context() as patch:  # small chunks and samples take every path at sizes that run fast
        patch.setattr(selection, "_CHUNK", chunk)
        patch.setattr(selection, "_SMALL", small)
        got = selection.mask_lowest(scores, count, kept=kept, absolute=absolute)
        elsewhere = selection._on_device(scores, count, kept, absolute)
    for name, want in zip(scores, expected, strict=True):
        assert torch.equal(got[name], want)
        assert torch.equal(elsewhere[name], want)


@pytest.mark.parametrize("kind", sorted(VALUES))
@pytest.mark.parametrize("sparsity", [0.0, 1e-5, 0.5, 0.8123, 1.0])
def test_large_tensors_have_exact_counts(kind: str, sparsity: float) -> None:
    weight = draw(kind, (300, 401), torch.float32, 3)
    first = compute_masks({"w": weight}, sparsity / 2)["w"]
    mask = compute_masks({"w": weight}, sparsity, previous={"w": first})["w"]
    assert int((~mask).sum()) == round(weight.numel() * sparsity)
    assert not (mask & ~first).any()
    assert torch.equal(mask, sorted_reference([weight], [first], round(weight.numel() * sparsity), True)[0])


@given(st.integers(0, 200), st.floats(0, 1), st.sampled_from(sorted(VALUES)), st.sampled_from(DTYPES))
def test_a_mask_has_exactly_the_rounded_count_and_only_grows(
    size: int, sparsity: float, kind: str, dtype: torch.dtype
) -> None:
    weight = draw(kind, (size,), dtype, size)
    previous: dict[str, Tensor] = {}
    for step in (0.25, 0.5, 1.0):
        mask = compute_masks({"w": weight}, sparsity * step, previous=previous)["w"]
        assert int((~mask).sum()) == round(size * sparsity * step)
        assert "w" not in previous or not (mask & ~previous["w"]).any()
        previous = {"w": mask}
        weight = weight.flip(0)  # other weights are lowest now: what is gone stays gone


def test_counts_round_as_the_promise_says() -> None:
    assert int((~compute_masks({"w": torch.randn(100)}, 0.29)["w"]).sum()) == 29
    assert int((~compute_masks({"w": torch.randn(8192)}, 0.05)["w"]).sum()) == 410


@pytest.mark.parametrize("text", ["unstructured", "block4", [2, 2], [-1, 1], "2:4", "3:5"])
def test_the_memory_format_changes_nothing(text: str | list[int]) -> None:
    kind = MaskType.parse(text)
    weight = draw("tied", (8, 20, 3, 3), torch.float32, 1)
    strided = torch.empty(8, 20, 3, 6)[..., ::2].copy_(weight)
    masks = [
        compute_masks({"w": w}, 0.4, kind)["w"]
        for w in (weight, weight.contiguous(memory_format=torch.channels_last), strided)
    ]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


def test_threads_change_nothing() -> None:
    weight = draw("tied", (400, 300), torch.float32, 1)
    before = torch.get_num_threads()
    try:
        masks = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            masks.append(
                [compute_masks({"w": weight}, 0.4, MaskType.parse(t))["w"] for t in ("unstructured", "2:4", "block4")]
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))


def test_one_ranking_over_all_takes_the_lowest_of_all() -> None:
    scores = {"low": torch.randn(50, 20) * 0.1, "high": torch.randn(500) * 10, "half": torch.randn(30).half()}
    masks = compute_masks(scores, 0.6, together=True)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert pruned == round(1530 * 0.6)
    lowest_kept = min(scores[n].abs().float()[m].min() for n, m in masks.items() if m.any())
    assert all(scores[n].abs().float()[~m].max() <= lowest_kept for n, m in masks.items() if not m.all())


def by_hand_blocks(weight: Tensor, a: int, b: int, sparsity: float) -> Tensor:
    outputs, inputs = weight.shape[:2]
    flat = weight.reshape(outputs, inputs, -1)
    units = []
    for o in range(0, outputs, a):
        for i in range(0, inputs, b):
            for k in range(flat.shape[2]):
                units.append((float(flat[o : o + a, i : i + b, k].abs().double().mean()), len(units), o, i, k))
    mask = torch.ones_like(flat, dtype=torch.bool)
    for _, _, o, i, k in sorted(units)[: round(len(units) * sparsity)]:
        mask[o : o + a, i : i + b, k] = False
    return mask.reshape(weight.shape)


@pytest.mark.parametrize("shape", [(8, 12), (4, 8, 3), (4, 8, 3, 2)])
@pytest.mark.parametrize(("text", "a", "b"), [("block4", 1, 4), ("block", 1, 4), ([2, 2], 2, 2), ([4, -1], 4, 0)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 1.0])
def test_blocks_go_as_a_whole(shape: tuple[int, ...], text: str | list[int], a: int, b: int, sparsity: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    mask = compute_masks({"w": weight}, sparsity, MaskType.parse(text))["w"]
    assert torch.equal(mask, by_hand_blocks(weight, a, b or shape[1], sparsity))
    turned = compute_masks({"w": weight.transpose(0, 1)}, sparsity, MaskType.parse(text), input_dims={"w": 0})["w"]
    assert torch.equal(turned, mask.transpose(0, 1))


@pytest.mark.parametrize(("keep", "of"), [(1, 2), (2, 4), (1, 4), (3, 5), (4, 4), (2, 8), (8, 32), (1, 20)])
@pytest.mark.parametrize("kind", ["dense", "tied", "equal", "mostly zeros"])
@pytest.mark.parametrize("shape", [(6, 160), (4, 160, 3, 3)])
def test_n_of_m_ramps_exactly_and_never_empties_a_group(keep: int, of: int, kind: str, shape: tuple[int, ...]) -> None:
    weight = draw(kind, shape, torch.float32, 8)
    previous: dict[str, Tensor] = {}
    last = 1 - keep / of
    for sparsity in (0.05 * last, 0.5 * last, 0.9 * last, last):
        mask = compute_masks({"w": weight}, sparsity, MaskType.parse(f"{keep}:{of}"), previous=previous)["w"]
        assert int((~mask).sum()) == round(weight.numel() * sparsity)
        groups = mask.movedim(1, -1).reshape(-1, of)
        assert int((~groups).sum(1).max()) <= of - keep
        assert not previous or not (mask & ~previous["w"]).any()
        previous = {"w": mask}
        weight = torch.where(mask, weight, 0.0).flip(0) if kind == "tied" else torch.where(mask, weight, 0.0)
    assert (groups.sum(1) == keep).all()


def test_two_of_four_keeps_the_largest_two() -> None:
    mask = compute_masks({"w": torch.tensor([[1.0, -4.0, 3.0, 2.0]])}, 0.5, MaskType.parse("tensorrt"))["w"]
    assert mask.tolist() == [[False, True, True, False]]
    weight = torch.randn(3, 8, 2, 2)
    mask = compute_masks({"w": weight}, 0.5, MaskType.parse("2:4"))["w"]
    top = weight.abs().movedim(1, -1).reshape(-1, 4).topk(2).indices
    assert mask.movedim(1, -1).reshape(-1, 4).gather(1, top).all()


@pytest.mark.parametrize(
    ("text", "shape", "dim", "why"),
    [
        ("2:4", (4, 6), 1, "has 6 input channels, which 4 does not divide"),
        ("2:4", (4, 6), 0, None),
        ("block4", (4, 6), 1, "has 6 input channels, which 4 does not divide"),
        ([3, 2], (4, 6), 1, "has 4 output channels, which 3 does not divide"),
        ([-1, -1], (5, 7), 1, None),
        ("block4", (8,), 1, "has 1 dimension, but [1, 4] needs 2 or more"),
        ("unstructured", (8,), 1, None),
    ],
)
def test_what_does_not_fit_says_why(text: str | list[int], shape: tuple[int, ...], dim: int, why: str | None) -> None:
    assert MaskType.parse(text).why_unfit(torch.Size(shape), dim) == why


@pytest.mark.parametrize("text", ["unstructured", "2:4", "block4"])
@pytest.mark.parametrize("size", [8, 90_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_refused_by_name(text: str, size: int, dtype: torch.dtype) -> None:
    if text == "block4" and dtype == torch.float64:
        size = 8
    weight = torch.randn(2, size).to(dtype)
    weight[1, 3] = float("nan")
    for sparsity in (0.0, 0.5):
        with pytest.raises(DataError, match="'w' holds NaN"):
            compute_masks({"w": weight}, sparsity, MaskType.parse(text))
    with pytest.raises(DataError, match="'w' holds NaN"):
        selection.mask_lowest({"w": -weight}, size)


@pytest.mark.parametrize(("kind", "dims"), [("filter", {"a": 0, "b": 0}), ("channel", {"a": 1, "b": 1})])
@pytest.mark.parametrize("together", [False, True])
def test_whole_channels_go_by_the_root_of_their_mean_square(kind: str, dims: dict[str, int], together: bool) -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(6, 4, 3, 3), "b": 3 * torch.randn(10, 8)}
    masks: dict[str, Tensor] = {}
    for sparsity in (0.0, 0.3, 0.5, 1.0):
        importance = {
            name: torch.stack([part.square().mean().sqrt() for part in weight.unbind(dims[name])])
            for name, weight in weights.items()
        }
        masks = compute_masks(weights, sparsity, MaskType.parse(kind), previous=masks, together=together)
        for group in [["a", "b"]] if together else [["a"], ["b"]]:
            ranked = sorted((float(w), name, i) for name in group for i, w in enumerate(importance[name]))
            pruned = {(name, i) for _, name, i in ranked[: round(len(ranked) * sparsity)]}
            for name in group:
                for i, part in enumerate(masks[name].unbind(dims[name])):
                    assert bool(part.any()) == bool(part.all()) == ((name, i) not in pruned)


def test_channels_of_transposed_weights_lie_the_other_way() -> None:
    weight = torch.tensor([[1.0, 5.0, 1.0], [1.0, 5.0, 1.0]])
    mask = compute_masks({"w": weight}, 2 / 3, MaskType.parse("filter"), input_dims={"w": 0})["w"]
    assert mask.tolist() == [[False, True, False]] * 2


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.fc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.conv(x).relu().mean((2, 3)))
        return out


def masked(model: nn.Module, optimizer: Any = None, sparsity: float = 0.6) -> Masker:
    masker = Masker(model, optimizer)
    for name in ("conv.weight", "fc.weight"):
        masker.set(name, compute_masks({name: model.get_parameter(name)}, sparsity)[name])
    return masker


def step(model: nn.Module, optimizer: Any, dtype: torch.dtype = torch.float32) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.randn(5, 4, 6, 6, dtype=dtype)).float().square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


SETTINGS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    "RMSprop": {"lr": 1e-2, "momentum": 0.9, "centered": True, "weight_decay": 1e-2},
    "LBFGS": {"lr": 0.1, "max_iter": 3},
    "Adam": {"lr": 1e-2, "amsgrad": True, "weight_decay": 1e-2},
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "ASGD": {"lr": 0.1, "weight_decay": 1e-2, "t0": 0},
}
OPTIMIZERS = sorted(
    name
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
)


def make(name: str, model: nn.Module) -> Any:
    cls = getattr(torch.optim, name)
    parameters = [p for p in model.parameters() if p.dim() == 2] if name == "Muon" else model.parameters()
    return cls(parameters, **SETTINGS.get(name, {"lr": 1e-2}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_masked_stays_zero_under_every_optimizer(name: str) -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = make(name, model)
    step(model, optimizer)
    masker = masked(model, optimizer)
    masks = masker.masks
    for parameter in (model.conv.weight, model.fc.weight):
        for key, value in optimizer.state.get(parameter, {}).items():
            if key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
                own = masks["conv.weight" if parameter is model.conv.weight else "fc.weight"]
                first = optimizer.param_groups[0]["lr"] if key == "step_size" else 0.0
                assert (value[~own] == first).all(), key
    kept = model.fc.weight.detach().clone()
    for _ in range(4):
        step(model, optimizer)
        masker.apply()
        for parameter_name, mask in masks.items():
            weight = model.get_parameter(parameter_name)
            assert (weight[~mask] == 0).all()
            assert weight.isfinite().all()
    assert (model.fc.weight != kept)[masks["fc.weight"]].any(), "nothing was trained"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtype_and_memory_format_change_nothing(dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = Small().to(dtype).to(memory_format=layout)
    optimizer = make("SGD", model)
    step(model, optimizer, dtype)
    masker = masked(model, optimizer)
    step(model, optimizer, dtype)
    masker.apply()
    mask = masker.masks["conv.weight"]
    assert mask.stride() == model.conv.weight.stride()
    assert (model.conv.weight[~mask] == 0).all()
    assert not torch.signbit(model.conv.weight[~mask]).any()
    assert (model.conv.weight[mask] != 0).all()


def test_infinite_and_nan_weights_are_masked_to_zero() -> None:
    model = Small()
    masker = masked(model)
    mask = masker.masks["fc.weight"]
    model.fc.weight.data[~mask] = float("inf")
    masker.apply()
    assert (model.fc.weight[~mask] == 0).all()


def test_baking_masks_in_makes_zeros_of_infinite_and_nan_weights_too() -> None:
    model = Small()
    masker = masked(model)
    masks = masker.masks
    model.fc.weight.data[~masks["fc.weight"]] = float("inf")
    model.conv.weight.data[~masks["conv.weight"]] = float("nan")
    masker.finalize()
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert (weight[~mask] == 0).all() and not torch.signbit(weight[~mask]).any()


def test_parameters_are_found_again_when_their_objects_were_replaced() -> None:
    model = Small()
    masker = masked(model)
    mask = masker.masks["fc.weight"].clone()

    def is_masked() -> bool:
        masker.apply()
        return bool((model.fc.weight[~mask] == 0).all() and (model.fc.weight[mask] != 0).all())

    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()}, assign=True)
    assert is_masked()
    model.to("meta")
    masker.apply()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    assert is_masked()
    model.fc.weight.data = torch.ones(6, 8)
    assert is_masked()
    model.double()
    nn.init.ones_(model.fc.weight)
    assert is_masked()
    model.to(memory_format=torch.channels_last)
    model.conv.weight.data.fill_(1.0)
    masker.apply()
    assert int((model.conv.weight == 0).sum()) == round(288 * 0.6)
    model.fc = nn.Linear(8, 6)
    masker.check()
    assert is_masked()


def test_the_model_stays_as_it_is() -> None:
    model = Small()
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    masker = masked(model)
    masker.apply()
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == keys
    assert type(model) is Small
    pickle.loads(pickle.dumps(model))
    copy.deepcopy(model)
    masker.finalize()
    assert not torch.signbit(model.fc.weight[model.fc.weight == 0]).any()
    assert masker.names == []
    masker.finalize()


def test_removing_a_mask_leaves_zeros_without_momentum() -> None:
    model = Small()
    optimizer = make("SGD", model)
    masker = masked(model, optimizer)
    mask = masker.masks["fc.weight"]
    step(model, optimizer)
    masker.remove("fc.weight")
    assert (model.fc.weight[~mask] == 0).all()
    assert (optimizer.state[model.fc.weight]["momentum_buffer"][~mask] == 0).all()
    assert masker.names == ["conv.weight"]
    masker.remove("fc.weight")
    step(model, optimizer)
    masker.apply()
    assert (model.fc.weight != 0).any()


def test_a_mask_before_the_first_step_leaves_the_optimizer_s_state_empty() -> None:
    model = Small()
    optimizer = make("Adam", model)
    masked(model, optimizer)
    assert len(optimizer.state) == 0
    step(model, optimizer)


def test_gradients_can_be_masked() -> None:
    model = Small()
    masker = masked(model)
    masker.apply_to_grads()  # there are none yet
    model(torch.randn(5, 4, 6, 6)).sum().backward()
    masker.apply_to_grads()
    for name, mask in masker.masks.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        assert (gradient[~mask] == 0).all()
        assert (gradient[mask] != 0).any()


def test_a_copy_can_be_masked() -> None:
    model = Small()
    average = torch.optim.swa_utils.AveragedModel(model)
    masker = masked(model)
    masker.apply_to(average)
    assert (average.module.fc.weight[~masker.masks["fc.weight"]] == 0).all()
    other = Small()
    other.fc = nn.Linear(8, 7)
    before = other.conv.weight.clone()
    with pytest.raises(TargetError, match=r"'fc.weight' has shape \(7, 8\) in Small, its mask \(6, 8\)"):
        masker.apply_to(other)
    assert torch.equal(other.conv.weight, before)
    with pytest.raises(TargetError, match=r"'conv.weight' is masked, but Linear has no such parameter"):
        masker.apply_to(nn.Linear(8, 6))


def test_a_tied_weight_is_masked_once_under_either_name() -> None:
    model = nn.Module()
    model.embedding = nn.Embedding(10, 4)
    model.head = nn.Linear(4, 10, bias=False)
    model.head.weight = model.embedding.weight
    masker = Masker(model)
    masker.set("embedding.weight", compute_masks({"w": model.embedding.weight}, 0.5)["w"])
    assert masker.sparsity() == {"embedding.weight": 0.5}
    assert int((model.head.weight == 0).sum()) == 20


def test_state_goes_through_a_file_and_back() -> None:
    model = Small()
    masker = masked(model)
    file = io.BytesIO()
    torch.save(masker.state_dict(), file)
    file.seek(0)
    other = Small()
    loaded = Masker(other)
    loaded.set("conv.bias", torch.tensor([True, False] * 4))
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert loaded.names == masker.names
    assert all(torch.equal(loaded.masks[name], mask) for name, mask in masker.masks.items())
    assert loaded.sparsity() == masker.sparsity() == {"conv.weight": 173 / 288, "fc.weight": 29 / 48}
    assert (other.fc.weight[~masker.masks["fc.weight"]] == 0).all()


def test_state_that_does_not_fit_is_refused_before_anything_changes(caplog: pytest.LogCaptureFixture) -> None:
    state = masked(Small()).state_dict()
    other = Small()
    other.fc = nn.Linear(8, 7)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    masker = Masker(other)
    with pytest.raises(StateError, match=r"'fc.weight' has shape \(6, 8\), the parameter \(7, 8\)"):
        masker.load_state_dict(state)
    del other.fc
    with pytest.raises(StateError, match=r"the state masks 'fc.weight', which the model does not have"):
        masker.load_state_dict(state)
    state["masks"]["conv.weight"]["bits"][3] ^= 1
    with pytest.raises(StateError, match=r"saved mask of 'conv.weight' is damaged"):
        masker.load_state_dict(state)
    assert masker.names == []
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    state["masks"]["conv.weight"]["bits"][3] ^= 1
    masker.load_state_dict(state, strict=False)
    assert masker.names == ["conv.weight"]
    assert "which the model does not have" in caplog.text


def test_wrong_masks_are_refused_by_name() -> None:
    model = Small()
    masker = Masker(model)
    with pytest.raises(TargetError, match=r"'fc.weigth' is no parameter of Small. Did you mean 'fc.weight'"):
        masker.set("fc.weigth", torch.ones(6, 8, dtype=torch.bool))
    with pytest.raises(StateError, match=r"mask of 'fc.weight' has shape \(8, 6\), the parameter \(6, 8\)"):
        masker.set("fc.weight", torch.ones(8, 6, dtype=torch.bool))
    assert masker.names == []


def test_check_names_what_went_wrong() -> None:
    model = Small()
    masker = masked(model)
    masker.check()
    model.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"'fc.weight' holds NaN"):
        masker.check()
    model.fc = nn.Linear(8, 7)
    with pytest.raises(StateError, match=r"'fc.weight' now has shape \(7, 8\)"):
        masker.check()
    model.fc = nn.Identity()  # type: ignore[assignment]
    with pytest.raises(TargetError, match=r"'fc.weight' is no parameter of Small"):
        masker.check()


def test_one_process_has_nothing_to_compare() -> None:
    assert distributed.world_size() == 1
    distributed.check_same({"w": torch.ones(2, dtype=torch.bool)})
    low, high = torch.tensor(-1.0), torch.tensor(2.0)
    distributed.reduce_range(low, high)
    assert (float(low), float(high)) == (-1.0, 2.0)


def test_fingerprints_see_shape_and_values_but_not_the_memory_format() -> None:
    mask = torch.rand(4, 4, 3, 3) > 0.5
    assert distributed.fingerprint(mask) == distributed.fingerprint(mask.contiguous(memory_format=torch.channels_last))
    assert distributed.fingerprint(mask) != distributed.fingerprint(mask.view(16, 9))
    other = mask.clone()
    other[0, 0, 0, 0] ^= True
    assert distributed.fingerprint(mask) != distributed.fingerprint(other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", sorted(VALUES))
def test_cuda_gives_the_cpu_s_masks_and_applies_them_without_a_synchronization(kind: str) -> None:
    weight = draw(kind, (300, 400), torch.float32, 2)
    model = nn.Linear(400, 300)
    model.weight.data.copy_(weight)
    model.cuda()
    masker = Masker(model)
    for sparsity in (0.3, 0.7):
        want = compute_masks({"weight": weight}, sparsity, previous={k: m.cpu() for k, m in masker.masks.items()})
        masker.set("weight", compute_masks({"weight": model.weight}, sparsity, previous=masker.masks)["weight"])
        assert torch.equal(masker.masks["weight"].cpu(), want["weight"])
    masker.apply()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        masker.apply()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("of", [4, 20])
def test_in_a_group_of_equal_weights_the_first_go(of: int) -> None:
    mask = compute_masks({"w": torch.full((2, of), 0.5)}, 0.5, MaskType.parse(f"{of // 2}:{of}"))["w"]
    assert mask.tolist() == [[False] * (of // 2) + [True] * (of // 2)] * 2
