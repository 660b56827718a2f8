"""Files of texts, tags and questions: what is read, and what every wrong one says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from sparsify.errors import ArgumentError, DataError, DataFileError
from sparsify.experiments.samples import Answer, LabelledText, TaggedWords
from sparsify.experiments.text import read_questions, read_tags, read_texts
from tests.data_folders import lines, written

GOOD = "text,label\n" + "".join(f'"the text, {n}",{"ba"[n % 2]}\n' for n in range(20))
ROWS = [{"text": f"text {n}", "label": n % 3} for n in range(30)]
TAGS = [{"tokens": [f"Firm{n}", "is"], "ner_tags": ["B-ORG", "O"]} for n in range(20)]
QUESTIONS = [
    {
        "id": f"q{n}",
        "question": "which?",
        "context": f"it is {n} here",
        "answers": {"text": [str(n)], "answer_start": [6]},
    }
    for n in range(20)
]
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": f"it is {n} here",
                    "qas": [{"id": f"q{n}", "question": "?", "answers": [{"text": f"{n}", "answer_start": 6}]}],
                }
            ],
        }
        for n in range(20)
    ],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.csv", GOOD),
        ("d.csv", GOOD.replace("\n", "\r\n")),
        ("d.csv", GOOD.replace("\n", "\r")),
        ("d.csv", b"\xef\xbb\xbf" + GOOD.encode()),
        ("d.csv", GOOD.replace("\n", "\n\n")),
        ("d.csv", GOOD.replace("text,label", "sentence,sentiment")),
        ("d.tsv", GOOD.replace('",', '"\t').replace("text,label", "text\tlabel")),
        ("d.jsonl", lines({"text": f"the text, {n}", "label": "ba"[n % 2]} for n in range(20))),
        ("d.json", lines({"text": f"the text, {n}", "label": "ba"[n % 2]} for n in range(20))),
        ("d.json", json.dumps([{"text": f"the text, {n}", "label": "ba"[n % 2]} for n in range(20)], indent=1)),
        ("d.json", json.dumps({"data": [{"text": f"the text, {n}", "label": "ba"[n % 2]} for n in range(20)]})),
    ],
)
def test_every_format_gives_the_same_samples(tmp_path: Path, name: str, content: str | bytes) -> None:
    for path in (written(tmp_path / "a", {name: content}), tmp_path / "a" / name):
        data = read_texts(path)
        assert data.labels == ("a", "b")
        found = sorted(((one.text, one.label) for one in [*data.train, *data.val]), key=lambda one: int(one[0][10:]))
        assert found == [(f"the text, {n}", 1 - n % 2) for n in range(20)]
        assert {one.label for one in data.train} == {one.label for one in data.val} == {0, 1}
        assert data.split == "seeded: 2 of 20 samples, fraction 0.1, seed 0" and not data.notes


def test_a_sample_knows_the_line_on_which_it_begins(tmp_path: Path) -> None:
    text = 'text,label\n"two\nlines",a\nx,b\n\ny,a\nz,b\n'
    file = written(tmp_path, {"train.csv": text, "val.csv": text}) / "train.csv"
    data = read_texts(tmp_path)
    assert [(one.text, one.line) for one in data.train] == [("two\nlines", 2), ("x", 4), ("y", 6), ("z", 7)]
    assert data.train[0] == LabelledText(file, 2, "two\nlines", None, 0) and data.train[0].where == f"{file}:2"


def test_a_long_field_is_read_and_the_limit_of_csv_left_as_it_was(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    long = "x" * 200_000
    data = read_texts(written(tmp_path, {"d.csv": f"{GOOD}{long},a\n"}))
    assert any(one.text == long for one in [*data.train, *data.val]) and csv.field_size_limit() == before


def test_numbers_are_ordered_as_numbers_and_names_come_from_labels_txt(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": n % 12} for n in range(24)]
    assert read_texts(written(tmp_path / "a", {"d.jsonl": lines(rows)})).labels == tuple(map(str, range(12)))
    # A csv file of pandas has 1.0 for 1 where a label was missing once.
    codes = "text,label\n" + "".join(f"t{n},00{n % 2}\n" for n in range(9))
    assert read_texts(written(tmp_path / "d", {"d.csv": codes})).labels == ("000", "001")
    floats = "text,label\n" + "".join(f"t{n},{n % 2}.0\n" for n in range(9))
    assert read_texts(written(tmp_path / "b", {"d.csv": floats})).labels == ("0", "1")
    named = read_texts(written(tmp_path / "c", {"d.jsonl": lines(ROWS), "labels.txt": "neg\nneutral\npos\n"}))
    assert named.labels == ("neg", "neutral", "pos") and named.train[0].label == int(named.train[0].text[5:]) % 3


@pytest.mark.parametrize("names", [("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "passage")])
def test_a_pair_of_texts_is_found_by_the_names_of_public_sets(tmp_path: Path, names: tuple[str, str]) -> None:
    rows = [{names[0]: f"a{n}", names[1]: f"b{n}", "label": n % 2, "idx": n} for n in range(20)]
    data = read_texts(written(tmp_path, {"d.jsonl": lines(rows)}))
    assert all(one.second == one.text.replace("a", "b") for one in data.train)
    assert data.notes == ("columns that are not used: idx.",)


def test_a_column_can_be_named(tmp_path: Path) -> None:
    root = written(tmp_path, {"d.csv": GOOD.replace("text,label", "body,stars")})
    with pytest.raises(DataError, match="the columns are 'body', 'stars', expected a column for the text"):
        read_texts(root)
    assert len(read_texts(root, {"text": "body", "label": "stars"}).train) == 18
    with pytest.raises(ArgumentError, match=r"'txt' is none of 'text', 'second', 'label'. Did you mean 'text'"):
        read_texts(root, {"txt": "body"})
    with pytest.raises(DataError, match=r"expected the column 'bodi'. Did you mean 'body'"):
        read_texts(root, {"text": "bodi", "label": "stars"})


@pytest.mark.parametrize(
    ("files", "split", "note"),
    [
        ({"train.csv": GOOD, "validation.csv": GOOD}, "given: validation.csv", "20 of the 20 samples"),
        ({"train.csv": GOOD, "dev.csv": GOOD, "test.csv": "broken"}, "given: dev.csv", "not used: test.csv"),
        ({"train.csv": GOOD, "test.csv": GOOD}, "given: test.csv", "the test data are measured with"),
        ({"data/train.csv": GOOD, "data/valid.csv": GOOD, "README.md": "x"}, "given: valid.csv", "20 of the 20"),
        ({"train/0.csv": GOOD, "train/1.csv": GOOD, "val/0.csv": GOOD}, "given: 0.csv", "20 of the 20"),
        ({"sst2_train-00000-of-00002.csv": GOOD, "sst2_train-00001-of-00002.csv": GOOD}, "seeded", None),
        ({"part-0.csv": GOOD, "part-1.csv": GOOD}, "seeded", None),
    ],
)
def test_names_of_files_say_which_part_they_are(
    tmp_path: Path, files: dict[str, str], split: str, note: str | None
) -> None:
    data = read_texts(written(tmp_path, files))
    assert data.split.startswith(split)
    assert note in " ".join(data.notes) if note else not data.notes


TEXT_FAULTS = [
    ({"d.csv": GOOD.encode() + b"caf\xe9,a\n"}, "d.csv:22: byte 0xe9 is not UTF-8, expected UTF-8"),
    ({"d.csv": GOOD.encode("utf-16")}, "d.csv:1: the file is UTF-16, expected UTF-8"),
    ({"d.csv": GOOD + "x\0y,a\n"}, "d.csv:22: a zero byte"),
    ({"d.csv": ""}, "d.csv: the file is empty"),
    ({"d.csv": "\n \n"}, "d.csv: the file is empty"),
    ({"d.csv": "text,label\n"}, "d.csv: the file has no sample"),
    ({"d.csv": GOOD.replace("text,label", ",label")}, "d.csv:1: column 1 of 2 has no name"),
    ({"d.csv": GOOD.replace("text,label", "text, label")}, "d.csv:1: column ' label' has a blank"),
    ({"d.csv": "text,text,label\na,b,c\n"}, "d.csv:1: two columns are called 'text'"),
    ({"d.csv": GOOD.replace(",", ";")}, "d.csv:1: one column, 'text;label', expected columns with a comma"),
    (
        {"d.csv": "text,lable\na,b\n"},
        "d.csv:1: the columns are 'text', 'lable', expected a column for the label.*",
    ),
    ({"d.csv": GOOD + "x,y,a\n"}, "d.csv:22: 3 fields, expected 2: text, label"),
    ({"d.csv": GOOD + "x\n"}, "d.csv:22: 1 field, expected 2"),
    ({"d.csv": GOOD + '"x,a\n'}, "d.csv:22: unexpected end of data; expected fields in matching double quotes"),
    ({"d.csv": GOOD + '"x" y,a\n'}, "d.csv:22: .* expected fields in matching double quotes"),
    ({"d.csv": GOOD + "x,\n"}, "d.csv:22: the label in 'label' is missing"),
    ({"d.csv": GOOD + ",a\n"}, "d.csv:22: 'text' is empty"),
    ({"d.csv": GOOD + "x,A\n"}, "d.csv:22: the label 'A' differs from 'a' by its case"),
    ({"d.csv": GOOD + "x, a\n"}, "d.csv:22: the label ' a' has a blank"),
    ({"d.csv": GOOD + "x,3\n"}, "d.csv:22: the label 3 is a number, expected a word as in .*d.csv:2"),
    ({"d.csv": GOOD + "x,3.5\n"}, "d.csv:22: the label in 'label' is 3.5, expected a class: a word"),
    ({"d.csv": "text,label\na,x\nb,x\n"}, "d.csv: all 2 samples have the label 'x', expected two classes"),
    ({"d.csv": "text,label\na,x\nb,y\nc,z\n"}, "d.csv: 3 samples, 3 different, are too few to keep some back"),
    ({"train.csv": GOOD, "val.csv": "text,label\nx,c\n"}, "val.csv:2: the label 'c' of val.csv is not in the training"),
    ({"a.csv": GOOD, "a.jsonl": lines(ROWS)}, "a.csv, a.jsonl are one part of the data in several formats"),
    ({"val.csv": GOOD}, "val.csv but no file called train"),
    ({"valid.csv": GOOD, "other.csv": GOOD}, "valid.csv but no file called train, .*other.csv"),
    ({}, "no file of texts in the folder, expected .csv, .*; it has nothing"),
    ({"train.xlsx": "x"}, "no file of texts in the folder.*it has train.xlsx"),
    ({"d.jsonl": lines(ROWS) + '{"text": "a", "label": }\n'}, "d.jsonl:31: no JSON at column 24"),
    ({"d.json": '{"text": "a", "label": }\n' + lines(ROWS)}, "d.json:1: no JSON at column 24"),
    ({"d.json": lines(ROWS) + "{\n"}, "d.json:31: no JSON at column"),
    ({"d.json": json.dumps(ROWS, indent=1)[:-20]}, "d.json:119: no JSON"),
    ({"d.json": json.dumps(ROWS) + "]"}, "d.json:1: more behind the array"),
    ({"d.json": '[{"text": "a", "label": 1} {"text"'}, "d.json:1: '{' behind an object"),
    ({"d.json": "[1, 2]"}, "d.json:1: 1, expected an object"),
    ({"d.jsonl": lines(ROWS) + "[1]\n"}, r"d.jsonl:31: \[1\], expected an object"),
    ({"d.jsonl": '{"text": "a", "text": "b", "label": 1}\n'}, "d.jsonl:1: the name 'text' stands twice"),
    ({"d.jsonl": "[" * 100_000}, "d.jsonl:1: .*expected one JSON object"),
    ({"d.jsonl": lines([*ROWS, {"text": "x", "label": None}])}, "d.jsonl:31: the label in 'label' is missing"),
    ({"d.jsonl": lines([*ROWS, {"text": 5, "label": 1}])}, "d.jsonl:31: 'text' is 5, expected a text"),
    ({"d.jsonl": lines([*ROWS, {"text": "x", "lable": 1}])}, "d.jsonl:31: no 'label', .*Did you mean 'lable'"),
    ({"d.jsonl": lines([*ROWS, {"text": "x", "label": 1.5}])}, "d.jsonl:31: the label in 'label' is 1.5"),
    ({"d.jsonl": lines([*ROWS, {"text": "x", "label": [1]}])}, r"d.jsonl:31: the label in 'label' is \[1\]"),
    ({"d.jsonl": lines(ROWS) + '{"text": "a \\ud800", "label": 1}\n'}, "d.jsonl:31: 'text' has the half character"),
    ({"d.jsonl": lines(ROWS) + '{"text": "a", "label": NaN}\n'}, "d.jsonl:31: the label in 'label' is NaN"),
    ({"d.jsonl": lines(ROWS), "labels.txt": "a\nb\n"}, "d.jsonl:3: the label 2 is none of the 2 of labels.txt"),
    ({"d.jsonl": lines(ROWS), "labels.txt": "a\na\nb\n"}, "labels.txt: the name 'a' stands twice"),
]


@pytest.mark.parametrize(("files", "message"), TEXT_FAULTS, ids=[message[:40] for _, message in TEXT_FAULTS])
def test_a_wrong_text_is_an_error_with_its_place(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    root = written(tmp_path, files)
    with pytest.raises(DataError, match=message) as caught:
        read_texts(root)
    assert "\n" not in str(caught.value)
    assert sorted(path.relative_to(root).as_posix() for path in root.rglob("*")) == sorted(files), "nothing is written"


def test_a_path_that_is_not_there_is_an_error_that_names_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path, {"reviews.csv": GOOD, "data.zip": b"PK"})
    with pytest.raises(DataFileError, match=r"review.csv: there is no such file or folder. Did you mean 'reviews.csv'"):
        read_texts(tmp_path / "review.csv")
    with pytest.raises(DataFileError, match="an archive"):
        read_texts(tmp_path / "data.zip")
    with pytest.raises(DataError, match=r"files of texts end in .csv"):
        read_texts(written(tmp_path, {"x.xlsx": b"PK"}) / "x.xlsx")


def test_the_fingerprint_is_of_names_and_contents_and_of_nothing_else(tmp_path: Path) -> None:
    one = read_texts(written(tmp_path / "one", {"d.csv": GOOD}))
    same = read_texts(written(tmp_path / "two", {"d.csv": GOOD}))
    assert one.fingerprint == same.fingerprint and len(one.fingerprint) == 64
    other_name = written(tmp_path / "three", {"e.csv": GOOD})
    other_word = written(tmp_path / "four", {"d.csv": GOOD.replace("text, 7", "text, 77")})
    assert len({one.fingerprint, read_texts(other_name).fingerprint, read_texts(other_word).fingerprint}) == 3


# Tags


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        ({"d.jsonl": lines(TAGS)}, ("B-ORG", "O")),
        ({"d.csv": "words,tags\n" + "".join(f"Firm{n} is,B-ORG O\n" for n in range(20))}, ("B-ORG", "O")),
        ({"d.txt": "".join(f"Firm{n} NNP B-ORG\nis VB O\n\n" for n in range(20))}, ("B-ORG", "O")),
        (
            {"d.conll": "-DOCSTART- O\r\n\r\n" + "".join(f"Firm{n}\tB-ORG\r\nis\tO\r\n\r\n" for n in range(20))},
            ("B-ORG", "O"),
        ),
        (
            {
                "d.jsonl": lines({"tokens": [f"Firm{n}", "is"], "ner_tags": [1, 0]} for n in range(20)),
                "labels.txt": "O\nB-ORG\n",
            },
            ("O", "B-ORG"),
        ),
    ],
)
def test_tagged_words_are_read_in_every_form(tmp_path: Path, files: dict[str, str], labels: tuple[str, ...]) -> None:
    data = read_tags(written(tmp_path, files), entities=True)
    assert data.labels == labels and len(data.train) == 18 and len(data.val) == 2
    for one in [*data.train, *data.val]:
        assert isinstance(one, TaggedWords) and one.words[1] == "is"
        assert [data.labels[tag] for tag in one.tags] == ["B-ORG", "O"]


TAG_FAULTS = [
    ([*TAGS, {"tokens": ["a"], "ner_tags": ["O", "O"]}], True, "d.jsonl:21: 2 tags in 'ner_tags', expected 1"),
    ([*TAGS, {"tokens": [], "ner_tags": []}], True, "d.jsonl:21: 'tokens' is .*expected a list"),
    ([*TAGS, {"tokens": ["a", ""], "ner_tags": ["O", "O"]}], True, "d.jsonl:21: word 2 of 'tokens' is"),
    ([*TAGS, {"tokens": ["a"], "ner_tags": [None]}], True, "d.jsonl:21: the label in 'ner_tags' is missing"),
    ([{"tokens": ["a", "b"], "ner_tags": [0, 1]}] * 3, True, "d.jsonl:1: the tag '0', expected O, or B- .*labels.txt"),
    ([{"tokens": ["a", "b"], "tags": ["PER", "O"]}] * 3, True, "d.jsonl:1: the tag 'PER', expected O, or B-"),
    ([{"tokens": ["a", "b"], "tags": ["O", "O"]}] * 3, True, "every word has the tag 'O'"),
    ([{"tokens": ["a", "b"], "tags": ["X", "X"]}] * 3, False, "every word has the tag 'X', expected two tags"),
    ([{"tokens": ["a"], "pos_tags": ["X"], "chunk_tags": ["Y"]}], False, "choose one of pos_tags, chunk_tags"),
    ([{"text": "a b", "label": "x"}], False, "the columns are 'text', 'label', expected a column for the words"),
]


@pytest.mark.parametrize(("rows", "entities", "message"), TAG_FAULTS)
def test_wrong_tags_are_an_error_with_their_place(
    tmp_path: Path, rows: list[dict[str, object]], entities: bool, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_tags(written(tmp_path, {"d.jsonl": lines(rows)}), entities)


def test_a_line_of_conll_with_a_field_too_few_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"d.txt:2: 2 fields, expected 3: a word, and its tag"):
        read_tags(written(tmp_path / "t", {"d.txt": "EU NNP B-ORG\nis VB\n"}), entities=True)
    with pytest.raises(DataError, match=r"d.conll:1: 1 field, expected 2"):
        read_tags(written(tmp_path / "c", {"d.conll": "EU\n"}), entities=True)


# Questions


@pytest.mark.parametrize(
    "files",
    [
        {"d.jsonl": lines(QUESTIONS)},
        {"train-v1.1.json": json.dumps(SQUAD)},
        {"train-v1.1.json": json.dumps(SQUAD, indent=2)},
        {"d.csv": "id,question,context,answer\n" + "".join(f"q{n},?,it is {n} here,{n}\n" for n in range(20))},
        {"d.csv": "question,context,answer,answer_start\n" + "".join(f"?,it is {n} here,{n},6\n" for n in range(20))},
    ],
)
def test_questions_are_read_in_every_form(tmp_path: Path, files: dict[str, str]) -> None:
    data = read_questions(written(tmp_path, files))
    assert (len(data.train), len(data.val), data.labels) == (18, 2, ())
    assert len({one.key for one in [*data.train, *data.val]}) == 20
    assert all(one.answers == (Answer(one.context.split()[2], 6),) for one in data.train)


def test_questions_of_squad_know_their_lines(tmp_path: Path) -> None:
    file = written(tmp_path, {"train.json": json.dumps(SQUAD, indent=2), "dev.json": json.dumps(SQUAD)}) / "train.json"
    text = file.read_text().splitlines()
    for one in read_questions(tmp_path).train:
        assert f'"{one.key}"' in text[one.line - 1]


def test_a_question_without_an_answer_is_one_and_an_answer_without_a_place_is_looked_for(tmp_path: Path) -> None:
    none = [{**one, "id": f"n{n}", "answers": {"text": [], "answer_start": []}} for n, one in enumerate(QUESTIONS)]
    data = read_questions(written(tmp_path / "a", {"d.jsonl": lines([*QUESTIONS, *none])}))
    assert sum(not one.answers for one in [*data.train, *data.val]) == 20
    rows = [{"question": "?", "context": f"is is {n}", "answers": [{"text": "is"}]} for n in range(5)]
    guessed = read_questions(written(tmp_path / "b", {"d.jsonl": lines(rows)}))
    assert guessed.train[0].answers == (Answer("is", 0),)
    assert guessed.notes[0].startswith("5 answers have no answer_start")


QUESTION_FAULTS = [
    ({"answers": {"text": ["here"], "answer_start": [5]}}, "is not at 5 of the context but .*it begins at 8"),
    ({"answers": {"text": ["there"], "answer_start": [5]}}, "it is no part of the context"),
    ({"answers": {"text": ["0"], "answer_start": [-1]}}, "an answer starts at -1"),
    ({"answers": {"text": ["0"], "answer_start": []}}, "as many of both"),
    ({"answers": {"text": [""], "answer_start": [0]}}, "an answer in 'answers' is"),
    ({"answers": 5}, "'answers' is 5, expected"),
    ({"id": "q1"}, "the id 'q1' stands at .*:2 already"),
    ({"context": ""}, "'context' is empty"),
    ({"question": None}, "'question' is null, expected a text"),
    ({"is_impossible": True}, "is_impossible, but there is the answer"),
]


@pytest.mark.parametrize(("change", "message"), QUESTION_FAULTS)
def test_a_wrong_question_is_an_error_with_its_place(tmp_path: Path, change: dict[str, object], message: str) -> None:
    rows = [*QUESTIONS, {**QUESTIONS[0], "id": "z", **change}]
    with pytest.raises(DataError, match=f"d.jsonl:21: .*{message}"):
        read_questions(written(tmp_path, {"d.jsonl": lines(rows)}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"data": [{"paragraphs": 5}]}, r"data\[0\]: 'paragraphs' is 5, expected a list"),
        ({"data": [{"paragraphs": [{"context": "a"}]}]}, r"data\[0\].paragraphs: 'qas' is null"),
    ],
)
def test_a_wrong_form_of_squad_is_an_error_with_its_place(tmp_path: Path, data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_questions(written(tmp_path, {"d.json": json.dumps(data)}))
