"""Every error and warning that sparsify raises on purpose.

::

    SparsifyError
    |-- RecipeError    (ValueError)              a recipe says something that cannot be meant
    |   `-- RecipeFileError    (OSError)         its file is missing or unreadable
    |-- TargetError    (ValueError)              a name matches nothing in the model, or cannot be used
    |-- StateError     (RuntimeError)            a call in the wrong order, or state that does not fit
    |-- ExportError    (RuntimeError)            a model that cannot be exported, or a file that cannot be run
    |-- DataError      (ValueError)              values that cannot be used: NaN weights, a broken file
    |   `-- DataFileError      (OSError)         a file that is missing or unreadable
    `-- ArgumentError  (ValueError, TypeError)   a wrong argument

A message says what was wrong, where, with which value, and the way out; it is raised before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = [
    "ArgumentError",
    "DataError",
    "ExportError",
    "RecipeError",
    "SparsifyError",
    "SparsifyWarning",
    "StateError",
    "TargetError",
]


class SparsifyError(Exception):
    """Base of every error that sparsify raises on purpose."""


class RecipeError(SparsifyError, ValueError):
    """A recipe says something that cannot be meant.

    Args:
        message: what was wrong, with the value and the way out.
        field: the key in the recipe that it is about, as a path from the modifier down ("final_sparsity",
            "scheme.weights.num_bits"); None where it is about the modifier or the file as a whole. The reader of recipe
            text uses it to put "file:line:" in front of the message.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class RecipeFileError(RecipeError, OSError):
    """A recipe file that is missing or cannot be read."""


class TargetError(SparsifyError, ValueError):
    """A name matches nothing in the model, or what it matches cannot be used."""


class StateError(SparsifyError, RuntimeError):
    """A call in the wrong order, or a saved state that does not fit."""


class ExportError(SparsifyError, RuntimeError):
    """A model that cannot be exported, or an exported file that cannot be run."""


class DataError(SparsifyError, ValueError):
    """Values that cannot be used: NaN weights, a broken file."""


class DataFileError(DataError, OSError):
    """A file that is missing or cannot be read."""


class ArgumentError(SparsifyError, ValueError, TypeError):
    """A wrong argument to a public function."""


class SparsifyWarning(UserWarning):
    """Something works, but not as its user may expect; said once."""


DISTRIBUTION = "sparsify-recipes"
"""The name that pip knows this package by. `sparsify` on PyPI is another product with the same import name."""


def install_line(extra: str) -> str:
    """The command that installs what an extra of ours needs.

    >>> install_line("report")
    'pip install "sparsify-recipes[report]"'
    """
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """The end of an error message that names what `name` may have meant; empty where nothing comes near.

    >>> did_you_mean("final_sparcity", ["init_sparsity", "final_sparsity"])
    " Did you mean 'final_sparsity' or 'init_sparsity'?"
    >>> did_you_mean("x", ["final_sparsity"])
    ''
    """
    # Comparing takes time in the product of the lengths: a recipe of a megabyte must not hang in its error message.
    if len(name) > 100:
        return ""
    near = get_close_matches(name, [k for k in known if len(k) <= 100][:1000], n=count, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """First line of an error's message that is not blank, cut to 300 characters; its type where there is none."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if len(text) <= 300 else f"{text[:297]}..."
