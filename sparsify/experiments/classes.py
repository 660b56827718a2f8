"""Classes of a data set: from labels as they stand in files to numbers."""

from __future__ import annotations

from collections.abc import Sequence

from sparsify.errors import DataError, did_you_mean
from sparsify.experiments.rows import Row
from sparsify.experiments.text_parts import NAMES_FILE

__all__: list[str] = []

RowLabel = tuple[Row, str | int]
"""A row and its label as it stands in the file: a word or a whole number."""


class Classes:
    """Names of the classes, and the number of each label.

    Words are in lexicographic order, numbers in that of numbers. Numbers count in `names`, from 0, where there are
    some.

    Args:
        labels: every label of the training data with its row, at least one.
        names: lines of labels.txt, or names in the card of the data set; None where there are none.
        role: of the labels in a message.
    """

    def __init__(self, labels: Sequence[RowLabel], names: Sequence[str] | None, role: str = "label") -> None:
        self.role = role
        kinds = {type(label) for _, label in labels}
        if len(kinds) > 1:
            first = type(labels[0][1])
            row, other = next((row, label) for row, label in labels if type(label) is not first)
            raise DataError(
                f"{row.where}: the {role} {other!r} is a {'word' if first is int else 'number'}, expected a "
                f"{'number' if first is int else 'word'} as in {labels[0][0].where}."
            )
        found = sorted({label for _, label in labels}, key=lambda label: label)
        self.numbers: dict[str | int, int]
        if names is not None and len(set(names)) != len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise DataError(
                f"{labels[0][0].file.parent / NAMES_FILE}: the name {twice!r} stands twice, expected it once."
            )
        if names is None:
            self.names = tuple(map(str, found))
            self.numbers = {label: number for number, label in enumerate(found)}
            self._alike(labels)
        else:
            self.names = tuple(names)
            self.numbers = {name: number for number, name in enumerate(names)}
            self.numbers.update({number: number for number in range(len(names))})
            for row, label in labels:
                if label not in self.numbers:
                    raise DataError(
                        f"{row.where}: the {role} {label!r} is none of the {len(names)} of {NAMES_FILE} (or of the "
                        f"card), expected 0 to {len(names) - 1} or a name.{did_you_mean(str(label), names)}"
                    )

    def _alike(self, labels: Sequence[RowLabel]) -> None:
        folded: dict[str, str | int] = {}
        for row, label in labels:
            if folded.setdefault(str(label).casefold(), label) != label:
                other = folded[str(label).casefold()]
                raise DataError(
                    f"{row.where}: the {self.role} {label!r} differs from {other!r} by its case alone, expected one "
                    "spelling for one class."
                )

    def number(self, row: Row, label: str | int, source: str) -> int:
        """The number of a label of the data to measure with; one that training never saw is an error."""
        if label not in self.numbers:
            raise DataError(
                f"{row.where}: the {self.role} {label!r} of {source} is not in the training data, expected one of "
                f"{', '.join(self.names[:10])}{' ...' if len(self.names) > 10 else ''}."
                f"{did_you_mean(str(label), self.names)}"
            )
        return self.numbers[label]
