// The page at work: one state, one `refresh` that computes the profile and shows it everywhere.
"use strict";

const data = JSON.parse($("data").textContent);
const stagesAtFirst = data.training.stages;
const [int8At, int8Until] = stagesAtFirst.quantization ?? [0, 0];
const state = {
  settings: structuredClone(data.settings),
  start: stagesAtFirst.pruning[0],
  end: stagesAtFirst.pruning[1],
  tuned: stagesAtFirst["fine-tuning"][1],
  frequency: data.training.frequency,
  rates: structuredClone(data.schedules.suggested ?? []),
  tab: 0,
  cursor: -1,
};
const shown = data.layers.filter((layer) => layer.name !== data.rest);
const prunable = shown.filter((layer) => !layer.why_not);
let profile = null;
let waiting = false;

const time = (value) => `${figure(value)} ${data.timed ? "ms" : "M MACs"}`;
const choiceOf = (index) => profile.layers[data.layers.indexOf(shown[index])];

/** Everything follows, once a frame however fast a slider moves. */
function refresh() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    profile = pruningProfile(data.layers, state.settings);
    showFigures();
    drawBars();
    showLayers();
    showTraining();
    showRecipe();
    drawRates();
    $("notes").hidden = !profile.notes.length;
    $("notes").textContent = profile.notes.length ? `Note: ${profile.notes.join(" ")}` : "";
  });
}

// ---------------------------------------------------------------- figures

const capital = (text) => text[0].toUpperCase() + text.slice(1);

/** What the profile is expected to lose: the loss itself where that of the dense model was measured. */
function lostRow() {
  const { name, base } = data.lost;
  if (base !== null) return ["Expected loss", `${figure(base)} → ${figure(base + profile.loss)}`, "before training goes on, layers taken apart"];
  return [capital(name), `+${figure(profile.loss)}`, name === "loss" ? data.loss : "orders the layers; no loss was measured"];
}

const TABS = {
  Summary: () => [
    ["Estimated speed-up", times(profile.speedup), data.timed ? "in a runtime that skips zeros; onnxruntime does not" : "by multiplications, not measured"],
    ["Recovery confidence", profile.recovery.toFixed(3), "1 is the best spread of this average"],
    lostRow(),
    ["Time", `${time(profile.ms_before)} → ${time(profile.ms_after)}`],
    ["FLOPS", `−${percent(1 - profile.macs_after / (profile.macs_before || 1))}`],
    ["Params", `−${percent(1 - profile.parameters_after / (profile.parameters_before || 1))}`],
  ],
  Performance: () => [
    ["Estimated time", time(profile.ms_after), data.timed ? "a call of the model" : "not measured: millions of multiplications"],
    ["Dense", time(profile.ms_before)],
    ["Saved", time(profile.ms_before - profile.ms_after)],
    ...(data.performance?.totals.int8 ? [["Measured in int8", time(data.performance.totals.int8), "dense, in onnxruntime"]] : []),
  ],
  FLOPS: () => [
    ["FLOPS left", large(2 * profile.macs_after), "two for each multiplication"],
    ["Dense", large(2 * profile.macs_before)],
    ["Fewer", percent(1 - profile.macs_after / (profile.macs_before || 1))],
  ],
  Params: () => [
    ["Parameters left", large(profile.parameters_after), "that are not zero"],
    ["Dense", large(profile.parameters_before)],
    ["Average sparsity", percent(profile.sparsity), "of all that may be pruned"],
  ],
};

function buildTabs() {
  const names = Object.keys(TABS);
  const choose = (index, focus) => {
    state.tab = (index + names.length) % names.length;
    [...$("tabs").children].forEach((tab, n) => {
      tab.setAttribute("aria-selected", n === state.tab);
      tab.tabIndex = n === state.tab ? 0 : -1;
      if (focus && n === state.tab) tab.focus();
    });
    $("panel").setAttribute("aria-labelledby", `tab${state.tab}`);
    if (profile) showFigures();
  };
  const keys = { ArrowRight: 1, ArrowLeft: -1 };
  names.forEach((name, n) => {
    $("tabs").append(el("button", {
      type: "button", role: "tab", id: `tab${n}`, "aria-controls": "panel", onclick: () => choose(n),
      onkeydown: (event) => keys[event.key] && (event.preventDefault(), choose(state.tab + keys[event.key], true)),
    }, name));
  });
  choose(0);
}

