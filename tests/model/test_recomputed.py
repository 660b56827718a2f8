"""Weights that are computed before every forward: which parameter a name of them means, and masks that last in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from sparsify.errors import TargetError
from sparsify.model.layouts import input_dims
from sparsify.model.recomputed import recomputed_weights
from sparsify.model.targets import named_parameters, resolve_parameters
from sparsify.modifiers.magnitude_pruning import GMPruningModifier
from sparsify.modifiers.sparse_training import RigLPruningModifier
from sparsify.training.manager import ScheduledModifierManager
from tests.loops import train_step

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Halved(nn.Module):
    """A user's own parametrization that keeps zeros."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


class Symmetric(nn.Module):
    """One that does not: a weight is read in two places."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def hooked(norm: Callable[..., nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def apply(layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return norm(layer)

    return apply


# How it is made; the parameter that is its direction, what is beside it, and over which dimensions it is divided.
FORMS: dict[str, tuple[Callable[[nn.Module], nn.Module], str | None, list[str], tuple[int, ...]]] = {
    "weight_norm": (
        parametrizations.weight_norm,
        "parametrizations.weight.original1",
        ["parametrizations.weight.original0"],
        (1,),
    ),
    "weight_norm of columns": (
        lambda layer: parametrizations.weight_norm(layer, dim=1),
        "parametrizations.weight.original1",
        ["parametrizations.weight.original0"],
        (0,),
    ),
    "old weight_norm": (hooked(nn.utils.weight_norm), "weight_v", ["weight_g"], (1,)),
    "old weight_norm of all": (
        hooked(lambda layer: nn.utils.weight_norm(layer, dim=None)),  # type: ignore[arg-type]
        "weight_v",
        ["weight_g"],
        (0, 1),
    ),
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original", [], (0, 1)),
    "old spectral_norm": (hooked(nn.utils.spectral_norm), "weight_orig", [], (0, 1)),
    "halved": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
        "parametrizations.weight.original",
        [],
        (),
    ),
    "orthogonal": (parametrizations.orthogonal, None, ["parametrizations.weight.original"], ()),
    "symmetric": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
        None,
        ["parametrizations.weight.original"],
        (),
    ),
    "torch's own pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), None, ["weight_orig"], ()),
}
KEEP_ZEROS = [name for name, form in FORMS.items() if form[1] is not None]


def network(form: str, size: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.Linear(size, size)
    FORMS[form][0](layer)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(size, 4))


@pytest.mark.parametrize("form", FORMS)
def test_what_a_weight_is_computed_from_is_known(form: str) -> None:
    _, direction, others, dims = FORMS[form]
    found = recomputed_weights(network(form))["0.weight"]
    assert found.direction == (None if direction is None else f"0.{direction}")
    assert list(found.others) == [f"0.{other}" for other in others]
    assert found.divided_over == dims


@pytest.mark.parametrize("form", KEEP_ZEROS)
@pytest.mark.parametrize("said", ["0", "0.weight", "Linear", "__ALL_PRUNABLE__", "re:.*weight", "re:0", "re:.*t$"])
def test_a_name_and_a_pattern_take_the_direction_and_leave_the_norm_out(form: str, said: str) -> None:
    model = network(form)
    found = list(resolve_parameters(model, said, where="here", to_mask=True))
    assert f"0.{FORMS[form][1]}" in found
    assert not {f"0.{other}" for other in FORMS[form][2]} & set(found)


def test_the_norm_is_taken_where_it_is_named_or_nothing_is_masked() -> None:
    model = network("old weight_norm")
    for said in ("0.weight_g", "re:.*weight_g"):
        assert list(resolve_parameters(model, said, where="here", to_mask=True)) == ["0.weight_g"]
    assert "0.weight_g" in resolve_parameters(model, "re:0", where="here")
    assert list(resolve_parameters(model, "__ALL__", where="here")) == list(named_parameters(model))


@pytest.mark.parametrize("form", [name for name in FORMS if name not in KEEP_ZEROS])
@pytest.mark.parametrize("said", ["0", "0.weight", "Linear", "__ALL_PRUNABLE__", "re:.*weight", "re:0"])
def test_a_weight_in_which_zeros_do_not_last_is_refused_with_what_computes_it(form: str, said: str) -> None:
    model = network(form)
    by = {"orthogonal": r"parametrization \(Orthogonal\)", "symmetric": r"\(Symmetric\)"}.get(form, "own pruning")
    with pytest.raises(TargetError, match=f"the weight of '0' is recomputed before every forward by .*{by}"):
        resolve_parameters(model, said, where="here", to_mask=True)


def test_a_model_that_is_one_layer_is_known_too() -> None:
    assert list(resolve_parameters(parametrizations.weight_norm(nn.Linear(2, 2)), "__ALL_PRUNABLE__", where="x")) == [
        "parametrizations.weight.original1"
    ]
    with pytest.raises(TargetError, match="the weight of 'ParametrizedLinear' is recomputed"):
        resolve_parameters(parametrizations.orthogonal(nn.Linear(2, 2)), "__ALL_PRUNABLE__", where="x")


def test_input_channels_lie_where_the_layer_has_them() -> None:
    layer = parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3))
    assert input_dims(nn.Sequential(layer))["0.parametrizations.weight.original1"] == 0


@pytest.mark.parametrize("form", KEEP_ZEROS)
@pytest.mark.parametrize("mask_type", ["unstructured", "2:4", "block4"])
def test_pruned_directions_give_pruned_weights_and_no_nan(form: str, mask_type: str) -> None:
    model = network(form)
    # One row would lose every weight by magnitude.
    with torch.no_grad():
        named_parameters(model)[f"0.{FORMS[form][1]}"][2].mul_(0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    pruning = GMPruningModifier(
        params="0", start_epoch=0.0, end_epoch=2.0, update_frequency=0.5, init_sparsity=0.1, final_sparsity=0.5,
        mask_type=mask_type,
    )  # fmt: skip
    manager = ScheduledModifierManager([pruning])
    manager.modify(model, optimizer, steps_per_epoch=2)
    for step in range(6):
        loss = train_step(model, optimizer, torch.randn(5, 8, generator=torch.Generator().manual_seed(step)))
        assert loss == loss, "a norm of zero"
    manager.finalize()
    assert list(manager.sparsity().values()) == [0.5]
    assert int((model[0].weight == 0).sum()) == 32


@pytest.mark.parametrize(("final", "kind"), [(0.9, "unstructured"), (0.9, "block4"), (0.5, "filter"), (0.5, "channel")])
def test_masks_that_would_leave_a_norm_of_zero_are_refused(final: float, kind: str) -> None:
    model = network("weight_norm")
    pruning = GMPruningModifier(
        params="0", start_epoch=0.0, end_epoch=2.0, update_frequency=0.5, init_sparsity=0.1, final_sparsity=final,
        mask_type=kind,
    )  # fmt: skip
    with pytest.raises(TargetError, match=r"'0.parametrizations.weight.original1' is divided by the norm.*is NaN"):
        ScheduledModifierManager([pruning]).modify(model, torch.optim.SGD(model.parameters()), steps_per_epoch=2)
    moving = RigLPruningModifier(params="0", start_epoch=0.0, end_epoch=2.0, update_frequency=0.5, final_sparsity=0.5)
    with pytest.raises(TargetError, match="masks that move may leave a norm of zero"):
        ScheduledModifierManager([moving]).modify(model, torch.optim.SGD(model.parameters()), steps_per_epoch=2)
