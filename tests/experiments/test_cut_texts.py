"""Texts that are longer than the model reads: cut, counted, and an error where that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparsify.errors import DataError
from sparsify.experiments.batches import TextBatches
from sparsify.experiments.samples import Answer, AskedQuestion, LabelledText, TaggedWords

FILE = Path("d.csv")


@pytest.fixture(scope="module")
def batches() -> Any:
    """Batches of 8 tokens, a letter each, with [CLS] and [SEP]."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {word: number for number, word in enumerate(["[PAD]", "[CLS]", "[SEP]", *"abcdefgh"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")
    return TextBatches(tokenizer, 8, ["input_ids"])


def asked(question: str, context: str) -> AskedQuestion:
    return AskedQuestion(FILE, 3, "k", question, context, ())


@pytest.mark.parametrize(
    ("sample", "cut"),
    [
        (LabelledText(FILE, 1, "a b c d e f", None, 0), False),
        (LabelledText(FILE, 1, "a b c d e f g", None, 0), True),
        (LabelledText(FILE, 1, "a b c", "d e", 0), False),
        (LabelledText(FILE, 1, "a b c", "d e f", 0), True),
        (TaggedWords(FILE, 1, tuple("abcdef"), (0,) * 6), False),
        (TaggedWords(FILE, 1, tuple("abcdefg"), (0,) * 7), True),
        (asked("a b", "c d e"), False),
        (asked("a b", "c d e f"), True),
    ],
)
def test_a_text_is_cut_if_it_has_more_tokens_than_fit(batches: TextBatches, sample: Any, cut: bool) -> None:
    assert batches.is_cut(sample) is cut
    assert batches([sample]).inputs["input_ids"].shape == (1, 8)


def test_a_question_that_is_too_long_by_itself_is_an_error_with_its_place(batches: TextBatches) -> None:
    with pytest.raises(DataError, match=r"d\.csv:3: cannot be cut to 8 tokens"):
        batches.is_cut(asked("a b c d e f g h", "c d"))


@pytest.mark.parametrize(
    ("context", "answer", "start", "lost"),
    [
        ("c d e", "e", 4, False),
        ("c d e f g", "e", 4, False),
        ("c d e f g", "e f", 4, True),
        ("c d e f g", "g", 8, True),
        ("c d e f g", "", 0, False),
    ],
)
def test_an_answer_is_lost_where_the_context_is_cut_off(
    batches: TextBatches, context: str, answer: str, start: int, lost: bool
) -> None:
    answers = (Answer(answer, start),) if answer else ()
    sample = AskedQuestion(FILE, 3, "k", "a b", context, answers)
    assert batches.loses_answer(sample) is lost
    assert not batches.loses_answer(LabelledText(FILE, 1, "a b c d e f g", None, 0))