function showFigures() {
  const rows = Object.values(TABS)[state.tab]();
  $("panel").replaceChildren(el("dl", { class: "metrics" }, rows.map(([name, value, note]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value, note ? el("small", {}, note) : null)))));
  $("live").textContent = `Speed-up ${times(profile.speedup)}, recovery confidence ${profile.recovery.toFixed(2)}`;
}

// ---------------------------------------------------------------- settings

function slider(name, title, text, options, ends) {
  const output = el("output", { for: `set-${name}` });
  const input = el("input", { type: "range", id: `set-${name}`, ...options, oninput: () => {
    state.settings[name] = Number(input.value);
    say();
    refresh();
  } });
  const say = () => {
    output.textContent = text(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.value = state.settings[name];
  say();
  // Said outright: an output inside a label would take it for its own.
  return el("label", { class: "control", for: `set-${name}` }, el("span", {}, title, output), input,
    ends ? el("span", { class: "ends" }, el("span", {}, ends[0]), el("span", {}, ends[1])) : null);
}

/** A number that is taken over where `fits` says nothing; where it says what is wrong, the last good one stays. */
function number(title, value, fits, take, attributes = {}) {
  const input = el("input", { type: "number", step: "any", value, ...attributes, oninput: () => {
    const given = input.value.trim() === "" ? NaN : Number(input.value);
    const wrong = Number.isFinite(given) ? fits(given) : "give a number";
    input.setAttribute("aria-invalid", Boolean(wrong));
    input.setCustomValidity(wrong);
    input.title = wrong;
    if (!wrong) take(given);
  } });
  return el("label", {}, title, input);
}

function buildControls() {
  const check = (name, title) => el("label", {}, el("input", { type: "checkbox", checked: state.settings[name], onchange: (event) => {
    state.settings[name] = event.target.checked;
    refresh();
  } }), title);
  const share = { min: 0, max: 0.99, step: 0.01 };
  const epoch = (title, name, fits) => number(title, state[name], fits, (value) => ((state[name] = value), refresh()), { min: 0, id: `epoch-${name}` });
  $("controls").append(
    slider("sparsity", "Average sparsity", percent, { min: 0, max: 0.99, step: 0.005 }),
    slider("balance", "Balance", (value) => `${Math.round(100 * value)}% recovery`, { min: 0, max: 1, step: 0.01 }, ["performance", "recovery"]),
    el("fieldset", {}, el("legend", {}, "Active epochs"), el("div", { class: "fields" },
      epoch("From", "start", (value) => (value < 0 || value >= state.end ? "0 or more, and before the end" : "")),
      epoch("To", "end", (value) => (value <= state.start || value > state.tuned ? "after the start, not after the end of training" : "")),
      epoch("Every", "frequency", (value) => (value <= 0 ? "epochs between two updates, above 0" : "")),
      epoch("Train until", "tuned", (value) => (value < state.end || value > 1e6 ? "not before pruning ends" : "")))),
    el("details", { class: "more" }, el("summary", {}, "Filters and caps"), el("div", { class: "stack" },
      slider("min_sparsity", "Minimum sparsity", percent, share),
      slider("min_speedup", "Minimum speed-up", (value) => (value > 1 ? times(value) : "any"), { min: 0, max: 10, step: 0.1 }),
      slider("min_recovery", "Minimum recovery", (value) => (value ? percent(value, 0) : "any"), { min: 0, max: 1, step: 0.01 }),
      slider("max_sparsity", "Cap of a layer", percent, share),
      check("first_layer", "Prune the first layer"),
      check("grouped", "Prune grouped convolutions"))),
  );
}

// ---------------------------------------------------------------- graph

let bars = [];
function drawBars() {
  const svg = $("bars");
  const room = axes(svg, [0, 0.25, 0.5, 0.75, 1], (mark) => percent(mark, 0));
  const pitch = room.width / Math.max(1, shown.length);
  const gap = pitch > 6 ? Math.min(6, pitch * 0.22) : 0;
  bars = shown.map((_, index) => {
    const choice = choiceOf(index);
    const kind = choice.overridden ? " hand" : choice.sparsity > 0 ? "" : " dense";
    const height = Math.max(room.bottom - room.y(choice.sparsity), 2);
    return shape("rect", { class: `bar${kind}`, x: room.left + index * pitch + gap / 2, width: Math.max(pitch - gap, 0.5), y: room.bottom - height, height, rx: Math.min(3, pitch / 4) });
  });
  const mean = room.y(profile.sparsity);
  // Two names share the width, at about 6.5 pixels a letter.
  const letters = Math.max(4, Math.floor(room.width / 13) - 2);
  const short = (name) => (name.length > letters ? `${name.slice(0, letters - 1)}…` : name);
  svg.append(...bars,
    shape("line", { class: "mean", x1: room.left, x2: room.left + room.width, y1: mean, y2: mean }),
    shape("text", { x: room.left, y: room.height - 5 }, shown.length ? short(shown[0].name) : ""),
    shape("text", { x: room.left + room.width, y: room.height - 5, "text-anchor": "end" }, shown.length > 1 ? short(shown[shown.length - 1].name) : ""));
  point(state.cursor, false);
}

function point(index, aloud) {
  state.cursor = index;
  const tooltip = $("tooltip");
  tooltip.hidden = index < 0;
  bars.forEach((bar, n) => bar.classList.toggle("on", n === index));
  if (index < 0) return;
  const choice = choiceOf(index);
  const lines = [
    `${percent(choice.sparsity)} sparse${choice.why ? `: ${choice.why}` : ""}`,
    `${times(choice.speedup)} as fast, ${time(choice.ms)}`,
    `recovery ${choice.recovery.toFixed(2)}`,
    `${large(choice.parameters)} of ${large(shown[index].parameters)} parameters left`,
  ];
  tooltip.replaceChildren(el("b", {}, choice.name), ...lines.map((line) => el("div", {}, line)));
  const box = $("bars").getBoundingClientRect();
  const bar = bars[index].getBoundingClientRect();
  const left = bar.left - box.left + bar.width / 2 - tooltip.offsetWidth / 2;
  const top = bar.top - box.top - tooltip.offsetHeight - 8;
  tooltip.style.left = `${Math.max(0, Math.min(left, box.width - tooltip.offsetWidth))}px`;
  tooltip.style.top = `${Math.max(0, top)}px`;
  if (aloud) $("live").textContent = `${choice.name}: ${lines.join(", ")}`;
}

function watchBars() {
  const svg = $("bars");
  const under = (event) => {
    const box = svg.getBoundingClientRect();
    const index = Math.floor(((event.clientX - box.left - 42) / (box.width - 52)) * shown.length);
    return index >= 0 && index < shown.length ? index : -1;
  };
  svg.addEventListener("pointermove", (event) => point(under(event), false));
  svg.addEventListener("pointerleave", () => point(-1, false));
  svg.addEventListener("blur", () => point(-1, false));
  svg.addEventListener("click", (event) => under(event) >= 0 && openLayer(under(event)));
  svg.addEventListener("keydown", (event) => {
    const end = shown.length - 1;
    const moves = { ArrowRight: Math.min(end, state.cursor + 1), ArrowLeft: Math.max(0, state.cursor - 1), Home: 0, End: end, Escape: -1 };
    if (event.key in moves) point(moves[event.key], true);
    else if (event.key === "Enter" && state.cursor >= 0) openLayer(state.cursor);
    else return;
    event.preventDefault();
  });
}

// ---------------------------------------------------------------- layers

const rows = [];
function buildLayers() {
  shown.forEach((layer, index) => {
    const row = { layer, index, open: false };
    row.button = el("button", { type: "button", class: "toggle", "aria-expanded": "false", "aria-controls": `detail${index}`, onclick: () => toggle(row) }, layer.name);
    row.mark = el("span", { class: "mark" });
    row.input = el("input", { type: "number", class: "share", min: 0, max: 99.9, step: 0.5, disabled: Boolean(layer.why_not), "aria-label": `Sparsity of ${layer.name} in percent`, onchange: () => setByHand(row) });
    row.cells = ["num", "num wide", "num wide", "num wide"].map((kind) => el("td", { class: kind }));
    row.line = el("tr", {}, el("th", { scope: "row" }, row.button, " ", row.mark), el("td", {}, row.input, " %"), row.cells);
    row.place = el("td", { colspan: 6, id: `detail${index}` });
    row.detail = el("tr", { hidden: true }, row.place);
    rows.push(row);
    $("layers").tBodies[0].append(row.line, row.detail);
  });
  $("editor-lead").textContent = `${prunable.length} of ${shown.length} can be pruned; open one to see its curves, or set it by hand`;
  $("find").addEventListener("input", showLayers);
  $("clear-overrides").addEventListener("click", () => {
    state.settings.overrides = {};
    refresh();
  });
  $("editor").addEventListener("toggle", showLayers);
}

function setByHand(row) {
  const text = row.input.value.trim();
  const value = Number(text) / 100;
  const wrong = text !== "" && !(value >= 0 && value < 1);
  row.input.setAttribute("aria-invalid", wrong);
  row.input.title = wrong ? "0 to below 100; empty: as it is spread" : "";
  if (wrong) return;
  const others = Object.entries(state.settings.overrides).filter(([name]) => name !== row.layer.name);
  state.settings.overrides = Object.fromEntries(text === "" ? others : [...others, [row.layer.name, value]]);
  refresh();
}

function toggle(row, open = !row.open) {
  row.open = open;
  row.button.setAttribute("aria-expanded", open);
  row.detail.hidden = !open;
  if (open) showDetail(row);
}

function openLayer(index) {
  $("editor").open = true;
  $("find").value = "";
  showLayers();
  toggle(rows[index], true);
  rows[index].line.scrollIntoView({ block: "center" });
  rows[index].button.focus();
}

function showLayers() {
  if (!$("editor").open || !profile) return;
  const sought = $("find").value.trim().toLowerCase();
  for (const row of rows) {
    const choice = choiceOf(row.index);
    const found = row.layer.name.toLowerCase().includes(sought);
    row.line.hidden = !found;
    row.detail.hidden = !found || !row.open;
    if (document.activeElement !== row.input) row.input.value = (100 * choice.sparsity).toFixed(1);
    row.mark.textContent = choice.overridden ? "by hand" : "";
    const texts = [times(choice.speedup), choice.recovery.toFixed(2), time(choice.ms), large(choice.parameters)];
    row.cells.forEach((cell, n) => (cell.textContent = texts[n]));
    if (row.open && found) showDetail(row);
  }
  $("clear-overrides").disabled = !Object.keys(state.settings.overrides).length;
}

function showDetail(row) {
  const { layer } = row;
  const choice = choiceOf(row.index);
  if (!row.graphs) {
    row.facts = el("dl", { class: "metrics" });
    row.free = el("button", { type: "button", onclick: () => {
      row.input.value = "";
      setByHand(row);
    } }, "Let it be spread");
    const graph = (title) => {
      const svg = shape("svg", { role: "img" });
      return [svg, el("figure", {}, svg, el("figcaption", {}, title))];
    };
    row.graphs = [graph(`${capital(data.lost.name)} over sparsity`), graph(data.timed ? "Time over sparsity, ms" : "Time over sparsity, by multiplications")];
    row.place.append(el("div", { class: "detail" }, el("div", { class: "stack" }, row.facts, el("div", {}, row.free)), row.graphs.map(([, frame]) => frame)));
  }
  const facts = [
    [layer.type || "Layer", `${percent(choice.sparsity)} sparse`, choice.why || "spread with the others"],
    ["Output", layer.shape || "–"],
    ["Parameters", `${large(layer.parameters)} → ${large(choice.parameters)}`],
    ["FLOPS", `${large(2 * layer.macs)} → ${large(2 * choice.macs)}`],
    ["Time", `${time(layer.ms)} → ${time(choice.ms)}`],
    ["Recovery", choice.recovery.toFixed(3)],
  ];
  row.facts.replaceChildren(...facts.map(([name, value, note]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, note ? el("small", {}, note) : null))));
  row.free.hidden = !choice.overridden;
  row.graphs.forEach(([svg, frame]) => (frame.hidden = Boolean(layer.why_not)));
  if (layer.why_not) return;
  curveGraph(row.graphs[0][0], layer.levels, layer.losses, choice.sparsity, capital(data.lost.name));
  curveGraph(row.graphs[1][0], layer.levels, layer.times, choice.sparsity, "Time");
}

// ---------------------------------------------------------------- training and export

function stagesNow() {
  const found = [["stabilization", 0, state.start], ["pruning", state.start, state.end], ["fine-tuning", state.end, state.tuned],
    ["quantization", state.tuned, state.tuned + int8Until - int8At]];
  return found.filter(([, start, end]) => end > start);
}

function lastEpoch() {
  return Math.max(state.tuned + int8Until - int8At, ...state.rates.map(endOf).filter(Number.isFinite));
}

function nameOf({ type, fields }) {
  const kinds = { StepLR: "in steps", MultiStepLR: "in steps at given epochs", ExponentialLR: "exponential" };
  if (type === "SetLearningRateModifier") return `Learning rate ${fields.learning_rate}`;
  return `Learning rate, ${kinds[fields.lr_class] ?? fields.lr_func}`;
}

function showTraining() {
  const total = lastEpoch();
  const bar = (start, end) => el("i", { style: `left:${(100 * start) / total}%;width:${(100 * (Math.min(end, total) - start)) / total}%` });
  const row = (title, note, spans) => el("li", {}, el("div", {}, title, el("small", {}, note)), el("div", { class: "track", "aria-hidden": "true" }, spans.map(([start, end]) => bar(start, end))));
  const epochs = (start, end) => `epochs ${figure(start)} to ${figure(end)}`;
  const stages = stagesNow();
  const line = row("Stages", stages.map(([name, start, end]) => `${name} ${figure(start)}–${figure(end)}`).join(", "), stages.map(([, start, end]) => [start, end]));
  line.className = "stages";
  const sorted = [...state.rates].sort((a, b) => startOf(a) - startOf(b));
  const until = (index) => Math.min(endOf(sorted[index]) === Infinity ? (sorted[index + 1] ? startOf(sorted[index + 1]) : total) : endOf(sorted[index]), total);
  $("timeline").replaceChildren(el("ol", { class: "timeline" }, line,
    row("Pruning", `${epochs(state.start, state.end)}, every ${figure(state.frequency)}`, [[state.start, state.end]]),
    int8Until ? row("Quantization to int8", `from epoch ${figure(state.tuned)}`, [[state.tuned, total]]) : [],
    sorted.map((one, index) => row(nameOf(one), epochs(startOf(one), until(index)), [[startOf(one), until(index)]]))));
  const origin = data.training.known ? `from ${figure(data.training.epochs)} epochs of the original training with ${data.training.optimizer}` : `laid out for ${figure(data.training.epochs)} epochs: the original training is not known`;
  $("training-lead").textContent = `${figure(total)} epochs, ${origin}`;
}

function evidenceOf(choice) {
  const layer = data.layers.find((one) => one.name === choice.name);
  const lost = figure(at(layer.levels, layer.losses, choice.sparsity) - layer.losses[0]);
  const saved = data.timed ? `, saves ${time(layer.ms - choice.ms)} where zeros are skipped` : "";
  return `${percent(choice.sparsity, 2)} of ${layer.weights.toLocaleString("en")} weights: ${data.lost.name} +${lost}${saved}${choice.overridden ? ", set by hand" : ""}`;
}

/** What Python laid out for the end; int8 moves with the epoch that it starts at. */
function lastNow() {
  const moved = (fields) => Object.fromEntries(Object.entries(fields).map(([key, value]) => [key, key.endsWith("_epoch") ? value + state.tuned - int8At : value]));
  return data.last.map((one) => (one.type === "QuantizationModifier" ? { ...one, fields: moved(one.fields) } : one));
}

function recipeNow() {
  const when = { start: state.start, end: state.end, frequency: state.frequency, first: data.training.first };
  const header = [
    `Made for ${data.model} with the Optimize screen of sparsify.`,
    `Average sparsity ${percent(profile.sparsity)}, estimated speed-up ${times(profile.speedup)}, recovery confidence ${profile.recovery.toFixed(3)}.`,
    `${capital(data.lost.name)}: ${data.loss}.`,
    ...profile.notes.map((note) => `Note: ${note}`),
  ];
  const range = { type: "EpochRangeModifier", fields: { start_epoch: 0, end_epoch: lastEpoch() } };
  return recipeText(header, [range, ...pruningModifiers(profile, data.weights, when, evidenceOf), ...state.rates, ...lastNow()]);
}

function showRecipe() {
  $("recipe").textContent = recipeNow();
}

function buildExport() {
  const framework = $("framework");
  framework.append(...Object.keys(data.code).map((name) => el("option", { value: name }, name)));
  const show = () => ($("code").textContent = data.code[framework.value]);
  framework.addEventListener("change", show);
  show();
  $("recipe-title").textContent = data.recipe;
  $("download").addEventListener("click", () => {
    const address = URL.createObjectURL(new Blob([recipeNow()], { type: "application/yaml" }));
    el("a", { href: address, download: data.recipe }).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
    $("export-status").textContent = `${data.recipe} was given to your browser to save.`;
  });
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.addEventListener("click", async () => {
      const place = $(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(place.textContent);
        $("export-status").textContent = "Copied.";
      } catch {
        // A page from a file may not be allowed to: then the text is selected, for the keyboard to copy.
        getSelection().selectAllChildren(place);
        $("export-status").textContent = "Selected: copy it with Ctrl+C or ⌘C.";
      }
    });
  }
}

