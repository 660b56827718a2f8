// The learning-rate editor: a list of schedules that is edited, saved under names, and drawn.
"use strict";

const KINDS = {
  "set value": ["SetLearningRateModifier"],
  "in steps": ["LearningRateModifier", "StepLR"],
  "at given epochs": ["LearningRateModifier", "MultiStepLR"],
  exponential: ["LearningRateModifier", "ExponentialLR"],
  linear: ["LearningRateFunctionModifier", "linear"],
  cosine: ["LearningRateFunctionModifier", "cosine"],
};
const SAVED = `sparsify schedules of ${data.model}`;
const memory = {};

const kindOf = ({ type, fields }) => Object.keys(KINDS).find((kind) => KINDS[kind][0] === type && (KINDS[kind][1] ?? fields.lr_class ?? fields.lr_func) === (fields.lr_class ?? fields.lr_func));

/** Saved schedules stay in this browser where it lets a page keep something; else as long as the page is open. */
function saved() {
  try {
    return JSON.parse(localStorage.getItem(SAVED)) ?? memory;
  } catch {
    return memory;
  }
}

function save(all) {
  Object.keys(memory).forEach((name) => delete memory[name]);
  Object.assign(memory, all);
  try {
    localStorage.setItem(SAVED, JSON.stringify(all));
  } catch {
    return false;
  }
  return true;
}

/** A schedule of another kind over the same epochs, from the same learning rate. */
function ofKind(kind, old) {
  const start = startOf(old);
  const end = Number.isFinite(endOf(old)) ? endOf(old) : Math.max(state.tuned, start + 1);
  const first = old.fields.init_lr ?? old.fields.learning_rate;
  const [type, name] = KINDS[kind];
  if (type === "SetLearningRateModifier") return { type, fields: { start_epoch: start, learning_rate: first } };
  if (type === "LearningRateFunctionModifier") return { type, fields: { start_epoch: start, end_epoch: end, lr_func: name, init_lr: first, final_lr: first / 100 } };
  const kwargs = {
    StepLR: { step_size: Math.max(1, Math.floor((end - start) / 4)), gamma: 0.25 },
    MultiStepLR: { milestones: [start + Math.ceil((end - start) / 2)], gamma: 0.1 },
    ExponentialLR: { gamma: 0.9 },
  };
  return { type, fields: { start_epoch: start, end_epoch: end, lr_class: name, lr_kwargs: kwargs[name], init_lr: first } };
}

function scheduleRow(one, index) {
  const { fields } = one;
  const kwargs = fields.lr_kwargs ?? {};
  const changed = (place, key) => (value) => {
    place[key] = value;
    ratesChanged();
  };
  const rate = (value) => (value < 0 ? "0 or more" : "");
  const inputs = [
    el("label", {}, "Kind", el("select", { onchange: (event) => {
      state.rates[index] = ofKind(event.target.value, one);
      showSchedules();
      $("schedule-rows").children[index].querySelector("select").focus();
    } }, Object.keys(KINDS).map((kind) => el("option", { selected: kind === kindOf(one) }, kind)))),
    number("From epoch", startOf(one), (value) => (value < 0 || value >= endOf(one) ? "0 or more, and before the end" : ""), changed(fields, "start_epoch")),
  ];
  if ("end_epoch" in fields) inputs.push(number("To epoch", fields.end_epoch, (value) => (value <= startOf(one) || value > 1e6 ? "after the start" : ""), changed(fields, "end_epoch")));
  if ("learning_rate" in fields) inputs.push(number("Learning rate", fields.learning_rate, rate, changed(fields, "learning_rate")));
  if ("init_lr" in fields) inputs.push(number("Initial LR", fields.init_lr, rate, changed(fields, "init_lr")));
  if ("final_lr" in fields) inputs.push(number("Final LR", fields.final_lr, rate, changed(fields, "final_lr")));
  if ("step_size" in kwargs) inputs.push(number("Epochs a step", kwargs.step_size, (value) => (value <= 0 ? "above 0" : ""), changed(kwargs, "step_size")));
  if ("gamma" in kwargs) inputs.push(number("Times", kwargs.gamma, (value) => (value <= 0 || value > 1 ? "above 0, up to 1" : ""), changed(kwargs, "gamma")));
  if ("milestones" in kwargs) {
    const input = el("input", { type: "text", value: kwargs.milestones.join(", "), oninput: () => {
      const values = input.value.split(",").map((part) => (part.trim() === "" ? NaN : Number(part)));
      const wrong = values.some((value) => !Number.isFinite(value) || value < 0);
      input.setAttribute("aria-invalid", wrong);
      input.title = wrong ? "epochs with commas between them" : "";
      if (!wrong) changed(kwargs, "milestones")(values);
    } });
    inputs.push(el("label", {}, "At epochs", input));
  }
  const remove = el("button", { type: "button", "aria-label": `Remove schedule ${index + 1}`, onclick: () => {
    state.rates.splice(index, 1);
    showSchedules();
    $("schedule-add").focus();
  } }, "Remove");
  return el("fieldset", {}, el("legend", {}, `${index + 1}. ${kindOf(one)}`), el("div", { class: "fields" }, inputs), el("div", { class: "row" }, remove));
}

