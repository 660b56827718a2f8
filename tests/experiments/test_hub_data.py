"""Data sets of the hub by name: from a copy in the hub's cache, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsify.errors import DataError, DataFileError
from sparsify.experiments.hub_data import data_at, names_in_card
from sparsify.experiments.images import read_image_folder
from sparsify.experiments.text import read_questions, read_tags, read_texts
from tests.data_folders import class_folders, lines, written

hub = pytest.importorskip("huggingface_hub")

CARD = """---
license: other
dataset_info:
  features:
  - name: sentence
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': negative
          '1': positive
  - name: ner_tags
    sequence:
      class_label:
        names: {'0': O, '1': B-PER}
---
# Reviews
"""
ROWS = lines({"idx": n, "sentence": f"s {n}", "label": n % 2} for n in range(20))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a network that nothing may ask."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def copy(cache: Path, name: str, files: dict[str, str | bytes | None], revision: str = "abc") -> Path:
    """A copy as the hub's client lays it: files are links into blobs/."""
    root = cache / f"datasets--{name.replace('/', '--')}"
    blobs = written(root / "blobs", {str(number): content for number, content in enumerate(files.values())})
    for number, file in enumerate(files):
        path = root / "snapshots" / revision / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(blobs / str(number))
    written(root / "refs", {"main": revision})
    return root / "snapshots" / revision


@pytest.mark.parametrize("name", ["sst2", "stanfordnlp/sst2"])
def test_texts_of_the_hub_have_the_names_of_their_card(cache: Path, name: str) -> None:
    copy(cache, "stanfordnlp/sst2", {"README.md": CARD, "data/train.jsonl": ROWS, "data/validation.jsonl": ROWS})
    data = read_texts(data_at(name))
    assert data.labels == ("negative", "positive") and len(data.train) == len(data.val) == 20
    assert data.train[1].text == "s 1" and data.train[1].label == 1


def test_images_of_the_hub_are_class_folders(cache: Path) -> None:
    copy(cache, "frgfm/imagenette", class_folders("train/") | class_folders("validation/", first=9))
    assert read_image_folder(data_at("imagenette", offline=True)).labels == ("cat", "dog")


def test_tags_of_the_hub_have_the_names_of_their_card(cache: Path) -> None:
    rows = lines({"tokens": [f"N{n}", "is"], "ner_tags": [1, 0]} for n in range(20))
    copy(cache, "someone/names", {"README.md": CARD, "train.jsonl": rows})
    assert read_tags(data_at("someone/names"), entities=True).labels == ("O", "B-PER")


def test_a_path_that_is_there_comes_before_the_hub(cache: Path) -> None:
    copy(cache, "sst2", {"train.jsonl": ROWS})
    assert data_at("sst2").name == "abc"
    written(Path("sst2"), {"d.jsonl": ROWS})
    assert data_at("sst2") == Path("sst2")
    assert data_at("./sst3") == Path("./sst3"), "a path that is none: the reader says so"
    assert data_at("sst2.csv") == Path("sst2.csv")


def test_the_revision_is_the_one_of_main(cache: Path) -> None:
    copy(cache, "a/b", {"train.jsonl": ROWS}, "old")
    copy(cache, "a/b", {"train.jsonl": ROWS}, "new")
    assert data_at("a/b").name == "new"


def test_a_name_that_is_nowhere_is_an_error_of_one_line(cache: Path) -> None:
    written(Path("reviews"), {"d.jsonl": ROWS})
    with pytest.raises(DataFileError, match=r"review: there is no such file .*Did you mean 'reviews'") as caught:
        data_at("review", offline=True)
    assert "nothing is fetched" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataFileError, match=r"no/such: there is no such .*fetching it failed: no network here"):
        data_at("no/such")


@pytest.mark.parametrize("card", ["no head", "---\na: [\n---\n", "---\nx: 1\n---\n", "---\ndataset_info: 5\n---\n"])
def test_a_card_that_says_nothing_names_nothing(tmp_path: Path, card: str) -> None:
    assert names_in_card(written(tmp_path, {"README.md": card})) == {}


def test_parquet_is_read_where_pyarrow_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = written(tmp_path / "a", {"train.parquet": b"PAR1"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "pyarrow", None)
        with pytest.raises(DataError, match=r"train.parquet: reading it needs pyarrow"):
            read_texts(root)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    with pytest.raises(DataError, match=r"train.parquet: no parquet file"):
        read_texts(root)
    questions = [
        {"question": "?", "context": f"it is {n}", "answers": {"text": [str(n)], "answer_start": [6]}}
        for n in range(20)
    ]
    written(tmp_path / "b", {})
    parquet.write_table(arrow.Table.from_pylist(questions), tmp_path / "b" / "train-00000-of-00001.parquet")
    data = read_questions(tmp_path / "b")
    assert len(data.train) == 18 and data.train[0].answers[0].start == 6