// ---------------------------------------------------------------- benchmarks

function buildBenchmarks() {
  const views = [];
  if (data.benchmarks.length) {
    // By items: files may have been measured with other batches.
    const first = data.benchmarks[0].items;
    const rows = data.benchmarks.map((one) => ({ name: one.name, note: one.how, value: one.items, cells: [measured(one.p50), measured(one.p95), large(one.items), times(one.items / first), large(one.size)] }));
    views.push(el("div", {}, el("h3", {}, "Files"), barTable("Measured files", ["File", "p50 ms", "p95 ms*", "Items/s*", "Faster", "Bytes"], rows)));
  }
  const { performance } = data;
  if (performance) {
    const dense = performance.totals.float;
    const totals = Object.entries(performance.totals).map(([name, ms]) => ({ name, value: ms, cells: [measured(ms), times(dense / ms)] }));
    const slow = [...performance.layers].sort((a, b) => b[2] - a[2]).slice(0, 12);
    const layers = slow.map(([name, type, ms, int8]) => ({ name, note: type, value: ms, cells: [measured(ms), int8 === null ? "–" : measured(int8)] }));
    views.push(
      el("div", {}, el("h3", {}, `The model as it was measured: ${performance.how}`), barTable("Whole model", ["Form", "ms", "Faster"], totals)),
      el("div", {}, el("h3", {}, `The ${layers.length} slowest layers; ${figure(performance.others)} ms belong to none`), barTable("Slowest layers", ["Layer", "ms", "int8 ms"], layers)));
  }
  $("benchmarks-lead").textContent = views.length ? "measured, not estimated" : "nothing was measured yet: performance_profile measures a model, benchmark_onnx a file; give both to the report";
  $("benchmark-views").replaceChildren(el("div", { class: "views" }, views));
}

function begin() {
  const total = shown.reduce((sum, layer) => sum + layer.macs, 0);
  $("subtitle").textContent = `${shown.length} layers, ${large(data.layers.reduce((sum, layer) => sum + layer.parameters, 0))} parameters, ${large(2 * total)} FLOPS at batch ${data.batch}`;
  $("pruning-lead").textContent = `${capital(data.lost.name)} ${data.loss}; times ${data.timed ? "from measured layers" : "by multiplications, not measured"}.`;
  buildTabs();
  buildControls();
  buildLayers();
  buildSchedules();
  buildExport();
  buildBenchmarks();
  watchBars();
  refresh();
  let width = 0;
  // Height changes with what is shown; only another width needs new graphs.
  new ResizeObserver(() => {
    if (innerWidth !== width) {
      width = innerWidth;
      refresh();
    }
  }).observe(document.body);
}

addEventListener("DOMContentLoaded", begin);
