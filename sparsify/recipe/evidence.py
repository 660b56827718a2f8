"""Evidence: the measurements behind the numbers of a recipe, and the comments that cite them.

It is data, under "evidence" in the recipe's metadata; comments are written from it and never read. A number that was
changed by hand loses its citation, so that no comment says what is no longer true.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from sparsify.modifiers.base import Modifier

__all__: list[str] = []

KEY = "evidence"


class LayerEvidence(NamedTuple):
    """Why one parameter has its sparsity.

    Attributes:
        sparsity: what it was given, 0 to 1; of its channels where whole channels go.
        weights: its elements.
        loss: by how much the loss grows when this layer alone is pruned so; where the sources name something else than
            "loss", that, which only orders the layers.
        ms: milliseconds saved, by the performance profile; None without one.
    """

    sparsity: float
    weights: int
    loss: float | None
    ms: float | None


class Expected(BaseModel):
    """Figures of the model that the recipe is expected to give; None where nothing was known about it.

    Attributes:
        what: is removed: single weights, or whole channels.
        sparsity: the fraction of those that may go that goes.
        recovery: of the pruning profile, 1.0 at best.
        parameters: elements that are stored, and how many of them are not zero.
        macs: of a runtime that skips no zeros, and of one that does.
        size_bytes: of the parameters in the exported file, uncompressed.
        ms: of onnxruntime, which skips no zeros.
        ms_skipping: of a runtime that skips them, by the stated cost model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    what: Literal["weights", "channels"] = "weights"
    sparsity: float
    recovery: float | None = None
    parameters_before: int
    parameters: int
    nonzero: float
    macs_before: int | None = None
    macs: int | None = None
    nonzero_macs: float | None = None
    size_bytes_before: float
    size_bytes: float
    ms_before: float | None = None
    ms: float | None = None
    ms_skipping: float | None = None


class Evidence(BaseModel):
    """Everything that a recipe cites.

    Attributes:
        goal: what was asked, in words.
        asked: the same as data.
        sources: {"loss": ..., "time": ...}: where the figures come from; instead of "loss", the name of what stands for
            it where no loss was measured.
        layers: by the name of the parameter.
        dense: {layer: why it is left dense}.
        stages: {name: (first epoch, last epoch)}.
        because: {"GMPruningModifier.update_frequency=0.75": the rule behind the number}.
        notes: what could not be met or was not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    goal: str
    asked: dict[str, Any] = {}
    sources: dict[str, str] = {}
    layers: dict[str, LayerEvidence] = {}
    dense: dict[str, str] = {}
    expected: Expected
    stages: dict[str, tuple[float, float]] = {}
    because: dict[str, str] = {}
    notes: list[str] = []

    @classmethod
    def of(cls, metadata: object) -> Evidence | None:
        """The evidence in a recipe's metadata; None where there is none, or something else under that name."""
        if not isinstance(metadata, Mapping) or not isinstance(metadata.get(KEY), Mapping):
            return None
        try:
            return cls.model_validate(metadata[KEY])
        except ValidationError:
            # A user's own data under the same name.
            return None

    def metadata(self) -> dict[str, Any]:
        """As it stands in a recipe's metadata: plain values, equal to themselves after writing and reading."""
        return {KEY: self.model_dump(mode="json")}


# ---------------------------------------------------------------------- comments


def head(evidence: Evidence, modifiers: Sequence[Modifier]) -> str:
    """The block of comments that stands before everything: goal, sources, what is expected, the training summary."""
    lines = [evidence.goal, *(f"{name}: {text}" for name, text in evidence.sources.items())]
    lines += ["", "Expected", *_evidence_rows(_expected(evidence.expected))]
    if evidence.dense:
        lines += ["", "Left dense", *_evidence_rows(evidence.dense.items())]
    if evidence.notes:
        lines += ["", "Notes", *(f"  {note}" for note in evidence.notes)]
    if evidence.stages:
        lines += ["", "Training", *_evidence_rows(_summary(evidence, modifiers))]
    return "".join(f"# {_printable(line)}".rstrip() + "\n" for text in lines for line in text.splitlines() or [""])


