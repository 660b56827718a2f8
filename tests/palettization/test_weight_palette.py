"""One weight on palettes: few values in eval mode, exact zeros, integers, and indices that are kept."""

from __future__ import annotations

import pytest
import torch

from sparsify.palettization.weight_palette import PaletteLayout, WeightPalette


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "axis", "palettes", "cluster_dim"),
    [((6, 4), 0, 1, 1), ((6, 4, 3, 3), 0, 3, 2), ((4, 6, 2), 1, 2, 3), ((12,), 0, 2, 2), ((4, 8), 1, 8, 1)],
)
def test_parts_come_together_again_and_hold_neighbors_of_the_channel_axis(
    shape: tuple[int, ...], axis: int, palettes: int, cluster_dim: int
) -> None:
    layout = PaletteLayout(shape, axis, palettes, cluster_dim)
    given = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    parts = layout.parts(given)
    assert torch.equal(layout.whole(parts), given)
    first = given.movedim(axis, 0).reshape(shape[axis], -1)[:cluster_dim, 0]
    assert torch.equal(parts[0, 0], first)
    share = given.movedim(axis, 0)[: shape[axis] // palettes]
    assert sorted(parts[0].flatten().tolist()) == sorted(share.flatten().tolist())


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 6, 8])
def test_in_eval_mode_each_group_has_as_many_values_as_its_bits_allow(nbits: int) -> None:
    given = weight(8, 100)
    palette = WeightPalette(PaletteLayout((8, 100), 0, 2, 1), nbits).eval()
    palette.start(given)
    made = palette(given)
    assert len(made[:4].unique()) == len(made[4:].unique()) == 2**nbits
    spread = (made - given).square().mean() / given.square().mean()
    assert spread < 2.5 / 4**nbits


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("cluster_dim", [1, 2])
def test_zeros_stay_zero_and_no_others_become_values_for_them(cluster_dim: int, keeps: bool) -> None:
    given = weight(8, 50)
    given[:, 10:] = 0.0
    palette = WeightPalette(PaletteLayout((8, 50), 0, 1, cluster_dim), 2)
    palette.start(given)
    if keeps:
        palette.freeze(given)
    for mode in (True, False):
        made = palette.train(mode)(given)
        assert not made[:, 10:].any(), mode
        assert palette.values[palette.pinned].eq(0).all() and palette.pinned.sum() == 1


def test_an_unmasked_zero_can_leave() -> None:
    given = weight(4, 8)
    given[0] = 0.0
    given.requires_grad_()
    palette = WeightPalette(PaletteLayout((4, 8), 0, 1, 1), 2)
    palette.start(given, tau=0.5)
    palette(given).sum().backward()
    assert given.grad is not None and given.grad[0].abs().min() > 0


def test_integer_values_lie_on_one_scale_a_palette() -> None:
    given = weight(8, 60)
    palette = WeightPalette(PaletteLayout((8, 60), 0, 2, 1), 4, integers=True).eval()
    palette.start(given)
    made = palette(given)
    for part in (made[:4], made[4:]):
        steps = part / (part.abs().max() / 127)
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert len(part.unique()) == 16


def test_frozen_indices_stay_and_values_are_the_means_of_their_weights() -> None:
    given = weight(6, 40)
    palette = WeightPalette(PaletteLayout((6, 40), 0, 1, 1), 2)
    palette.start(given)
    palette.freeze(given)
    assert palette.codes is not None
    before = palette.codes.clone()
    moved = (given + weight(6, 40, seed=1)).requires_grad_()
    made = palette(moved)
    for code in range(4):
        members = before[0] == code
        mean = moved.detach().flatten()[members].mean()
        torch.testing.assert_close(made.flatten()[members], mean.expand(int(members.sum())))
    (made.flatten()[0] * 3).backward()
    share = before[0] == before[0, 0]
    assert moved.grad is not None
    torch.testing.assert_close(moved.grad.flatten()[share], torch.full((int(share.sum()),), 3.0 / int(share.sum())))
    assert torch.equal(palette.codes, before)


def test_important_weights_keep_their_values_better() -> None:
    given = weight(4, 200)
    importance = torch.where(given.abs() > 1.5, 100.0, 1.0)
    errors = []
    for important in (None, importance):
        palette = WeightPalette(PaletteLayout((4, 200), 0, 1, 1), 2).eval()
        palette.start(given, importance=important)
        errors.append(float((importance * (palette(given) - given).square()).sum()))
    assert errors[1] < 0.7 * errors[0]


def test_values_keep_their_type_in_half_precision() -> None:
    given = weight(4, 20)
    palette = WeightPalette(PaletteLayout((4, 20), 0, 1, 1), 3)
    palette.start(given)
    before = palette.values.clone()
    palette.to(torch.bfloat16)
    assert torch.equal(palette.values, before)
    assert palette(given.bfloat16()).dtype == torch.bfloat16


def test_in_eval_mode_the_gradient_passes() -> None:
    given = weight(4, 20).requires_grad_()
    palette = WeightPalette(PaletteLayout((4, 20), 0, 1, 1), 3).eval()
    palette.start(given)
    palette(given).sum().backward()
    assert torch.equal(given.grad, torch.ones(4, 20))  # type: ignore[arg-type]
