"""Labels: ids unite and never part, and every rule ties exactly what dies together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsify.model.trace import exported
from sparsify.pruning.label_tensors import core, never, reshaped, thin, varying
from sparsify.pruning.propagation import propagate_labels
from sparsify.pruning.union_find import NEVER, UnionFind


class Lambda(nn.Module):
    """A layer in front, what `code` does with its output, and a layer behind."""

    def __init__(self, code: Callable[[Any, Tensor], Tensor], first: nn.Module, last: nn.Module, **more: Any) -> None:
        super().__init__()
        self.first, self.last, self.code = first, last, code
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.code(self, self.first(x)))
        return result


def groups(model: nn.Module, *args: Tensor) -> list[list[int]]:
    """The rows of `first` that die together; those that never die are missing."""
    found = propagate_labels(model, exported(model, args))
    roots = found.channel_ids.roots(found.slices["first.weight", 0])
    free = found.channel_ids.first("kept")[roots] == NEVER
    together: dict[int, list[int]] = {}
    for row, (root, alive) in enumerate(zip(roots.tolist(), free.tolist(), strict=True)):
        if alive and root:
            together.setdefault(root, []).append(row)
    return list(together.values())


SINGLE = [[0], [1], [2], [3], [4], [5], [6], [7]]
PAIRS = [[0, 4], [1, 5], [2, 6], [3, 7]]
ALL = [list(range(8))]


def images(code: Callable[[Any, Tensor], Tensor], inputs: int = 8, **more: Any) -> Lambda:
    return Lambda(code, nn.Conv2d(3, 8, 1), nn.Conv2d(inputs, 5, 1), **more)


def rows(code: Callable[[Any, Tensor], Tensor], inputs: int = 8, **more: Any) -> Lambda:
    return Lambda(code, nn.Linear(3, 8), nn.Linear(inputs, 5), **more)


def products(heads: Tensor) -> Tensor:
    """Attention without softmax, its heads side by side again."""
    return (heads @ (heads.transpose(-1, -2) @ heads)).transpose(1, 2).flatten(2)


class Scale(nn.Module):
    """A table of its own, read by a plain operator."""

    def __init__(self, *shape: int, buffer: bool = False) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("table", torch.rand(shape))
        else:
            self.table = nn.Parameter(torch.rand(shape))


IMAGE = torch.randn(2, 3, 6, 6)
ROWS = torch.randn(2, 4, 3)

CASES: dict[str, tuple[nn.Module, Tensor, list[list[int]]]] = {
    "nothing between": (images(lambda m, x: x), IMAGE, SINGLE),
    "pointwise": (images(lambda m, x: F.silu(x) * 2 + 1), IMAGE, SINGLE),
    "in place": (images(lambda m, x: x.relu_()), IMAGE, SINGLE),
    "pool": (images(lambda m, x: F.max_pool2d(x, 2)), IMAGE, SINGLE),
    "interpolation": (images(lambda m, x: F.interpolate(x, scale_factor=2)), IMAGE, SINGLE),
    "padding of positions": (images(lambda m, x: F.pad(x, (1, 1))), IMAGE, SINGLE),
    "padding of channels": (images(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1)), 10), IMAGE, []),
    "concatenation": (images(lambda m, x: torch.cat([x, x.tanh()], 1), 16), IMAGE, SINGLE),
    "concatenation with the input": (images(lambda m, x: torch.cat([IMAGE, x], 1), 11), IMAGE, SINGLE),
    "a flip of two halves added": (images(lambda m, x: x + torch.cat(x.chunk(2, 1)[::-1], 1)), IMAGE, PAIRS),
    "halves multiplied": (images(lambda m, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], 4), IMAGE, PAIRS),
    "glu": (images(lambda m, x: F.glu(x, 1), 4), IMAGE, PAIRS),
    "pieces of one size": (images(lambda m, x: torch.cat(x.split(4, 1), 1)), IMAGE, PAIRS),
    "pieces of several sizes": (images(lambda m, x: torch.cat(x.split([2, 6], 1), 1)), IMAGE, []),
    "a literal slice": (images(lambda m, x: x[:, :6], 6), IMAGE, []),
    "a literal index": (images(lambda m, x: x[:, torch.tensor([1, 0, 3])], 3), IMAGE, []),
    "a roll of channels": (images(lambda m, x: x.roll(1, 1)), IMAGE, []),
    "a roll of positions": (images(lambda m, x: x.roll(1, 2)), IMAGE, SINGLE),
    "channel shuffle": (
        images(lambda m, x: x.view(2, 2, 4, 6, 6).transpose(1, 2).flatten(1, 2)),
        IMAGE,
        PAIRS,
    ),
    "pixel shuffle": (images(lambda m, x: F.pixel_shuffle(x, 2), 2), IMAGE, [[0, 1, 2, 3], [4, 5, 6, 7]]),
    "pixel unshuffle": (images(lambda m, x: F.pixel_unshuffle(x, 2), 32), IMAGE, SINGLE),
    "flatten into Linear": (
        Lambda(lambda m, x: x.flatten(1), nn.Conv2d(3, 8, 1), nn.Linear(8 * 36, 5)),
        IMAGE,
        SINGLE,
    ),
    "BatchNorm": (images(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(8)), IMAGE, SINGLE),
    "GroupNorm": (
        images(lambda m, x: m.norm(x), norm=nn.GroupNorm(2, 8)),
        IMAGE,
        [[0, 1, 2, 3], [4, 5, 6, 7]],
    ),
    "LayerNorm": (rows(lambda m, x: m.norm(x), norm=nn.LayerNorm(8)), ROWS, ALL),
    "LayerNorm with the input": (rows(lambda m, x: F.layer_norm(torch.cat([ROWS, x], -1), [11]), 11), ROWS, []),
    "softmax": (rows(lambda m, x: x.softmax(-1)), ROWS, ALL),
    "softmax of positions": (rows(lambda m, x: x.softmax(1)), ROWS, SINGLE),
    "a norm by hand": (rows(lambda m, x: x * (x * x).mean(-1, keepdim=True).rsqrt()), ROWS, ALL),
    "depthwise": (images(lambda m, x: m.conv(x), conv=nn.Conv2d(8, 8, 3, groups=8)), IMAGE, SINGLE),
    "grouped": (
        images(lambda m, x: m.conv(x), conv=nn.Conv2d(8, 8, 3, groups=2)),
        IMAGE,
        [[0, 1, 2, 3], [4, 5, 6, 7]],
    ),
    "grouped, transposed": (
        images(lambda m, x: m.conv(x), conv=nn.ConvTranspose2d(8, 8, 3, groups=4)),
        IMAGE,
        [[0, 1], [2, 3], [4, 5], [6, 7]],
    ),
    "a gate over positions": (images(lambda m, x: x * m.conv(x).sigmoid(), conv=nn.Conv2d(8, 1, 1)), IMAGE, SINGLE),
    "a gate over channels": (images(lambda m, x: x * m.conv(x), conv=nn.Conv2d(8, 8, 1)), IMAGE, SINGLE),
    "a scale": (rows(lambda m, x: x * m.scale.table, scale=Scale(8)), ROWS, SINGLE),
    "a table of positions": (rows(lambda m, x: x + m.scale.table, scale=Scale(4, 8)), ROWS, SINGLE),
    "a buffer": (rows(lambda m, x: x + m.scale.table, scale=Scale(8, buffer=True)), ROWS, SINGLE),
    "a constant": (rows(lambda m, x: x + torch.arange(8.0)), ROWS, []),
    "a broad constant": (rows(lambda m, x: x + torch.arange(4.0)[:, None]), ROWS, SINGLE),
    "zeros of that shape": (rows(lambda m, x: x + torch.zeros(2, 4, 8)), ROWS, SINGLE),
    "heads": (
        rows(lambda m, x: F.scaled_dot_product_attention(*[x.view(2, 4, 2, 4).transpose(1, 2)] * 3).transpose(1, 2)
             .flatten(2)),
        ROWS,
        [[0, 1, 2, 3], [4, 5, 6, 7]],
    ),
    "frequencies for all heads": (
        rows(lambda m, x: products((x.view(2, 4, 2, 4) * m.scale.table).transpose(1, 2)), scale=Scale(4, buffer=True)),
        ROWS,
        [[0, 1, 2, 3], [4, 5, 6, 7]],
    ),
    "product with a constant over positions": (rows(lambda m, x: torch.ones(4, 4).tril() @ x), ROWS, SINGLE),
    "product with a constant over channels": (rows(lambda m, x: x @ torch.ones(8, 8).tril()), ROWS, []),
    "not known": (rows(lambda m, x: torch.fft.rfft(x.float()).real, 5), ROWS, []),
    "a weight on the right": (
        rows(lambda m, x: x @ m.scale.table, scale=Scale(8, 8)),
        ROWS,
        SINGLE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_dies_together(name: str) -> None:
    model, inputs, wanted = CASES[name]
    assert groups(model, inputs) == wanted


def test_tied_weights_are_tied_channels() -> None:
    model = rows(lambda m, x: m.other(x), other=nn.Linear(8, 8))
    model.last = model.other
    found = propagate_labels(model, exported(model, (ROWS,)))
    # Its rows are its own columns, and what the model returns: none can die.
    assert (found.channel_ids.first("kept")[found.channel_ids.roots(found.slices["last.weight", 1])] != NEVER).all()


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_united_ids_are_the_components_of_a_graph(pairs: list[tuple[int, int]]) -> None:
    ids = UnionFind()
    all_ids = ids.fresh([20])
    wanted = list(range(20))
    for first, second in pairs:
        wanted = [wanted[first] if one == wanted[second] else one for one in wanted]
    if pairs:
        first, second = (all_ids[torch.tensor(side)] for side in zip(*pairs, strict=True))
        ids.unite(first, second, "tied")
    roots = ids.roots(all_ids).tolist()
    assert [[a == b for b in roots] for a in roots] == [[a == b for b in wanted] for a in wanted]
    assert roots == [min(i + 1 for i in range(20) if roots[i] == root) for root in roots]


def test_what_meets_never_is_kept_with_the_first_reason() -> None:
    ids = UnionFind()
    labels = ids.fresh([3])
    ids.unite(labels, torch.tensor([0, *labels[1:].tolist()]), "met an input")
    ids.keep(labels[:1], "later")
    kept = ids.first("kept")[labels]
    assert [ids.events[n].why if n != NEVER else None for n in kept.tolist()] == ["met an input", None, None]


def test_mixing_goes_along_its_dimensions_alone() -> None:
    ids = UnionFind()
    labels = ids.fresh([2, 3])
    mixed = ids.mix(labels, [1], "softmax")
    assert varying(mixed) == [0]
    assert len({*mixed.flatten().tolist()}) == 2
    assert ids.mix(never([2, 3]), [0], "softmax").sum() == 0


@given(st.permutations([2, 3, 4]), st.sampled_from([(24,), (6, 4), (2, 12), (4, 6), (2, 3, 4), (24, 1), (3, 8)]))
def test_labels_in_another_shape_are_what_torch_makes_of_them(before: list[int], after: tuple[int, ...]) -> None:
    for dim in range(3):
        view = [1, 1, 1]
        view[dim] = before[dim]
        labels = torch.arange(1, before[dim] + 1).view(view).expand(before)
        made = reshaped(labels, after)
        assert torch.equal(made, labels.reshape(after))
        assert core(made).numel() == core(thin(labels.reshape(after))).numel()
