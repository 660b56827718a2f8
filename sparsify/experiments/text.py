"""Texts, tagged words and questions, read from files of rows.

A path is a file, or a folder whose files say in their names which part of the data they are (train, val, valid,
validation, dev; test is measured with where there is no other); files that say nothing are one whole, of which a seeded
part is kept back. Every column that a use case needs is found by the names that public data sets have, or named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsify.errors import DataError
from sparsify.experiments.classes import Classes, RowLabel
from sparsify.experiments.columns import Columns, class_in, class_of, string_of, unicode_text, value_of
from sparsify.experiments.rows import Row, shortened
from sparsify.experiments.samples import Answer, AskedQuestion, DataSet, LabelledText, S, TaggedWords
from sparsify.experiments.splits import USUAL_SPLIT, Found, SeededSplit, completed
from sparsify.experiments.text_parts import NAMES_FILE, Parts, parts_of

__all__: list[str] = []

PAIRS = [
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text1", "text2"),
    ("text", "text_pair"),
]
TEXTS = ("text", "sentence", "content", "review", "comment", "tweet", "document", "message")
CLASSES = ("label", "labels", "class", "category", "target", "sentiment")
WORDS = ("tokens", "words")
TAGS = ("tags", "labels", "label")


def read_texts(
    path: str | Path, columns: Mapping[str, str] | None = None, split: SeededSplit = USUAL_SPLIT
) -> DataSet[LabelledText]:
    """Texts or pairs of texts, each with a class.

    Args:
        path: file, or folder of files.
        columns: column by role ("text", "second", "label"), where their names do not say it.
        split: how a part to measure with is taken where the files name none.

    Raises:
        DataError: with file and line: something is wrong, or the labels are no classes to tell apart.
    """
    parts = parts_of(path)
    there = Columns(parts.train, columns, ("text", "second", "label"))
    first, second = there.said.get("text"), there.said.get("second")
    if first is None and second is None:
        first, second = next((pair for pair in PAIRS if set(pair) <= set(there.there)), (None, None))
    first = first or there.need("text", [*TEXTS, "sentence1"])
    label = there.need("label", CLASSES)
    labels = [(row, class_of(row, label)) for row in parts.train]
    classes = Classes(labels, parts.names_of(label))
    if len({value for _, value in labels}) < 2:
        raise DataError(
            f"{parts.train[0].file}: all {len(labels)} samples have the label {labels[0][1]!r}, expected two "
            "classes or more to tell apart."
        )

    def sample(row: Row, number: int) -> LabelledText:
        other = string_of(row, second) if second else None
        return LabelledText(row.file, row.line, string_of(row, first), other, number)

    train = [sample(row, classes.numbers[value]) for row, value in labels]
    val = _measured(parts, lambda row, name: sample(row, classes.number(row, class_of(row, label), name)))
    notes = parts.notes + there.unused([first, second, label])
    found = Found(train, val, classes.names, parts.fingerprint, parts.files, notes)
    return completed(found, split, lambda one: f"{one.text}\0{one.second or ''}", lambda one: one.label)


def _measured(parts: Parts, sample: Callable[[Row, str], S]) -> tuple[list[S], str] | None:
    if parts.val is None:
        return None
    rows, name = parts.val
    return [sample(row, name) for row in rows], name


def read_tags(
    path: str | Path, entities: bool, columns: Mapping[str, str] | None = None, split: SeededSplit = USUAL_SPLIT
) -> DataSet[TaggedWords]:
    """Sentences, word by word, with a tag for each word.

    Args:
        path: file, or folder of files.
        entities: the tags are entities: O, and B- or I- before a kind. The column ner_tags is then looked for first.
        columns: column by role ("words", "tags"), where their names do not say it.
        split: how a part to measure with is taken where the files name none.

    Raises:
        DataError: with file and line: something is wrong with a sample, or the tags are none to tell apart.
    """
    parts = parts_of(path)
    there = Columns(parts.train, columns, ("words", "tags"))
    words = there.need("words", WORDS)
    tags = there.said.get("tags") or _tag_column(there, entities)
    labels = [(row, tag) for row in parts.train for tag in _words_and_tags(row, words, tags)[1]]
    classes = Classes(labels, parts.names_of(tags), "tag")
    if entities:
        _entity_names(labels, classes)
    if len({tag for _, tag in labels}) < 2:
        raise DataError(
            f"{parts.train[0].file}: every word has the tag {classes.names[0]!r}, expected two tags or more."
        )

    def sample(row: Row, name: str) -> TaggedWords:
        said, numbers = _words_and_tags(row, words, tags)
        return TaggedWords(row.file, row.line, tuple(said), tuple(classes.number(row, tag, name) for tag in numbers))

    train = [sample(row, "train") for row in parts.train]
    val = _measured(parts, sample)
    notes = parts.notes + there.unused([words, tags])
    found = Found(train, val, classes.names, parts.fingerprint, parts.files, notes)
    return completed(found, split, lambda one: "\0".join(one.words))


def _tag_column(there: Columns, entities: bool) -> str:
    if entities and "ner_tags" in there.there:
        return "ner_tags"
    column = there.find("tags", TAGS)
    others = [name for name in there.there if name.endswith("_tags") or name in ("upos", "xpos")]
    if column is None and len(others) == 1:
        return others[0]
    if column is None and others:
        raise there.missing(
            f"one column of tags, or --columns tags={others[0]} to choose one of {', '.join(others)}", []
        )
    return column or there.need("tags", [*TAGS, "ner_tags"])


def _list_of(row: Row, column: str) -> list[Any]:
    value = value_of(row, column)
    if isinstance(value, str):  # a field of a csv file: a list as JSON, or words with blanks between them
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError as error:
                wanted = 'expected a list as JSON: ["a", "b"], or words with blanks between them'
                raise DataError(f"{row.where}: {column!r} is {shortened(value)}, {wanted}.") from error
        else:
            value = value.split()
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.where}: {column!r} is {shortened(value)}, expected a list with at least one word.")
    return value


def _words_and_tags(row: Row, words: str, column: str) -> tuple[list[str], list[str | int]]:
    said = _list_of(row, words)
    for number, word in enumerate(said, 1):
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{row.where}: word {number} of {words!r} is {shortened(word)}, expected a text.")
        unicode_text(row, words, word)
    tags = [class_in(row, column, tag) for tag in _list_of(row, column)]
    if len(tags) != len(said):
        raise DataError(f"{row.where}: {len(tags)} tags in {column!r}, expected {len(said)}: one for each word.")
    return said, tags


def _entity_names(labels: Sequence[RowLabel], classes: Classes) -> None:
    form = re.compile(r"O|[BIESLU]-.+")
    wanted = "expected O, or B- or I- before a kind of entity: B-PER"
    for name in classes.names:
        if not form.fullmatch(name):
            row = next((row for row, tag in labels if classes.names[classes.numbers[tag]] == name), labels[0][0])
            way = f"; put the names of the numbers into {NAMES_FILE}" if name.lstrip("-").isdigit() else ""
            raise DataError(f"{row.where}: the tag {name!r}, {wanted}{way}.")
    if all(name == "O" for name in classes.names):
        raise DataError(f"{labels[0][0].file}: every word has the tag 'O', {wanted}.")


def read_questions(
    path: str | Path, columns: Mapping[str, str] | None = None, split: SeededSplit = USUAL_SPLIT
) -> DataSet[AskedQuestion]:
    """Questions about contexts, with the answers that count as right.

    Args:
        path: file, or folder of files: SQuAD's own form, rows with `answers` {"text": [...], "answer_start": [...]}, or
            rows with an `answer` and the `answer_start` of it.
        columns: column by role ("question", "context", "answers", "start", "id"), where their names do not say it.
        split: how a part to measure with is taken where the files name none; questions about one context stay together.

    Raises:
        DataError: with file and line: something is wrong with a sample, such as an answer that is not in its context.
    """
    parts = parts_of(path)
    there = Columns(parts.train, columns, ("question", "context", "answers", "start", "id"))
    question = there.need("question", ["question"])
    context = there.need("context", ["context", "passage", "paragraph"])
    answers = there.need("answers", ["answers", "answer", "answer_text"])
    start = there.find("start", ["answer_start", "start"])
    key = there.find("id", ["id", "qid", "key"])
    keys: dict[str, Row] = {}
    guessed = 0

    def sample(row: Row, number: int) -> AskedQuestion:
        nonlocal guessed
        name = str(value_of(row, key)) if key else f"{row.file.name}:{number}"
        if name in keys:
            raise DataError(
                f"{row.where}: the id {name!r} stands at {keys[name].where} already, expected one of its own."
            )
        keys[name] = row
        text = string_of(row, context)
        right = []
        for answer, place in _answers_of(row, answers, start):
            if place is None:
                guessed += text.count(answer) > 1
                place = text.find(answer)
            right.append(_placed(row, text, answer, place))
        if right and row.values.get("is_impossible") is True:
            raise DataError(f"{row.where}: is_impossible, but there is the answer {right[0].text!r}, expected none.")
        return AskedQuestion(row.file, row.line, name, string_of(row, question), text, tuple(right))

    train = [sample(row, number) for number, row in enumerate(parts.train)]
    val = None
    if parts.val is not None:
        keys.clear()
        val = ([sample(row, number) for number, row in enumerate(parts.val[0])], parts.val[1])
    if not any(one.answers for one in train):
        raise DataError(f"{parts.train[0].file}: no question has an answer, expected some to learn from.")
    notes = parts.notes + there.unused([question, context, answers, start, key])
    if guessed:
        notes += (
            f"{guessed} answers have no answer_start and stand several times in their context: the first is taken.",
        )
    found = Found(train, val, (), parts.fingerprint, parts.files, notes)
    return completed(found, split, lambda one: one.context)


def _answers_of(row: Row, column: str, start: str | None) -> list[tuple[str, int | None]]:
    wanted = 'expected {"text": [...], "answer_start": [...]} or a list of {"text": ..., "answer_start": ...}'
    value = value_of(row, column)
    if isinstance(value, str):
        if value.lstrip()[:1] in ("{", "[") and start is None:  # SQuAD's form in a field of a csv file
            try:
                value = json.loads(value)
            except ValueError as error:
                raise DataError(f"{row.where}: {column!r} is {shortened(value)}, {wanted} as JSON.") from error
        elif not value:
            return []
        else:
            return [(value, None if start is None else _start_of(row, value_of(row, start)))]
    if isinstance(value, dict):
        texts, places = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(places, list) or len(texts) != len(places):
            raise DataError(f"{row.where}: {column!r} is {shortened(value)}, {wanted}, as many of both.")
        value = [{"text": text, "answer_start": place} for text, place in zip(texts, places, strict=True)]
    if not isinstance(value, list):
        raise DataError(f"{row.where}: {column!r} is {shortened(value)}, {wanted}.")
    found: list[tuple[str, int | None]] = []
    for one in value:
        if not isinstance(one, dict) or not isinstance(one.get("text"), str) or not one["text"]:
            raise DataError(f"{row.where}: an answer in {column!r} is {shortened(one)}, {wanted}.")
        found.append((one["text"], _start_of(row, one["answer_start"]) if "answer_start" in one else None))
    return found


def _start_of(row: Row, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{row.where}: an answer starts at {shortened(value)}, expected a whole number from 0.")
    return value


def _placed(row: Row, context: str, answer: str, place: int) -> Answer:
    if place < 0 or context[place : place + len(answer)] != answer:
        there = context[place : place + len(answer)] if place >= 0 else ""
        first = context.find(answer)
        elsewhere = f"it begins at {first}" if first >= 0 else "it is no part of the context"
        raise DataError(
            f"{row.where}: the answer {shortened(answer)} is not at {place} of the context but {shortened(there)}; "
            f"expected a part of the context; {elsewhere}."
        )
    return Answer(answer, place)
