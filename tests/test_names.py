"""One word, one thing: no two classes, functions or constants of the package share a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "sparsify"

# What every file has, and means the same in each; the callback is one thing, once for each framework.
EVERYWHERE = {"__all__", "log", "SparsifyCallback"}


def defined(path: Path) -> Iterator[str]:
    """The module-level names that a file makes: classes, functions and what is assigned, not what is imported."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def shared(root: Path) -> dict[str, list[str]]:
    """Each name that several files make, with the files."""
    files: dict[str, list[str]] = defaultdict(list)
    for path in sorted(root.rglob("*.py")):
        for name in set(defined(path)) - EVERYWHERE:
            files[name].append(path.relative_to(root).as_posix())
    return {name: places for name, places in files.items() if len(places) > 1}


def test_no_two_things_share_a_name() -> None:
    assert not shared(ROOT)


def test_a_shared_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("class Plan: ...\nlog = 1\nLEFT, RIGHT = 1, 2")
    (tmp_path / "two.py").write_text("from one import Plan\nlog = 2\nLEFT: int = 3\ndef plan(): ...")
    assert shared(tmp_path) == {"LEFT": ["one.py", "two.py"]}
    (tmp_path / "three.py").write_text("def Plan(): ...")
    assert shared(tmp_path)["Plan"] == ["one.py", "three.py"]
