"""One modifier is one file: it knows no other one, and what drives modifiers knows none of them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import sparsify
from sparsify.modifiers.base import Active, Modifier

ROOT = Path(sparsify.__file__).parent
CONCRETE = {cls.__module__ for cls in Modifier.registry.values() if cls.__module__.startswith("sparsify.")}
SHARED = {f"sparsify.modifiers.{name}" for name in ("base", "learning_rate_ledger", "run_log", "schedule")}


def modules_read(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in sys.modules else str(node.module) for name in names)


def test_no_modifier_file_imports_one_that_defines_a_modifier() -> None:
    files = [path for path in (ROOT / "modifiers").glob("*.py") if path.name != "__init__.py"]
    assert len(CONCRETE) > 10
    assert not [(path.name, read) for path in files for read in modules_read(path) if read in CONCRETE]


def test_training_imports_only_the_abstract_modifier_and_the_shared_services() -> None:
    known = {
        (path.name, read)
        for path in (ROOT / "training").glob("*.py")
        for read in modules_read(path)
        if read.startswith("sparsify.modifiers")
    }
    assert known, "nothing was read"
    assert not [one for one in known if one[1] not in SHARED]


def test_work_that_saves_a_state_says_what_is_saved() -> None:
    def of(cls: type[Active]) -> Iterator[type[Active]]:
        for one in cls.__subclasses__():
            yield one
            yield from of(one)

    saves = [cls for cls in of(Active) if "state_dict" in vars(cls) and cls.__module__.startswith("sparsify.")]
    assert len(saves) > 10
    assert not [cls for cls in saves if "Checkpoint:" not in (cls.__doc__ or "")]
