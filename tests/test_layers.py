"""The house stands: a folder imports only folders of lower floors, and no files import each other in a circle.

FLOORS is the one table of the architecture; docs/design.md is drawn from it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sparsify"

FLOORS = [
    ["errors"],
    ["output", "model"],
    ["pruning", "quantization", "palettization"],
    ["modifiers", "onnx"],
    ["recipe", "oneshot"],
    ["training", "analysis"],
    ["optimize", "integrations"],
    ["experiments"],
    ["__init__"],
    ["cli"],
    ["__main__", "run"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}
HEAVY = {"transformers", "timm", "datasets", "lightning", "pytorch_lightning", "accelerate"}
LINES = 600


def files_of(root: Path) -> dict[str, Path]:
    """Every file under its module's name."""
    paths = sorted(root.rglob("*.py"))
    return {".".join(p.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """What a file imports, for types alone and inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            source = str(node.module)
            yield from (whole if (whole := f"{source}.{alias.name}") in known else source for alias in node.names)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def faults(root: Path) -> list[str]:
    """What breaks the rule: an import that does not point down, a circle, a heavy package below its floor."""
    files, found, edges = files_of(root), [], {}
    for module, path in files.items():
        room = room_of(module)
        targets = set(imports(path, files))
        if room not in ("integrations", "experiments"):
            found += [f"{module} imports {name}" for name in sorted(targets) if name.split(".")[0] in HEAVY]
        ours = {target for target in targets if target.split(".")[0] == root.name}
        for target in sorted(ours):
            below = room_of(target)
            if below != room and FLOOR[below] >= FLOOR[room]:
                found.append(f"{module} (floor {FLOOR[room]}) imports {target} (floor {FLOOR[below]})")
        # The __init__ of a folder only carries names out.
        edges[module] = set() if path.name == "__init__.py" else {t for t in ours if files[t].name != "__init__.py"}
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        found.append(f"a circle: {' -> '.join(reversed(error.args[1]))}")
    return found


def house(root: Path) -> str:
    """The floors as a mermaid flowchart: an arrow for each import between folders that no longer way shows."""
    files = files_of(root)
    edges: dict[str, set[str]] = {}
    for module, path in files.items():
        edges.setdefault(room_of(module), set()).update(
            room_of(target) for target in imports(path, files) if target.split(".")[0] == root.name
        )
    down = {room: {below for below in edges[room] if FLOOR[below] < FLOOR[room]} for room in edges}

    def reached(room: str) -> set[str]:
        return down[room].union(*map(reached, down[room]))

    lines = ["flowchart TD"]
    for floor, rooms in sorted(enumerate(FLOORS, 1), reverse=True):
        lines += [
            f"  subgraph floor{floor} [floor {floor}]",
            *(f"    {room}" for room in rooms if room in edges),
            "  end",
        ]
    for room in (room for rooms in reversed(FLOORS) for room in rooms if room in edges):
        longer = set().union(*map(reached, down[room])) if down[room] else set()
        lines += [f"  {room} --> {below}" for below in sorted(down[room] - longer)]
    return "\n".join(lines)


def test_the_picture_of_the_house_is_current() -> None:
    page = (ROOT.parent / "docs" / "design.md").read_text(encoding="utf-8")
    assert f"```mermaid\n{house(ROOT)}\n```" in page, "run `make docs`"


def test_imports_point_down_and_in_no_circle() -> None:
    assert not faults(ROOT)


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        (
            "model/a.py",
            "from sparsify.pruning import b",
            "sparsify.model.a (floor 2) imports sparsify.pruning.b (floor 3)",
        ),
        ("model/a.py", "def f():\n    import sparsify.output.c", "(floor 2) imports sparsify.output.c (floor 2)"),
        ("model/a.py", "if TYPE_CHECKING:\n    from sparsify import shrink", "imports sparsify (floor 9)"),
        ("output/d.py", "from sparsify.output.c import x", "a circle: "),
        ("optimize/a.py", "import timm.models", "sparsify.optimize.a imports timm.models"),
        ("pruning/b.py", "from sparsify.model.a import x", None),
        ("integrations/a.py", "import lightning", None),
    ],
)
def test_the_rule_fails_when_it_is_broken(tmp_path: Path, file: str, text: str, fault: str | None) -> None:
    root = tmp_path / "sparsify"
    for name in ("__init__", "model/a", "pruning/b", "output/c", "output/d", "optimize/a", "integrations/a"):
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("from sparsify.output import d" if name == "output/c" else "")
    assert not faults(root)
    (root / file).write_text(text)
    found = faults(root)
    assert [f"{fault in one}" for one in found] == (["True"] if fault else []), found


def test_a_file_is_read_in_one_sitting() -> None:
    """A question, no fence: is a longer file one subject? Then raise it here, and say so."""
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in files_of(ROOT).items()}
    assert not {module: lines for module, lines in lengths.items() if lines > LINES}


def test_at_the_top_stand_folders_alone() -> None:
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}
    rooms = {path.parent.name: path for path in ROOT.glob("*/__init__.py")}
    assert set(rooms) == {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert not [path for path in ROOT.rglob("*.py") if len(path.relative_to(ROOT).parts) > 2]
    for path in rooms.values():
        assert "mports" in (ast.get_docstring(ast.parse(path.read_text())) or ""), f"{path}: say what it may import"


def test_no_test_file_imports_another() -> None:
    """Tests share tests/loops.py, tests/zoo/ and their like, so that each file can be read, moved and run alone."""
    files = files_of(ROOT.parent / "tests")
    for module, path in files.items():
        assert not [name for name in imports(path, files) if "test_" in name and name.startswith("tests.")], module


def test_no_file_is_called_utils_or_helpers() -> None:
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert not [module for module in files_of(ROOT) if module.split(".")[-1] in vague]


def test_every_file_says_what_is_public() -> None:
    assert not [
        module
        for module, path in files_of(ROOT).items()
        if path.name not in ("__init__.py", "__main__.py") and "__all__" not in path.read_text(encoding="utf-8")
    ]