def woven(text: str, modifiers: Sequence[Modifier], evidence: Evidence) -> str:
    """The text of one list of modifiers as the writer wrote it, with comments at the ends of lines."""
    lines: list[str] = []
    notes: dict[str, str] = {}
    number, parent = -1, ""
    for line in text.splitlines():
        if line.startswith("  - !"):
            number, parent = number + 1, ""
            notes = _citations(modifiers[number], evidence)
        elif field := re.fullmatch(r"    (\w+):(.*)", line):
            parent = field[1]
            line += _comment(notes, parent)
        elif nested := re.fullmatch(r"      (\w+):.*", line):
            line += _comment(notes, f"{parent}.{nested[1]}")
        elif item := re.fullmatch(r"      - ['\"]?([^'\"]+)['\"]?", line):
            line += _comment(notes, f"{parent}.{item[1]}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _comment(notes: Mapping[str, str], place: str) -> str:
    return f"  # {_printable(notes[place])}" if place in notes else ""


def _printable(text: str) -> str:
    """YAML has no form for control characters in a comment."""
    return "".join(character if character.isprintable() else " " for character in text)


def _citations(modifier: Modifier, evidence: Evidence) -> dict[str, str]:
    """The comments beside the fields and names of a modifier, by "field", "field.key" or "params.name"."""
    who = type(modifier).__name__
    found = {}
    for place, value in _numbers(modifier.model_dump(exclude_unset=True)):
        reason = evidence.because.get(cited(who, place, value))
        if reason is not None:
            found[place] = " ".join(reason.split())
    given = getattr(modifier, "final_sparsity", None)
    for name in modifier.names() if isinstance(given, float) else ():
        layer = evidence.layers.get(name)
        if layer is None:
            continue
        if layer.sparsity != given:
            found[f"params.{name}"] = f"changed by hand; the profile gave {layer.sparsity:g}"
            continue
        # The source that is not of time tells what it is.
        measured = f"{next((name for name in evidence.sources if name != 'time'), 'loss')} {layer.loss or 0.0:+.3g}"
        said = [] if layer.loss is None else [measured]
        said += [] if layer.ms is None else [f"saves {layer.ms:.3g} ms"]
        found[f"params.{name}"] = ", ".join([*said, f"{layer.weights:,d} weights"])
    return found


def cited(modifier: str, place: str, value: object) -> str:
    """The key of a reason: it goes with the number, not with its position.

    >>> cited("GMPruningModifier", "update_frequency", 0.75)
    'GMPruningModifier.update_frequency=0.75'
    """
    return f"{modifier}.{place}={value}"


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _evidence_rows(pairs: Iterable[tuple[object, object]]) -> list[str]:
    rows = [(str(name), " ".join(str(text).split())) for name, text in pairs]
    width = max((len(name) for name, _ in rows), default=0)
    return [f"  {name:<{width}}  {text}" for name, text in rows]


def _expected(expected: Expected) -> Iterator[tuple[str, str]]:
    e = expected
    if e.sparsity:
        yield ("zeros" if e.what == "weights" else "gone"), f"{e.sparsity:.1%} of the {e.what} that may go"
    if e.recovery is not None:
        yield "recovery", f"{e.recovery:.3f}; 1 is the best for this average"
    yield "parameters", f"{e.parameters_before:,d} -> {e.parameters:,d}, of which {e.nonzero:,.0f} are not zero"
    if e.macs_before is not None and e.macs is not None:
        skipped = "" if e.nonzero_macs in (None, e.macs) else f", {e.nonzero_macs:,.0f} where zeros are skipped"
        yield "MACs", f"{e.macs_before:,d} -> {e.macs:,d}{skipped}"
    yield "size", f"{e.size_bytes_before / 1024:,.0f} -> {e.size_bytes / 1024:,.0f} KiB, uncompressed"
    if e.ms_before is not None:
        then = "not known" if e.ms is None else f"{e.ms:.3g} ms"
        yield "onnxruntime", f"{e.ms_before:.3g} -> {then}{'; it skips no zeros' if e.what == 'weights' else ''}"
    if e.ms_before is not None and e.ms_skipping is not None:
        times = f", {e.ms_before / e.ms_skipping:.2f} times as fast" if e.ms_skipping > 0 else ""
        yield "skipping zeros", f"{e.ms_before:.3g} -> {e.ms_skipping:.3g} ms by the cost model{times}"


def _summary(evidence: Evidence, modifiers: Sequence[Modifier]) -> Iterator[tuple[str, str]]:
    """Which modifiers are active in each stage; learning rates until the next one takes over."""
    starts = sorted(m.window.start for m in modifiers if m.kind == "learning_rate")
    for name, (first, last) in evidence.stages.items():
        active: Counter[str] = Counter()
        for modifier in modifiers:
            start, end = modifier.window.start, modifier.window.end
            if modifier.kind == "range":
                continue
            if modifier.kind == "learning_rate":
                end = min((other for other in starts if other > start), default=float("inf"))
            if start < last and (first < end or start == end >= first):
                active[type(modifier).__name__.removesuffix("Modifier")] += 1
        said = ", ".join(who if count == 1 else f"{who} x {count}" for who, count in active.items())
        yield name, f"epochs {first:g} to {last:g}: {said or 'as it is'}"
