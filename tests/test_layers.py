"""The house stands: imports point down, in no circle, and no file outgrows one sitting. docs/design.md draws it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "sparsify"

FLOORS = {
    6: {"__main__", "cli", "references", "experiments", "integrations"},
    5: {"manager", "session", "optimize"},
    4: {"recipe", "oneshot", "analysis", "export", "verify", "proof", "benchmark", "report"},
    3: {"modifiers"},
    2: {
        "masking",
        "channels",
        "scoring",
        "shrinking",
        "removal",
        "quantize",
        "palettize",
        "onnx_rewrites",
        "onnx_graph",
        "onnx_attention",
        "onnx_upsampling",
        "onnx_weight_only",
        "gradients",
        "moments",
        "identity",
        "added_parameters",
    },
    1: {
        "targets",
        "graph",
        "atoms",
        "labels",
        "label_rules",
        "families",
        "ranks",
        "hooks",
        "selection",
        "state",
        "timer",
        "runtime",
        "signature",
    },
    0: {"errors", "files", "schedule", "erdos_renyi", "version"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

# The rooms that carry the public names out, and every room may be read from there.
ENTRANCE = {"sparsify"}
# What modifiers may share with each other and with the manager.
COMMON = {f"sparsify.modifiers.{name}" for name in ("base", "ledger", "log", "moving_masks", "teacher")}
LINES = 550


@dataclass(frozen=True)
class Import:
    """`module` imports `target`; not `at_import` inside a function or for types alone."""

    module: str
    target: str
    line: int
    at_import: bool


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports(module: str, path: Path, known: set[str]) -> Iterator[Import]:
    """Every import of one file, those inside functions and under TYPE_CHECKING included."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, alias.name, child.lineno, at_import)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}:{child.lineno}: imports are absolute"
                source = child.module or ""
                for alias in child.names:
                    whole = f"{source}.{alias.name}"
                    yield Import(module, whole if whole in known else source, child.lineno, at_import)
            else:
                yield from walk(child, at_import and not deferred)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


@cache
def house() -> tuple[Import, ...]:
    known = set(modules())
    return tuple(found for module, path in modules().items() for found in imports(module, path, known))


def ours() -> list[Import]:
    return [found for found in house() if found.target.split(".")[0] == "sparsify"]


def misplaced(found: Import) -> str | None:
    """Why an import may not be there; None where it may."""
    if found.module in ENTRANCE:
        return None
    if found.target in ENTRANCE:
        return "reads the public face from inside; import the file that has the name"
    room, target = room_of(found.module), room_of(found.target)
    if room != target and FLOOR[target] > FLOOR[room]:
        return f"floor {FLOOR[room]} ({room}) imports floor {FLOOR[target]} ({target})"
    return None


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """One way round, if there is any."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str] | None:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return None
        for successor in sorted(edges.get(node, ())):
            if found := visit(successor, [*trail, node]):
                return found
        done.add(node)
        return None

    for start in sorted(edges):
        if found := visit(start, []):
            return found
    return None


def test_every_file_has_a_floor() -> None:
    rooms = {room_of(module) for module in modules() if module not in ENTRANCE}
    assert rooms <= set(FLOOR), f"give a floor in FLOORS, and in docs/design.md, to {sorted(rooms - set(FLOOR))}"


def test_imports_point_down() -> None:
    wrong = [f"{found.module}:{found.line}: {why}" for found in ours() if (why := misplaced(found))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "target", "allowed"),
    [
        ("sparsify.pruning.masker", "sparsify.model.targets", True),
        ("sparsify.model.targets", "sparsify.pruning.masker", False),
        ("sparsify.modifiers.magnitude_pruning", "sparsify.recipe.recipe", False),
        ("sparsify.errors", "sparsify", False),
        ("sparsify", "sparsify.training.manager", True),
        ("sparsify.quantization.fake_quantize", "sparsify.quantization.scheme", True),
    ],
)
def test_the_rule_tells_up_from_down(module: str, target: str, allowed: bool) -> None:
    assert (misplaced(Import(module, target, 1, True)) is None) == allowed


def test_no_import_goes_in_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for found in ours():
        # A package's own list of names is entered with each of its files, and is no subject of its own.
        if found.at_import and modules()[found.module].name != "__init__.py":
            edges.setdefault(found.module, set()).add(found.target)
    assert circle(edges) is None


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_modifiers_do_not_know_each_other_and_the_manager_knows_none() -> None:
    wrong = [
        f"{found.module}:{found.line} imports {found.target}"
        for found in ours()
        if found.target.startswith("sparsify.modifiers.")
        and found.target not in COMMON
        and modules()[found.module].name != "__init__.py"
        and (room_of(found.module) in {"manager", "session"} or concrete_siblings(found))
    ]
    assert not wrong, "\n".join(wrong)


def concrete_siblings(found: Import) -> bool:
    """Between modifier files only the abstract GradualPruning is shared, which carries the fields of its family."""
    if room_of(found.module) != "modifiers":
        return False
    return found.target != "sparsify.modifiers.magnitude_pruning"


def test_benchmark_reads_a_file_and_knows_no_torch() -> None:
    assert "sparsify.onnx.benchmark" in modules()
    assert not [
        found for found in house() if found.module == "sparsify.onnx.benchmark" and found.target.startswith("torch")
    ]


def reached() -> set[str]:
    """Our modules that `import sparsify` runs."""
    seen, todo = {"sparsify"}, ["sparsify"]
    while todo:
        module = todo.pop()
        targets = {found.target for found in ours() if found.module == module and found.at_import}
        # Importing a.b.c runs a and a.b as well.
        targets |= {".".join(target.split(".")[:end]) for target in targets for end in range(1, target.count(".") + 1)}
        todo += sorted(targets - seen)
        seen |= targets
    return seen


@pytest.mark.parametrize(
    "package", ["onnx", "onnxruntime", "onnxscript", "transformers", "matplotlib", "rich", "lightning"]
)
def test_importing_sparsify_reaches_nothing_heavy(package: str) -> None:
    modules = reached()
    wrong = [
        f"{found.module}:{found.line}"
        for found in house()
        if found.at_import and found.module in modules and found.target.split(".")[0] == package
    ]
    assert not wrong, f"import {package} inside the function that needs it: {wrong}"


def test_files_are_read_in_one_sitting() -> None:
    counts = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules().items()}
    assert not {module: count for module, count in counts.items() if count > LINES}


def test_every_file_says_what_is_public() -> None:
    missing = [
        module
        for module, path in modules().items()
        if path.name != "__init__.py" and "__all__" not in path.read_text(encoding="utf-8")
    ]
    assert not missing


def test_no_file_is_called_utils_or_helpers() -> None:
    assert not [
        module for module in modules() if module.split(".")[-1] in {"utils", "util", "helpers", "common", "misc"}
    ]
