"""Keeps the exporter's registry of translations from one export to the next."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

__all__: list[str] = []

NAME = "from_torchlib"
_kept: dict[tuple[int, int], Any] = {}


@contextmanager
def kept_registry() -> Iterator[None]:
    """Lets `torch.onnx.export` find its registry of translations ready, where it was built before.

    For every export torch parses the sources of some 500 functions of onnxscript again: .4 of the 1.0 CPU-seconds that
    a small network takes (`ONNXRegistry.from_torchlib`, seen in torch 2.13.0 with onnxscript 0.7.2). Needless once
    torch keeps them. Where torch is built otherwise, nothing is changed.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        original = _original(ONNXRegistry)
    except (ImportError, AttributeError, KeyError):
        yield
        return

    def from_torchlib(cls: type, *args: Any, **kwargs: Any) -> Any:
        opset = kwargs.get("opset_version", args[0] if args else 0)
        # Operators that a library registered since then have translations too: torchvision's, for one.
        key = opset, len(torch._C._dispatch_get_all_op_names())
        if key not in _kept:
            _kept[key] = original.__func__(cls, *args, **kwargs)
        registry = copy.copy(_kept[key])
        # What an export adds is for itself.
        registry.functions = {target: list(decompositions) for target, decompositions in registry.functions.items()}
        return registry

    setattr(ONNXRegistry, NAME, classmethod(from_torchlib))
    try:
        yield
    finally:
        setattr(ONNXRegistry, NAME, original)


@cache
def _original(registry: type) -> Any:
    """The class's own method; asked once, since another export may have put a kept one in its place."""
    return vars(registry)[NAME]
