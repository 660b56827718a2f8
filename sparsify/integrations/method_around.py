"""A method of one object with something around it; its class stays as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__: list[str] = []


class MethodAround:
    """Calls `around(original, ...)` in place of `original`, and looks like it (`inspect.signature`).

    Args:
        around: called with the original and its arguments.
        original: the bound method.
    """

    def __init__(self, around: Callable[..., Any], original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self._around, self._original = around, original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._around(self._original, *args, **kwargs)
