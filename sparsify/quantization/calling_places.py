"""The place in a user's code from which an operation is called: lines and columns, from a module's forward inwards.

One operation has the same place in every call of the forward, whatever else that call computes: so it is known again
where training goes ways that the trace does not have.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType

import torch

__all__: list[str] = []

# Directories whose frames are no user's code.
_OURS = tuple(f"{Path(file).parent}/" for file in (torch.__file__, str(Path(__file__).parent)))


def calling_place(outermost: CodeType) -> str:
    """The place of the call that runs now, below the innermost frame of `outermost`.

    As "forward:12.8 > merged:3.15": functions, each with the line, counted from its first, and the column.
    """
    found: list[tuple[CodeType, int]] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not outermost:
        if _is_users(frame.f_code):
            found.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return " > ".join(_position(code, instruction) for code, instruction in reversed(found))


@lru_cache(1 << 12)
def _is_users(code: CodeType) -> bool:
    return not code.co_filename.startswith(_OURS)


@lru_cache(1 << 12)
def _position(code: CodeType, instruction: int) -> str:
    """Independent of where the file lies, of what stands above the function, and of Python's version from 3.11 on."""
    positions = getattr(code, "co_positions", None)
    if positions is None:
        return f"{code.co_name}:{instruction}"
    line, _, column, _ = next(islice(positions(), instruction // 2, None), (None, None, None, None))
    return f"{code.co_name}:{(line or code.co_firstlineno) - code.co_firstlineno}.{column}"
