"""Saved state: plain types and tensors only, sealed, so that what does not fit is found before anything is changed."""

from __future__ import annotations

import difflib
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from sparsify.errors import SparsifyWarning, StateError
from sparsify.modifiers.base import Modifier
from sparsify.recipe import Recipe

__all__: list[str] = []


VERSION = 1


class Seal:
    """The mark of one recipe on the states of its runs.

    Args:
        recipe: the recipe that is at work.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    @cached_property
    def fingerprint(self) -> str:
        """The recipe's fingerprint."""
        return self._recipe.fingerprint

    def put_on(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """The `sealed` state of `content`."""
        return sealed(content, recipe=self._recipe.to_yaml(), fingerprint=self.fingerprint)

    def check(self, state: object, strict: bool = True) -> None:
        """Calls `verify` on `state`, with its arguments and errors."""
        verify(state, recipe=self._recipe.to_yaml(), fingerprint=self.fingerprint, strict=strict)


def sealed(content: Mapping[str, Any], *, recipe: str, fingerprint: str) -> dict[str, Any]:
    """A state of `content` that tells its version and recipe, and carries a checksum of itself.

    Tensors are copies: a state that is kept in memory stays what it was while training goes on.
    """
    state = {"version": VERSION, "fingerprint": fingerprint, "recipe": recipe, **detached(content)}
    return {**state, "checksum": checksum(state)}


def verify(state: object, *, recipe: str, fingerprint: str, strict: bool = True) -> None:
    """Refuses a state that `sealed` did not make, that was damaged, or that belongs to another recipe.

    Args:
        state: what was saved.
        recipe: the recipe's text now, to say what differs.
        fingerprint: the recipe's fingerprint now.
        strict: False: another recipe is a warning. A damaged state is refused either way: it would fail half-way.

    Raises:
        StateError: it does not fit.
    """
    if not isinstance(state, Mapping) or "checksum" not in state or "version" not in state:
        what = (
            f"a {type(state).__name__}"
            if not isinstance(state, Mapping)
            else f"a dict of {sorted(map(str, state))[:5]}"
        )
        raise StateError(f"this is not a manager's state but {what}; give what manager.state_dict() returned.")
    if state["version"] != VERSION:
        raise StateError(
            f"the state is of version {state['version']!r}; this sparsify reads version {VERSION}. Load it with the "
            "sparsify that wrote it."
        )
    if checksum({key: value for key, value in state.items() if key != "checksum"}) != state["checksum"]:
        raise StateError(
            "the state does not match its checksum: it was damaged or changed after it was saved. Load another "
            "checkpoint."
        )
    if state.get("fingerprint") != fingerprint:
        lines = difflib.unified_diff(str(state.get("recipe")).splitlines(), recipe.splitlines(), lineterm="", n=0)
        # The first two lines name files, and @@ lines count.
        differing = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
        shown = "".join(f"\n  {line}" for line in differing[:12]) or " nothing in its text"
        text = (
            f"the state belongs to another recipe; what differs (- saved, + now):{shown}\n"
            "Load it with the recipe it was saved with, or with strict=False to take over what fits."
        )
        if strict:
            raise StateError(text)
        warnings.warn(text, SparsifyWarning, stacklevel=5)


def checksum(value: object) -> str:
    """The sha256 of a value made of None, bool, int, float, str, lists, dicts and tensors, as hexadecimal digits.

    Equal for equal values wherever the tensors live and in whatever order dicts were filled; a tuple counts as a list.

    >>> checksum({"a": 1, "b": [2.0]}) == checksum({"b": (2.0,), "a": 1})
    True
    >>> checksum(1) == checksum(True)
    False

    Raises:
        StateError: something else is inside.
    """
    digest = hashlib.sha256()
    _feed_hash(digest, value, "state")
    return digest.hexdigest()


def _feed_hash(digest: hashlib._Hash, value: object, where: str) -> None:
    # Every piece carries its type and length, so that no two values give the same bytes.
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    elif value is None or type(value) in (bool, int, float, str):
        text = repr(value)
        digest.update(f"{type(value).__name__} {len(text)} {text};".encode())
    elif isinstance(value, list | tuple):
        digest.update(f"list {len(value)};".encode())
        for index, item in enumerate(value):
            _feed_hash(digest, item, f"{where}[{index}]")
    elif isinstance(value, Mapping):
        digest.update(f"dict {len(value)};".encode())
        for key in sorted(value, key=repr):
            _feed_hash(digest, key, f"{where}: key {key!r}")
            _feed_hash(digest, value[key], f"{where}[{key!r}]")
    else:
        raise StateError(
            f"{where} is a {type(value).__name__}; a state holds None, bool, int, float, str, lists, dicts and "
            "tensors, so that torch.load(weights_only=True) reads it."
        )


def detached(value: object) -> Any:
    """A copy of a state that later training does not change: tensors are cloned, lists and dicts are new."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: detached(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [detached(item) for item in value]
    return value


def keyed(modifiers: Sequence[Modifier]) -> dict[str, Modifier]:
    """Modifiers under names for saved state: the class, numbered from the second on, so that others may come and go."""
    found: dict[str, Modifier] = {}
    for modifier in modifiers:
        name = type(modifier).__name__
        count = sum(key.partition("#")[0] == name for key in found)
        found[f"{name}#{count + 1}" if count else name] = modifier
    return found
