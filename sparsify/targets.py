"""Names in a recipe -> the parameters and layers of a model that they mean."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

__all__: list[str] = []


def clean_name(name: str) -> str:
    """`name` without the prefixes that wrappers add."""
    raise NotImplementedError


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under its clean name; a tied one once, under its first."""
    raise NotImplementedError


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module but the model itself under its clean name; a shared one once, under its first."""
    raise NotImplementedError


def resolve_parameters(
    model: nn.Module, names: str | Iterable[str], *, where: str, strict: bool = True, ignore: Iterable[str] = ()
) -> dict[str, nn.Parameter]:
    """The parameters that `names` mean, in the model's order."""
    raise NotImplementedError


def resolve_layers(
    model: nn.Module, names: str | Iterable[str], *, where: str, strict: bool = True, ignore: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """The layers that `names` mean, in the model's order."""
    raise NotImplementedError