function ratesChanged() {
  drawRates();
  showTraining();
  showRecipe();
}

function showSchedules() {
  $("schedule-rows").replaceChildren(...state.rates.map(scheduleRow));
  ratesChanged();
}

function listSchedules(chosen = "made:suggested") {
  const group = (label, prefix, names) => (names.length ? el("optgroup", { label }, names.map((name) => el("option", { value: prefix + name, selected: prefix + name === chosen }, name))) : null);
  $("schedules").replaceChildren(...[group("From the original training", "made:", Object.keys(data.schedules)), group("Saved", "saved:", Object.keys(saved()))].filter(Boolean));
  $("schedule-forget").disabled = !$("schedules").value.startsWith("saved:");
}

function buildSchedules() {
  if (!Object.keys(data.schedules).length) {
    // Without the original learning rates there is nothing to lay out: they are left to the training loop.
    $("rates").hidden = $("nav-rates").hidden = true;
    return;
  }
  const say = (text) => ($("schedule-status").textContent = text);
  const use = (list) => {
    state.rates = structuredClone(list);
    showSchedules();
  };
  $("schedules").addEventListener("change", () => ($("schedule-forget").disabled = !$("schedules").value.startsWith("saved:")));
  $("schedule-load").addEventListener("click", () => {
    const [kind, name] = $("schedules").value.split(/:(.*)/s);
    use((kind === "made" ? data.schedules : saved())[name]);
    say(`${name}: in use.`);
  });
  $("schedule-save").addEventListener("click", () => {
    const name = $("schedule-name").value.trim();
    if (!name) return say("Give a name first.");
    const kept = save({ ...saved(), [name]: structuredClone(state.rates) });
    listSchedules(`saved:${name}`);
    return say(`${name}: saved${kept ? " in this browser" : " while this page is open"}.`);
  });
  $("schedule-forget").addEventListener("click", () => {
    const name = $("schedules").value.slice("saved:".length);
    save(Object.fromEntries(Object.entries(saved()).filter(([other]) => other !== name)));
    listSchedules();
    say(`${name}: forgotten.`);
  });
  $("schedule-add").addEventListener("click", () => {
    const end = Math.max(0, ...state.rates.map((one) => (Number.isFinite(endOf(one)) ? endOf(one) : startOf(one) + 1)));
    state.rates.push({ type: "SetLearningRateModifier", fields: { start_epoch: end, learning_rate: learningRate(state.rates, end) ?? 0.01 } });
    showSchedules();
    $("schedule-rows").lastElementChild.querySelector("select").focus();
  });
  $("schedule-reset").addEventListener("click", () => {
    use(data.schedules.suggested);
    say("As suggested again.");
  });
  listSchedules();
  $("schedule-rows").replaceChildren(...state.rates.map(scheduleRow));
}

function drawRates() {
  if ($("rates").hidden) return;
  const svg = $("rates-graph");
  const total = Math.max(lastEpoch(), 1);
  const count = 600;
  const points = Array.from({ length: count + 1 }, (_, n) => (n * total) / count).map((epoch) => [epoch, learningRate(state.rates, epoch)]);
  const known = points.filter(([, rate]) => rate !== null);
  const room = axes(svg, roundMarks(Math.max(0, ...known.map(([, rate]) => rate))), figure, { left: 58, bottom: 36 });
  const x = (epoch) => room.left + (epoch / total) * room.width;
  const marks = roundMarks(total).filter((mark) => mark <= total);
  svg.prepend(...stagesNow().filter(([name]) => name === "pruning").map(([, start, end]) => shape("rect", { class: "stage", x: x(start), width: x(end) - x(start), y: room.top, height: room.bottom - room.top })));
  let pen = "M";
  const path = points.map(([epoch, rate]) => {
    if (rate === null) return (pen = "M") && "";
    const text = `${pen}${x(epoch).toFixed(1)} ${room.y(rate).toFixed(1)}`;
    pen = "L";
    return text;
  }).join("");
  svg.append(shape("path", { class: "curve", d: path }),
    ...marks.map((mark) => shape("text", { x: x(mark), y: room.height - 18, "text-anchor": mark === total ? "end" : "middle" }, figure(mark))),
    shape("text", { x: room.left + room.width / 2, y: room.height - 4, "text-anchor": "middle" }, "epoch"));
  const ends = known.length ? `from ${figure(known[0][1])} to ${figure(known[known.length - 1][1])}` : "left to the training loop";
  $("rates-caption").textContent = `Learning rate over ${figure(total)} epochs, ${ends}. The shaded stretch is pruning.`;
  $("rates-lead").textContent = `${state.rates.length} ${state.rates.length === 1 ? "schedule" : "schedules"}, ${ends}`;
}
