"""A written folder is the old one or the new one, never half of either."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsify.errors import DataFileError
from sparsify.output import folders
from sparsify.output.folders import replacing_folder, whole_folder

WRITER = """
import sys
from sparsify.output import folders
if sys.argv[2] == "two moves":
    folders._exchange = lambda one, other: False
print("ready", flush=True)
n = 0
while True:
    n += 1
    with folders.replacing_folder(sys.argv[1], ["a", "b"]) as made:
        for name in ("a", "b"):
            (made / name).write_text(str(n))
"""


@pytest.fixture(params=["one exchange", "two moves"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways in which an old folder gives its place to a new one."""
    if request.param == "two moves":
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    return str(request.param)


def test_the_new_folder_takes_the_place_of_the_old(way: str, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    for text in ("old", "new"):
        with replacing_folder(target, ["mine"]) as made:
            (made / "mine").write_text(text)
        if text == "old":
            (target / "theirs").write_text("kept")
            (target / "more").mkdir()
            (target / "more" / "x").write_text("kept")
    assert {path.name: path.read_text() for path in target.rglob("*") if path.is_file()} == {
        "mine": "new",
        "theirs": "kept",
        "x": "kept",
    }
    assert os.listdir(target.parent) == ["folder"]


def test_an_error_leaves_the_old_folder_and_no_litter(way: str, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "mine").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_folder(target) as made:
        (made / "mine").write_text("half")
        raise KeyboardInterrupt
    assert (target / "mine").read_text() == "old" and os.listdir(tmp_path) == ["folder"]


def test_a_file_in_the_way_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataFileError, match="it is a file"), replacing_folder(tmp_path / "file"):
        pass


def test_kill_9_never_leaves_half_a_folder(way: str, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    root = Path(folders.__file__).parents[2]
    code = f"import sys; sys.path.insert(0, {str(root)!r})\n{WRITER}"
    draw = random.Random(0)
    with subprocess.Popen([sys.executable, "-c", code, str(target), way], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        seen = set()
        for _ in range(30):
            time.sleep(draw.uniform(0.01, 0.05))
            process.send_signal(signal.SIGSTOP)
            held = whole_folder(target)
            if held.exists():
                texts = {name: (held / name).read_text() for name in ("a", "b")}
                assert texts["a"] == texts["b"], texts
                seen.add(texts["a"])
            process.send_signal(signal.SIGCONT)
        process.kill()
    held = whole_folder(target)
    assert len(seen) > 3 and (held / "a").read_text() == (held / "b").read_text()
