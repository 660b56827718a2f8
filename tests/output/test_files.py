"""A written file is the old one or the new one, never half of either."""

from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsify.errors import DataError, DataFileError
from sparsify.output.files import replacing

WRITER = """
import sys
from sparsify.output.files import replacing
print("ready", flush=True)
n = 0
while True:
    n += 1
    with replacing(sys.argv[1]) as path:
        with path.open("wb") as file:
            for _ in range(64):
                file.write(bytes([n % 251]) * 65536)
"""


def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with replacing(target) as path:
        path.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_an_error_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(target) as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_the_new_content_is_written_beside_the_old(tmp_path: Path) -> None:
    """A rename is one step within a file system only, and a temporary folder is often another one."""
    with replacing(tmp_path / "file") as path:
        path.write_text("new")
        assert path.parent == tmp_path and path != tmp_path / "file"


def test_a_saved_file_has_the_usual_permissions(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as path:
        path.write_text("x")
    (tmp_path / "plain").write_text("x")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_path_that_cannot_be_written_is_a_data_error_and_an_os_error(tmp_path: Path) -> None:
    for target in (tmp_path / "missing" / "file", tmp_path):
        with pytest.raises(DataFileError, match=target.name), replacing(target):
            pytest.fail("nothing is to be written")
        with pytest.raises(OSError, match="cannot write"), replacing(target):
            pytest.fail("nothing is to be written")
    assert issubclass(DataFileError, DataError)


def _killed_while_writing(target: Path, times: int) -> None:
    rng = random.Random(0)
    for _ in range(times):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0.01, 0.08))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if target.exists():
            content = target.read_bytes()
            assert len(content) == 64 * 65536 and len(set(content)) == 1


def test_kill_9_never_leaves_half_a_file(tmp_path: Path) -> None:
    _killed_while_writing(tmp_path / "file", 4)


@pytest.mark.slow
def test_kill_9_never_leaves_half_a_file_many_times(tmp_path: Path) -> None:
    _killed_while_writing(tmp_path / "file", 60)


def test_what_a_killed_process_left_is_swept_by_the_next_write(tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        while not list(tmp_path.glob(".model.bin.*")):
            time.sleep(0.001)
        os.kill(writer.pid, signal.SIGSTOP)
        left = set(tmp_path.glob(".model.bin.*"))
        with replacing(target) as path:
            path.write_bytes(b"new")
        # What a process writes that lives is left alone.
        assert set(tmp_path.glob(".model.bin.*")) == left
        writer.kill()
    with replacing(target) as path:
        path.write_bytes(b"newer")
    assert [one.name for one in tmp_path.iterdir()] == ["model.bin"] and target.read_bytes() == b"newer"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "model.bin"
    target.write_bytes(b"old")
    script = (
        "import resource, signal, sys\n"
        "from sparsify.errors import DataFileError\nfrom sparsify.output.files import replacing\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    with replacing(sys.argv[1]) as path:\n        path.write_bytes(bytes(5000))\n"
        "except DataFileError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True)
    assert "cannot write" in done.stdout and "File too large. What was there is unchanged." in done.stdout
    assert [one.name for one in tmp_path.iterdir()] == ["model.bin"] and target.read_bytes() == b"old"
