"""`sparsify doctor`, `--version`, and another product of the same import name."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

import sparsify
from sparsify.cli import doctor
from sparsify.cli.main import main
from sparsify.errors import DISTRIBUTION, install_line

ROOT = Path(__file__).parents[2]


def installed(folder: Path, name: str, version: str, author: str, requires: tuple[str, ...] = ()) -> None:
    """Puts a distribution with no files into `folder`."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", f"Author: {author}"]
    (about / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")


def test_doctor_names_versions_processor_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["version"] == sparsify.__version__ and found["folder"] == str(ROOT / "sparsify")
    assert found["cores"] >= 1 and found["torch_threads"] >= 1 and found["exact_int8"] in (True, False)
    assert {"rich", "transformers"} <= {package["name"] for package in found["packages"]}
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "int8 sums exact by default" in text and text.endswith("No problems found.\n")


def test_doctor_says_what_is_too_old_and_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(
        tmp_path, DISTRIBUTION, "9.0", "us", ("torch<99,>=98.5", "nosuchpackage>=3", 'rich>=99; extra == "report"')
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"problem: torch [\d.+a-z]+ is older than 98\.5: pip install --upgrade \"torch>=98\.5\"", text)
    assert 'problem: nosuchpackage is not installed: pip install "nosuchpackage>=3"' in text
    assert "rich 99" not in text and text.count("problem:") == 2


def test_another_product_of_the_same_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(tmp_path, "sparsify", "1.6.1", "Neuralmagic, Inc.")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert main(["recipe", "schema"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("warning: another product, sparsify 1.6.1 by Neural Magic") and json.loads(said.out)
    assert "pip uninstall sparsify" in said.err and f"--no-deps {DISTRIBUTION}" in said.err
    assert main(["doctor"]) == 1


def test_an_older_name_of_ours_is_no_other_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, "sparsify", "0.1.0", "")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert doctor.other_product() is None


def test_a_failing_product_of_int8_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("illegal instruction\nmore")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    found = doctor.diagnose()
    assert found.exact_int8 is None
    assert "onnxruntime cannot run a product of int8: illegal instruction" in found.problems


def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(tmp_path, DISTRIBUTION, "9.0", "us", ("torch>=2.6", "onnx>=1.9"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert not doctor.diagnose().problems, "1.23 is newer than 1.9, 2.13 than 2.6"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"sparsify {sparsify.__version__}\n"


def test_every_install_line_names_our_distribution() -> None:
    """`pip install sparsify` would bring the other product: no text of ours may advise it."""
    assert install_line("report") == 'pip install "sparsify-recipes[report]"'
    files = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile"]
    for folder in ("sparsify", "docs", "examples", "benchmarks"):
        files += [path for ending in ("py", "md", "html", "js") for path in (ROOT / folder).rglob(f"*.{ending}")]
    wrong = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"""\bpip install[^#`]*[ '"]sparsify(?![\w.-])""", line)
        and not re.search("brings another product|is not this library", line)
    ]
    assert not wrong, wrong


def test_extras_refer_to_our_distribution() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'name = "{DISTRIBUTION}"' in text and not re.search(r"""["']sparsify\[""", text)
