"""The public face: the names, and what importing them costs and touches."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import sparsify
from sparsify.modifiers.base import Modifier

ROOT = Path(sparsify.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.stem not in ("__init__", "__main__")
}
# Had from their own files, since those import a framework.
INTEGRATIONS = {module for module in FILES if module.startswith("sparsify.integrations.")}


@pytest.mark.parametrize("module", sorted(FILES.keys() - INTEGRATIONS))
def test_what_a_file_calls_public_is_carried_out(module: str) -> None:
    file = import_module(module)
    for name in file.__all__:
        assert name in sparsify.__all__, f"{module}.{name} is public there, but cannot be had from sparsify"
        assert getattr(sparsify, name) is getattr(file, name)


def test_nothing_else_is_public() -> None:
    public = [name for module in FILES.keys() - INTEGRATIONS for name in import_module(module).__all__]
    assert sorted(sparsify.__all__) == sorted(["__version__", *public]), "a name is carried twice, or from nowhere"
    assert dir(sparsify) == sorted(sparsify.__all__)


@pytest.mark.parametrize("room", ["analysis", "oneshot", "optimize"])
def test_a_room_that_is_imported_later_is_there_when_it_is_asked_for(room: str) -> None:
    assert getattr(sparsify, room) is import_module(f"sparsify.{room}")


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'analyse_model'"):
        _ = sparsify.analyse_model


def test_every_modifier_is_registered_under_its_public_name() -> None:
    ours = {name: cls for name, cls in Modifier.registry.items() if cls.__module__.startswith("sparsify.")}
    public = {
        name
        for name in sparsify.__all__
        if isinstance(value := getattr(sparsify, name), type)
        and issubclass(value, Modifier)
        and not inspect.isabstract(value)
    }
    assert set(ours) == public and all(getattr(sparsify, name) is cls for name, cls in ours.items())


def test_every_public_name_is_documented() -> None:
    bare = [name for name in sparsify.__all__ if not name.startswith("_") and not getattr(sparsify, name).__doc__]
    # Literals, aliases and mappings can carry no text.
    assert set(bare) <= {"Experiment", "Framework", "LearningRateSchedule", "PRESETS", "Phase"}


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(sparsify.__file__).parents[1])
    command = f"import sys; sys.path.insert(0, {root!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", command], cwd=folder, capture_output=True, text=True, check=False
    )


def test_importing_is_quiet_light_and_leaves_no_trace(tmp_path: Path) -> None:
    heavy = "onnx onnxruntime onnxscript transformers matplotlib rich torch.onnx._internal.exporter lightning sklearn"
    done = run(
        "import os, logging, torch; before = dict(os.environ), logging.getLogger().handlers[:], torch.get_rng_state(); "
        "import sparsify; "
        "after = dict(os.environ), logging.getLogger().handlers[:], torch.get_rng_state(); "
        "assert before[:2] == after[:2] and torch.equal(before[2], after[2]); "
        f"heavy = [name for name in '{heavy}'.split() if name in sys.modules]; "
        "assert not heavy, heavy; assert not logging.getLogger('sparsify').handlers",
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


WATCH = """
import torch
seen = []
sys.dont_write_bytecode = True

def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes or event.startswith(("socket.", "subprocess.")):
        seen.append((event, str(args)))

sys.addaudithook(watch)
import sparsify
assert not seen, seen
"""


def test_importing_opens_no_socket_and_writes_no_file(tmp_path: Path) -> None:
    # Audit hooks see what Python does, whoever asks for it.
    done = run(WATCH, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_star_import_brings_no_modules() -> None:
    space: dict[str, object] = {}
    exec("from sparsify import *", space)
    assert not [name for name, value in space.items() if isinstance(value, type(sys))]


@pytest.mark.slow
def test_a_type_checker_sees_every_public_name(tmp_path: Path) -> None:
    names = sorted(set(sparsify.__all__) - {"__version__"})
    (tmp_path / "user.py").write_text(f"from sparsify import __version__, {', '.join(names)}\n")
    (tmp_path / "typo.py").write_text("from sparsify import analyse_model\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    there = {**os.environ, "MYPYPATH": str(ROOT.parent), "MYPY_CACHE_DIR": str(tmp_path / "cache")}

    def checked(file: str) -> str:
        return subprocess.run([*command, file], cwd=tmp_path, env=there, capture_output=True, text=True).stdout

    assert "Success" in checked("user.py")
    assert 'has no attribute "analyse_model"' in checked("typo.py")
