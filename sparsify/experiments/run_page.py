"""The page of a run: one HTML file without scripts, with its figures, its curves and its layers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsify.experiments.folder import RUN_PAGE
from sparsify.experiments.model_card import summary_lines
from sparsify.output.tables import Column, Table

if TYPE_CHECKING:
    from sparsify.experiments.run_report import ExperimentRecord, ExperimentReport

__all__: list[str] = []

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 640, 200, 52, 24
"""Of a drawing, and its margins, in pixels."""
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0; display: block; overflow-x: auto }
caption { text-align: left; color: #666 } th, td { padding: .15rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left; font-weight: 600 } svg { display: block; max-width: 100%; height: auto }
svg text { font-size: 11px; fill: #666 } .short { color: #a00 }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } th, td { border-color: #444 } }
"""


def run_page(record: ExperimentRecord) -> str:
    """One run as HTML.

    Args:
        record: of a run, ended or not.
    """
    parts = [f"<p>{_in_html(line)}</p>" for line in _head(record)]
    parts += [f'<p class="short">{_in_html(line)}</p>' for line in record.short or ()]
    figures = record.figures
    if figures is not None:
        lines = summary_lines(figures["metric"], figures, structured=record.arguments["structured"])
        parts.append("<ul>" + "".join(f"<li>{_in_html(line)}</li>" for line in lines) + "</ul>")
        parts.append(_metrics(figures).html())
    parts += _drawings(record.epochs)
    if figures is not None:
        parts += _layers(figures)
    arguments = [{"name": name, "value": value} for name, value in record.arguments.items() if value is not None]
    parts.append(_pairs("Arguments", arguments))
    versions = [{"name": name, "value": value} for name, value in record.about.get("versions", {}).items()]
    parts.append(_pairs("Versions", versions))
    return _page(record.folder.name, parts)


def report_page(report: ExperimentReport) -> str:
    """Several runs side by side as HTML, each with a link to its page.

    Args:
        report: of the runs.
    """
    links = "".join(
        f'<li><a href="{_in_html((record.folder / RUN_PAGE).as_uri())}">{_in_html(record.folder.name)}</a></li>'
        for record in report.records
        if (record.folder / RUN_PAGE).is_file()
    )
    return _page("Experiments", [report._repr_html_(), f"<ul>{links}</ul>" if links else ""])


def _head(record: ExperimentRecord) -> list[str]:
    about, arguments = record.about, record.arguments
    counts = f"{about['train']} samples to train with, {about['val']} to measure with " if "train" in about else ""
    return [
        f"{arguments['kind']}, {arguments['use_case']}, optim level {arguments['optim_level']:g}"
        + (", structured" if arguments["structured"] else "")
        + f": {record.state}",
        f"model: {arguments['model']}",
        f"data: {arguments.get('data')}, {counts}({about.get('split')})",
    ]


def _metrics(figures: Mapping[str, Any]) -> Table:
    dense, after = figures["dense"], figures["compressed"]
    rows = [
        {
            "metric": name,
            "dense": dense["onnxruntime"].get(name),
            "torch": after["torch"].get(name),
            "onnxruntime": value,
        }
        for name, value in after["onnxruntime"].items()
    ]
    columns = [
        Column("metric", "metric"),
        Column("dense", "dense", ".4f"),
        Column("torch", "compressed, torch", ".4f"),
        Column("onnxruntime", "compressed, onnxruntime", ".4f"),
    ]
    return Table.of("On the samples to measure with", rows, columns)


def _layers(figures: Mapping[str, Any]) -> list[str]:
    found = []
    sparsity = figures["sparsity"]
    if sparsity["layers"]:
        rows = [{"name": name, "zeros": zeros} for name, zeros in sparsity["layers"].items()]
        found.append(
            Table.of("Pruned weights", rows, [Column("name", "weight"), Column("zeros", "zeros", ".1%")]).html()
        )
    found.append(_pairs("Kept dense", [{"name": n, "value": v} for n, v in sparsity["kept_dense"].items()]))
    found.append(_pairs("In float", [{"name": n, "value": v} for n, v in figures["floating"].items()]))
    return found


def _pairs(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of names and values; nothing where there are none."""
    shown = [{"name": row["name"], "value": str(row["value"])} for row in rows]
    return Table.of(title, shown, [Column("name", ""), Column("value", "", "")]).html() if shown else ""


def _drawings(epochs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss, metrics and sparsity over the epochs of all stages, with a rule where a phase begins."""
    if len(epochs) < 2:
        return []
    names = [f"{epoch['stage']} {epoch['epoch']}" for epoch in epochs]
    borders = {
        number: str(epoch["phase"])
        for number, epoch in enumerate(epochs)
        if not number or epoch["phase"] != epochs[number - 1]["phase"]
    }
    series: dict[str, list[float | None]] = {"loss": [_float_or_none(epoch["loss"]) for epoch in epochs]}
    for metric in epochs[-1]["metrics"]:
        series[metric] = [_float_or_none(epoch["metrics"].get(metric)) for epoch in epochs]
    series["sparsity of the pruned weights"] = [_float_or_none(epoch.get("sparsity")) for epoch in epochs]
    return [
        f"<h2>{_in_html(title)}</h2>{_curve(values, names, borders)}"
        for title, values in series.items()
        if sum(value is not None for value in values) > 1
    ]


def _curve(values: Sequence[float | None], names: Sequence[str], borders: Mapping[int, str]) -> str:
    """A line through the values as SVG; each point says its value where the mouse rests on it."""
    known = [value for value in values if value is not None]
    low, high = min(known), max(known)
    span = (high - low) or max(abs(high), 1.0)
    across = (_WIDTH - _LEFT - 10) / max(1, len(values) - 1)

    def place(number: int, value: float) -> tuple[float, float]:
        return _LEFT + number * across, 14 + (_HEIGHT - 14 - _BOTTOM) * (1 - (value - low) / span)

    points = [(number, value, *place(number, value)) for number, value in enumerate(values) if value is not None]
    rules = "".join(
        f'<line x1="{x:.1f}" y1="12" x2="{x:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="#bbb" stroke-dasharray="3 3"/>'
        f'<text x="{x + 3:.1f}" y="{_HEIGHT - 8}">{_in_html(name)}</text>'
        for x, name in ((_LEFT + number * across, name) for number, name in borders.items())
    )
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#06c"><title>{_in_html(names[number])}: {value:.4g}</title>'
        "</circle>"
        for number, value, x, y in points
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for _, _, x, y in points)
    scale = "".join(
        f'<text x="{_LEFT - 6}" y="{place(0, value)[1] + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        for value in sorted({low, high})
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">{rules}'
        f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="1.5"/>{marks}{scale}</svg>'
    )


def _float_or_none(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _in_html(text: object) -> str:
    return html.escape(str(text))


def _page(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_in_html(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{_in_html(title)}</h1>\n{body}\n</body></html>\n"
    )
