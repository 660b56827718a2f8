// Elements and small graphs. Text is always set as text: names of layers are not markup.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}
const el = (tag, attributes = {}, ...children) => put(document.createElement(tag), attributes, children);
const shape = (tag, attributes = {}, ...children) => put(document.createElementNS(SVG, tag), attributes, children);

const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)}%`;
const figure = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString());
/** With three digits even where the last are 0: columns of figures line up. */
const measured = (value) => (value >= 1000 || value < 0.001 ? figure(value) : value.toPrecision(3));
const times = (value) => `${value.toFixed(2)}×`;
function large(value) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (value >= size) return `${figure(value / size)} ${unit}`;
  }
  return figure(Math.round(value));
}

/** Room for a graph in the pixels that its place has, with lines and figures at the left. */
function axes(svg, marks, text, { left = 42, right = 10, top = 12, bottom = 22 } = {}) {
  const { width, height } = svg.getBoundingClientRect();
  svg.setAttribute("viewBox", `0 0 ${Math.max(width, 1)} ${Math.max(height, 1)}`);
  const high = marks[marks.length - 1] || 1;
  const y = (value) => height - bottom - (value / high) * (height - top - bottom);
  const lines = marks.flatMap((mark) => [
    shape("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) }),
    shape("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, text(mark)),
  ]);
  svg.replaceChildren(...lines);
  return { left, width: Math.max(1, width - left - right), y, bottom: height - bottom, top, height };
}

/** A growing scale of round marks from 0 to at least `high`. */
function roundMarks(high) {
  if (!(high > 0)) return [0, 1];
  const size = 10 ** Math.floor(Math.log10(high));
  const step = size * ([0.2, 0.25, 0.5, 1, 2].find((part) => high / (size * part) <= 5) ?? 2);
  const count = Math.ceil(high / step - 1e-9);
  return Array.from({ length: count + 1 }, (_, number) => Number((number * step).toPrecision(12)));
}

/** A curve over sparsity with the point where the layer stands. */
function curveGraph(svg, levels, values, share, unit) {
  const room = axes(svg, roundMarks(Math.max(...values)), figure, { bottom: 30 });
  const x = (level) => room.left + (level / (levels[levels.length - 1] || 1)) * room.width;
  const path = levels.map((level, n) => `${n ? "L" : "M"}${x(level)} ${room.y(values[n])}`).join("");
  const here = at(levels, values, share);
  svg.append(
    shape("path", { class: "curve", d: path }),
    shape("circle", { class: "point", cx: x(share), cy: room.y(here), r: 6 }),
    shape("text", { x: room.left, y: room.height - 10 }, "0%"),
    shape("text", { x: room.left + room.width, y: room.height - 10, "text-anchor": "end" }, percent(levels[levels.length - 1], 0)),
  );
  svg.setAttribute("aria-label", `${unit}: ${figure(values[0])} dense, ${figure(here)} at ${percent(share)} sparsity`);
}

/** Rows with a bar each: [{name, note, cells, value}]. Columns whose title ends in "*" are left out where it is narrow. */
function barTable(caption, titles, rows) {
  const kinds = titles.map((title, n) => (n ? `num${title.endsWith("*") ? " wide" : ""}` : ""));
  const most = Math.max(...rows.map((row) => row.value), 1e-12);
  const bar = (value) => el("td", { class: "wide", "aria-hidden": "true" }, el("span", { class: "meter", style: `width:${(100 * value) / most}%` }));
  return el("table", {}, el("caption", { class: "visually-hidden" }, caption),
    el("thead", {}, el("tr", {}, titles.map((title, n) => el("th", { scope: "col", class: kinds[n] }, title.replace("*", ""))), el("td", { class: "wide", style: "width:28%" }))),
    el("tbody", {}, rows.map((row) => el("tr", {}, el("th", { scope: "row" }, row.name, row.note ? el("small", {}, row.note) : null), row.cells.map((cell, n) => el("td", { class: kinds[n + 1] }, cell)), bar(row.value)))));
}
