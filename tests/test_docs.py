"""What the pages say is so: every block of Python runs, every recipe loads, the reference is current."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from sparsify import Recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(?P<language>\w*)[ \t]*(?P<file>\S*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)#\s]*)(?:#[^)]*)?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block. "```yaml recipe.yaml" names a file, which the Python blocks after it find in their folder."""

    language: str
    file: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    return [
        Block(found["language"], found["file"], found["text"], text.count("\n", 0, found.start()) + 2)
        for found in FENCE.finditer(text)
    ]


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run_page(path: Path) -> int:
    """Runs a page from top to bottom, as a reader would type it; returns how many blocks ran."""
    space: dict[str, object] = {"__name__": "__main__"}
    count = 0
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            # Line numbers of the page, so that a traceback points into it.
            exec(compile("\n" * (block.line - 1) + block.text, str(path), "exec"), space)
            count += 1
    return count


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    expected = path.read_text(encoding="utf-8").count("```python")
    assert run_page(path) == expected


CLAIM = "assert Path('a.txt').read_text() == 'goodbye'"


def test_a_block_that_fails_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```text a.txt\nhello\n```\n\n```python\nfrom pathlib import Path\n" + CLAIM + "\n```\n")
    with pytest.raises(AssertionError):
        run_page(page)


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_recipes_load_and_survive_saving(path: Path) -> None:
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.language == "yaml":
            recipe = Recipe.from_yaml(block.text)
            assert Recipe.from_yaml(recipe.to_yaml()) == recipe, f"{path.name}:{block.line}"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_somewhere(path: Path) -> None:
    for found in LINK.finditer(path.read_text(encoding="utf-8")):
        target = found["target"]
        if target and not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{page_id(path)} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_named_tests_and_commands_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name, test in re.findall(r"`((?:tests|benchmarks|examples|docs)/[\w/]+\.(?:py|yaml|md))(?:::(\w+))?`", text):
        assert (ROOT / name).exists(), f"{page_id(path)} names {name}"
        assert not test or f"def {test}(" in (ROOT / name).read_text(encoding="utf-8"), f"{name} has no {test}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([\w-]+)", text):
        assert re.search(rf"^(?:[\w-]+ )*{target}(?: [\w-]+)*:", makefile, re.MULTILINE), f"no `make {target}`"


def test_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.PAGE.read_text(encoding="utf-8") == generate.reference(), "run `make docs`"
