"""Channel groups of channels: written out by hand for small models, and proven by what deleted channels cannot
change."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsify.errors import ArgumentError
from sparsify.pruning.groups import ChannelGroups, GroupMember, find_unchecked_groups
from tests.zoo.small import Branching, written

IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64)
ROWS = torch.randn(2, 5, 12, dtype=torch.float64)
IDS = torch.tensor([[1, 2, 3, 4]])


class Residual(nn.Module):
    """A stream under BatchNorm, to which a block adds; pooled into a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.inner, self.inner_norm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.outer = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner_norm(self.inner(x))))
        result: Tensor = self.head(x.mean((2, 3)))
        return result


class Concat(nn.Module):
    """Two branches side by side, flattened into a linear layer: 4 columns for a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(5 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1).relu()
        result: Tensor = self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return result


class Block(nn.Module):
    """Pre-norm attention with one projection for all, and an FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.width = 3, 12
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.projection = nn.Linear(12, 36), nn.Linear(12, 12)
        self.up, self.down = nn.Linear(12, 7), nn.Linear(7, 12)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, length, self.width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.lstm, self.head = nn.Embedding(9, 6), nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.head(self.lstm(self.table(ids))[0])
        return result


class TiedFeedForward(nn.Module):
    """Without norms the hidden size of a language model is free; its head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        result: Tensor = self.head(x + self.down(self.up(x).relu()))
        return result


def found(model: nn.Module, *args: Tensor) -> ChannelGroups:
    return find_unchecked_groups(model.double(), args)


def shown(channel_groups: ChannelGroups) -> dict[str, tuple[str, int, set[tuple[str, int, str]]]]:
    return {
        name: (channel_group.kind, channel_group.size, {(p.tensor, p.dim, p.role) for p in channel_group.members})
        for name, channel_group in channel_groups.groups.items()
    }


def test_a_residual_stream_under_batch_norm() -> None:
    assert shown(found(Residual(), IMAGE)) == {
        "stem.weight": (
            "conv",
            6,
            {
                ("stem.weight", 0, "row"),
                *((f"norm.{name}", 0, "other") for name in ("weight", "bias", "running_mean", "running_var")),
                ("inner.weight", 1, "column"),
                ("outer.weight", 0, "row"),
                ("outer.bias", 0, "other"),
                ("head.weight", 1, "column"),
            },
        ),
        "inner.weight": (
            "conv",
            4,
            {
                ("inner.weight", 0, "row"),
                ("inner.bias", 0, "other"),
                *((f"inner_norm.{name}", 0, "other") for name in ("weight", "bias", "running_mean", "running_var")),
                ("outer.weight", 1, "column"),
            },
        ),
    }


def test_the_columns_of_a_channel_lie_where_it_was_put() -> None:
    channel_groups = found(Concat(), IMAGE).groups
    places = {name: channel_group.members[-1] for name, channel_group in channel_groups.items()}
    assert places["left.weight"] == GroupMember("head.weight", 1, "column", (*[0] * 4, *[1] * 4, *[-1] * 12))
    assert places["right.weight"] == GroupMember("head.weight", 1, "column", (*[-1] * 8, *[0] * 4, *[1] * 4, *[2] * 4))


def test_heads_of_a_fused_projection() -> None:
    channel_groups = found(nn.Sequential(Block(), nn.LayerNorm(12)), ROWS)
    heads = channel_groups.groups["0.qkv.weight"]
    assert (heads.kind, heads.size) == ("heads", 3)
    assert heads.members[0].channels == tuple(head for _ in range(3) for head in range(3) for _ in range(4))
    assert heads.columns == ("0.projection.weight",)
    assert channel_groups.groups["0.up.weight"].kind == "linear"
    numbers = {(extent.module, len(extent.channels)) for extent in channel_groups.traced_sizes}
    assert {("0", 3), ("0", 12)} <= numbers, "the code of the block has the number of heads, and their width"


def test_a_tied_weight_is_one_tensor_and_read_along_the_same_dimension() -> None:
    assert shown(found(TiedFeedForward(), IDS))["table.weight"] == (
        "embedding",
        6,
        {
            ("table.weight", 1, "row"),
            ("up.weight", 1, "column"),
            ("down.weight", 0, "row"),
            ("down.bias", 0, "other"),
        },
    )


@pytest.mark.parametrize(
    ("model", "inputs", "reasons"),
    [
        (Residual(), IMAGE, {"head.weight": "the model returns them"}),
        (
            nn.Sequential(Block(), nn.LayerNorm(12)),
            ROWS,
            {
                "0.projection.weight": "normalised together by LayerNorm at 0.norm2",
                "0.down.weight": "normalised together by LayerNorm at 0.norm2",
            },
        ),
        (
            Tagger(),
            IDS,
            {
                "table.weight": r"lstm in lstm \(LSTM\) is not known",
                "lstm.weight_ih_l0": "is not known",
                "lstm.weight_hh_l0": "is not known",
                "head.weight": "the model returns them",
            },
        ),
        (
            nn.TransformerEncoderLayer(12, 3, 7, batch_first=True),
            ROWS,
            {
                "self_attn.in_proj_weight": "the code of nn.MultiheadAttention at self_attn fixes its width",
                "self_attn.out_proj.weight": "at self_attn fixes its width",
                "linear2.weight": "at self_attn fixes its width",
            },
        ),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(12, 6)), nn.ReLU(), nn.Linear(6, 4)),
            ROWS,
            {"0.parametrizations.weight.original1": "computed from it", "2.weight": "the model returns them"},
        ),
    ],
    ids=["returned", "layer norm", "lstm", "multi-head attention", "weight norm"],
)
def test_why_a_weight_stays_whole(model: nn.Module, inputs: Tensor, reasons: dict[str, str]) -> None:
    channel_groups = found(model, inputs)
    assert not set(reasons) & {row for channel_group in channel_groups.groups.values() for row in channel_group.rows}
    missing = {
        n: channel_groups.whole.get(n)
        for n, why in reasons.items()
        if not re.search(why, channel_groups.whole.get(n, ""))
    }
    assert not missing


def test_every_weight_of_a_layer_is_cut_or_has_a_reason() -> None:
    for model, inputs in (
        (Residual(), IMAGE),
        (Concat(), IMAGE),
        (Block(), ROWS),
        (Tagger(), IDS),
        (TiedFeedForward(), IDS),
    ):
        channel_groups = found(model, inputs)
        cut = {row for channel_group in channel_groups.groups.values() for row in channel_group.rows}
        weights = {name for name, p in model.named_parameters() if p.dim() > 1}
        assert weights == cut | set(channel_groups.whole)
        assert not cut & set(channel_groups.whole)
        assert all(channel_groups.whole.values())


def test_a_layer_that_is_not_called_says_so() -> None:
    model = nn.Sequential(nn.Linear(12, 4), nn.Linear(4, 3))
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    assert "does not call" in found(model, ROWS).whole["unused.weight"]


def leak(model: nn.Module, channel_groups: ChannelGroups, *args: Tensor, columns: bool = True) -> float:
    """How far the output moves when all that is deleted, half of every channel group, is drawn anew; the columns are
    zeros."""
    model = copy.deepcopy(model).eval()
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def fill(roles: tuple[str, ...], draw: bool) -> None:
        for channel_group in channel_groups.groups.values():
            for member in channel_group.members:
                if member.role in roles:
                    channels = torch.tensor(member.channels)
                    index = ((channels >= 0) & (channels % 2 == 0)).nonzero().flatten()
                    part = tensors[member.tensor].index_select(member.dim, index)
                    tensors[member.tensor].index_copy_(
                        member.dim, index, torch.rand_like(part) + 0.5 if draw else part * 0
                    )

    with torch.no_grad():
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.uniform_(0.2, 1.2)
        if columns:
            fill(("column",), False)
        before = model(*args)
        fill(("row", "other"), True)
        if columns:
            fill(("column",), False)
        return float((model(*args) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(Residual(), IMAGE), (Concat(), IMAGE), (nn.Sequential(Block(), nn.LayerNorm(12)), ROWS)],
    ids=["residual", "concat", "attention"],
)
def test_what_is_deleted_cannot_be_seen_in_the_output(model: nn.Module, inputs: Tensor) -> None:
    channel_groups = found(model, inputs)
    assert leak(model, channel_groups, inputs) < 1e-12
    # The check sees a column that is missing.
    assert leak(model, channel_groups, inputs, columns=False) > 1e-6


@pytest.mark.parametrize(
    ("model", "inputs", "smaller"),
    [
        (Residual(), IMAGE, {"stem.weight": (3, 3, 3, 3), "outer.weight": (3, 2, 1, 1), "head.weight": (5, 3)}),
        (Concat(), IMAGE, {"left.weight": (1, 3, 1, 1), "right.weight": (1, 3, 1, 1), "head.weight": (5, 8)}),
        (TiedFeedForward(), IDS, {"table.weight": (9, 3), "up.weight": (4, 3), "head.weight": (9, 3)}),
    ],
    ids=["residual", "concat", "tied"],
)
def test_a_model_without_them_computes_what_the_masked_one_does(
    model: nn.Module, inputs: Tensor, smaller: dict[str, tuple[int, ...]]
) -> None:
    channel_groups = found(model.eval(), inputs)
    small = copy.deepcopy(model)
    left: dict[tuple[str, int], Tensor] = {}
    for channel_group in channel_groups.groups.values():
        for member in channel_group.members:
            kept = torch.tensor([channel % 2 == 1 or channel < 0 for channel in member.channels])
            left[member.tensor, member.dim] = kept & left.get((member.tensor, member.dim), kept)
    for (tensor, dim), kept in left.items():
        owner, _, own = tensor.rpartition(".")
        statistic = own.startswith("running")
        value = getattr(model.get_submodule(owner), own).detach()
        if not statistic:
            value.mul_(kept.view([-1 if d == dim else 1 for d in range(value.dim())]))
        holder = small.get_submodule(owner)
        cut = getattr(holder, own).detach().index_select(dim, kept.nonzero().flatten())
        setattr(holder, own, cut if statistic else nn.Parameter(cut))
    if isinstance(small, TiedFeedForward):
        small.head.weight = small.table.weight
    assert {name: tuple(small.get_submodule(name[:-7]).weight.shape) for name in smaller} == smaller
    assert torch.allclose(small(inputs), model(inputs), rtol=1e-12, atol=1e-12)


def test_the_model_stays_as_it_was() -> None:
    model = Residual().train()
    model.inner_norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    versions = [buffer._version for buffer in model.buffers()]
    random = torch.random.get_rng_state()
    find_unchecked_groups(model, (IMAGE.float(),))
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert [buffer._version for buffer in model.buffers()] == versions
    assert [module.training for module in model.children()] == [True, True, True, False, True, True]
    assert torch.equal(random, torch.random.get_rng_state())


def test_names_are_clean_and_the_same_at_every_time() -> None:
    plain = found(Residual(), IMAGE)
    wrapped = (
        find_unchecked_groups(nn.DataParallel(Residual().double()), (IMAGE,))
        if not torch.cuda.is_available()
        else plain
    )
    assert wrapped.groups == plain.groups
    assert found(Residual(), IMAGE) == plain


def test_what_cannot_be_traced_is_refused() -> None:

    with pytest.raises(ArgumentError, match="cannot be traced"):
        find_unchecked_groups(Branching(), (IMAGE,))


def places(channel_groups: ChannelGroups, name: str) -> set[tuple[str, int]]:
    return {(member.tensor, member.dim) for member in channel_groups.groups[name].members}


@pytest.mark.parametrize(
    ("between", "expected"),
    [
        (nn.GroupNorm(4, 8), {("1.weight", 0), ("1.bias", 0)}),
        (nn.PReLU(8), {("1.weight", 0)}),
        (nn.Conv2d(8, 8, 1, groups=2), {("1.weight", 0), ("1.bias", 0)}),
    ],
)
def test_what_scales_channels_goes_with_them(between: nn.Module, expected: set[tuple[str, int]]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), between, nn.Conv2d(8, 5, 1))
    channel_groups = found(model, IMAGE)
    channel_group = channel_groups.groups["0.weight"]
    assert places(channel_groups, "0.weight") == {("0.weight", 0), ("0.bias", 0), ("2.weight", 1)} | expected
    size = {nn.GroupNorm: 4, nn.PReLU: 8, nn.Conv2d: 2}[type(between)]
    assert channel_group.size == size
    # What goes together in one member goes together in all.
    assert {member.channels for member in channel_group.members} == {tuple(i // (8 // size) for i in range(8))}


def test_the_halves_of_a_gate_lose_the_same_channels() -> None:
    channel_groups = found(nn.Sequential(nn.Linear(12, 8), nn.GLU(), nn.Linear(4, 5)), ROWS)
    channel_group = channel_groups.groups["0.weight"]
    assert channel_group.size == 4
    rows = next(member for member in channel_group.members if member.role == "row")
    assert rows.channels == (0, 1, 2, 3, 0, 1, 2, 3)


def test_a_gate_over_one_layer_twice_is_free() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(F.glu(torch.cat([x, x], -1), -1))

    assert found(written(forward, up=nn.Linear(12, 4), down=nn.Linear(4, 5)), ROWS).groups["up.weight"].size == 4


def test_channels_that_code_picks_by_number_stay() -> None:
    layers = {"up": nn.Linear(12, 6), "down": nn.Linear(6, 4), "last": nn.Linear(3, 2)}
    model = written(
        lambda self, x: self.last(self.down(self.up(x).relu())[..., self.chosen]),
        **layers,
        chosen=torch.tensor([0, 2, 3]),
    )
    channel_groups = found(model, ROWS)
    assert set(channel_groups.groups) == {"up.weight"}
    assert "takes some by number" in channel_groups.whole["down.weight"]


def test_a_layer_that_is_called_twice_ties_what_it_reads() -> None:
    # One layer reads two others: both lose the same channels.
    model = written(
        lambda self, x: self.both(self.left(x).relu()) * self.both(self.right(x).sigmoid()),
        **{"left": nn.Linear(12, 6), "right": nn.Linear(12, 6), "both": nn.Linear(6, 3)},
    )
    channel_groups = found(model, ROWS)
    assert set(channel_groups.groups) == {"left.weight"}
    assert set(channel_groups.groups["left.weight"].rows) == {"left.weight", "right.weight"}


def test_attention_of_torch_stays_whole_and_says_so() -> None:
    # Queries and keys have other widths: its projections are parameters of its own.
    def forward(self: Any, x: Tensor) -> Tensor:
        keys = self.keys(x)
        return self.down(self.up(self.attention(x, keys, keys, need_weights=False)[0]).relu())

    attention = nn.MultiheadAttention(12, 3, kdim=4, vdim=4, batch_first=True)
    layers = {"keys": nn.Linear(12, 4), "up": nn.Linear(12, 7), "down": nn.Linear(7, 2)}
    channel_groups = found(written(forward, attention=attention, **layers), ROWS)
    assert set(channel_groups.groups) == {"up.weight"}
    fixed = {name: why for name, why in channel_groups.whole.items() if "fixes its width" in why}
    assert {"attention.q_proj_weight", "attention.out_proj.weight"} <= set(fixed)


def test_what_writes_is_not_run_for_real() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        order = self.positions.add_(1) % 5
        return self.down(self.up(x)[..., order].relu())

    model = written(forward, positions=torch.arange(5), up=nn.Linear(12, 5), down=nn.Linear(5, 3))
    before = model.positions.clone()
    found(model, ROWS)
    assert torch.equal(model.positions, before)
