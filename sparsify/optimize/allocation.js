// The pruning profile in the browser: allocation.py, line by line, so that both give the same numbers to the last bit.
// A test runs the two on random models. Whoever changes one changes the other.
"use strict";

const BALANCES = Array.from({ length: 21 }, (_, number) => number / 20);
const POINTS = 16;
const TOLERANCE = 0.005;

/** The sum without rounding in between, as Python's math.fsum: candidates must compare alike in both languages. */
function fsum(values) {
  const partials = [];
  for (let x of values) {
    let kept = 0;
    for (let y of partials) {
      if (Math.abs(x) < Math.abs(y)) [x, y] = [y, x];
      const high = x + y;
      const low = y - (high - x);
      if (low) partials[kept++] = low;
      x = high;
    }
    partials.length = kept;
    partials.push(x);
  }
  let left = partials.length;
  if (!left) return 0;
  let high = partials[--left];
  let low = 0;
  while (left > 0) {
    const x = high;
    const y = partials[--left];
    high = x + y;
    low = y - (high - x);
    if (low) break;
  }
  // Half-way cases are rounded to even, by the sign of what comes next.
  if (left > 0 && ((low < 0 && partials[left - 1] < 0) || (low > 0 && partials[left - 1] > 0))) {
    const twice = low * 2;
    const rounded = high + twice;
    if (twice === rounded - high) high = rounded;
  }
  return high;
}

/** How many of the growing values lie below `value`, or, with `equal`, not above it. */
function below(values, value, equal) {
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < value || (equal && values[middle] === value)) low = middle + 1;
    else high = middle;
  }
  return low;
}

function at(levels, values, level) {
  const right = below(levels, level, false);
  if (right >= levels.length) return values[values.length - 1];
  if (levels[right] === level || right === 0) return values[right];
  const before = levels[right - 1];
  const after = levels[right];
  return values[right - 1] + (values[right] - values[right - 1]) * ((level - before) / (after - before));
}

function reaches(levels, falling, wanted) {
  for (let number = 0; number < falling.length; number++) {
    const value = falling[number];
    if (value <= wanted) {
      if (number === 0) return levels[0];
      const above = falling[number - 1];
      return levels[number - 1] + (levels[number] - levels[number - 1]) * ((above - wanted) / (above - value));
    }
  }
  return levels[levels.length - 1];
}

function within(levels, rising, allowed) {
  const number = below(rising, allowed, true);
  if (number >= levels.length) return levels[levels.length - 1];
  if (number === 0) return 0;
  const under = rising[number - 1];
  const over = rising[number];
  return levels[number - 1] + (levels[number] - levels[number - 1]) * ((allowed - under) / (over - under));
}

const slope = (one, other) => (other[1] - one[1]) / (other[0] - one[0]);
const sorted = (values) => [...new Set(values)].sort((a, b) => a - b);
const last = (values) => values[values.length - 1];

/** The first of the items with the smallest key; keys are lists, compared in order. */
function smallest(items, key) {
  let found = items[0];
  let best = key(found);
  for (const item of items.slice(1)) {
    const other = key(item);
    const differing = other.findIndex((value, index) => value !== best[index]);
    if (differing >= 0 && other[differing] < best[differing]) [found, best] = [item, other];
  }
  return found;
}

class Layer {
  constructor(curve, levels, losses, times, least, most, fixed, why) {
    Object.assign(this, { curve, levels, losses, times, least, most, fixed, why });
  }

  static of(curve, settings) {
    const { levels } = curve;
    const losses = [];
    const times = [];
    let high = 0;
    let low = curve.ms;
    curve.losses.forEach((loss, index) => {
      losses.push((high = Math.max(high, loss)));
      times.push((low = Math.min(low, curve.times[index])));
    });
    let fixed = Object.hasOwn(settings.overrides, curve.name) ? settings.overrides[curve.name] : null;
    let why = curve.why_not;
    let least = settings.min_sparsity;
    const most = Math.min(settings.max_sparsity, last(levels));
    if (fixed === null && !why) {
      if (curve.first && !settings.first_layer) why = "the first layer";
      else if (curve.grouped && !settings.grouped) why = "a grouped convolution";
    }
    if (!why && settings.min_speedup > 1) {
      const wanted = curve.ms / settings.min_speedup;
      if (curve.ms <= 0 || last(times) > wanted) why = "no share of zeros makes it fast enough";
      else least = Math.max(least, reaches(levels, times, wanted));
    }
    if (!why && least > most) why = "what it may have lies below what it must have";
    if (fixed !== null) why = "set by hand";
    else if (why) fixed = 0;
    return new Layer(curve, levels, losses, times, least, most, fixed, why).thinned();
  }

  thinned() {
    const stride = Math.max(1, Math.ceil(this.levels.length / (POINTS - 3)));
    const strided = this.levels.filter((_, index) => index % stride === 0);
    const end = last(this.levels);
    return this.resampled(sorted([0, Math.min(this.least, end), this.most, end, ...strided]));
  }

  resampled(levels) {
    const losses = levels.map((level) => this.loss(level));
    const times = levels.map((level) => this.time(level));
    return new Layer(this.curve, levels, losses, times, this.least, this.most, this.fixed, this.why);
  }

  limited(best, recovery) {
    if (this.fixed !== null) return this;
    const allowed = best + (1 - recovery) * best;
    if (last(this.losses) <= allowed) return this;
    const most = Math.min(this.most, within(this.levels, this.losses, allowed));
    const made = (cap, fixed, why) =>
      new Layer(this.curve, this.levels, this.losses, this.times, this.least, cap, fixed, why);
    if (most < Math.max(this.least, 1e-9)) return made(0, 0, "its recovery would be too low");
    return made(most, null, this.why).resampled(sorted([...this.levels, most]));
  }

  get counted() {
    return !this.curve.why_not && this.why !== "the first layer" && this.why !== "a grouped convolution";
  }

  get highest() {
    return this.counted ? this.loss(this.most) : 0;
  }

  loss(share) {
    return at(this.levels, this.losses, share);
  }

  time(share) {
    return at(this.levels, this.times, share);
  }
}

function candidates(layers, sparsity, known = []) {
  const counted = layers.filter((layer) => layer.counted);
  const weights = fsum(counted.map((layer) => layer.curve.weights));
  const byHand = fsum(counted.filter((layer) => layer.fixed).map((layer) => layer.curve.weights * layer.fixed));
  const budget = sparsity * weights - byHand;
  const scale = Math.max(fsum(layers.map((layer) => layer.highest)), 1e-300);
  const pace = Math.max(fsum(layers.map((layer) => layer.curve.ms)), 1e-300);
  const found = new Map(known.map((one) => [one.shares.join(), one]));
  for (const balance of BALANCES) {
    const shares = spread(layers, budget, balance / scale, (1 - balance) / pace);
    const key = shares.join();
    if (found.has(key)) continue;
    const loss = fsum(layers.map((layer, index) => layer.loss(shares[index])));
    const time = fsum(layers.map((layer, index) => layer.time(shares[index])));
    found.set(key, { shares, loss, time });
  }
  const all = [...found.values()];
  if (weights === 0) return all;
  const missed = all.map((one) => Math.abs(average(layers, one.shares) - sparsity));
  const nearest = Math.max(Math.min(...missed), TOLERANCE / 2) + 1e-12;
  return all.filter((_, index) => missed[index] <= nearest);
}

function average(layers, shares) {
  const counted = layers.map((layer, index) => [layer, shares[index]]).filter(([layer]) => layer.counted);
  const weights = fsum(counted.map(([layer]) => layer.curve.weights));
  return weights ? fsum(counted.map(([layer, share]) => layer.curve.weights * share)) / weights : 0;
}

function spread(layers, budget, onLoss, onTime) {
  const shares = layers.map((layer) => layer.fixed || 0);
  const steps = [];
  layers.forEach((layer, index) => {
    if (layer.fixed === null) steps.push(...stepsOf(index, layer, onLoss, onTime));
  });
  steps.sort((a, b) => a[0] - b[0] || a[1] - b[1] || a[2] - b[2] || a[3] - b[3]);
  let left = budget;
  let skipped = null;
  for (const [, index, , to] of steps) {
    const size = layers[index].curve.weights;
    if (left <= 1e-9 || skipped === index || !size) continue;
    const more = (to - shares[index]) * size;
    if (more <= left) {
      shares[index] = to;
      left -= more;
      continue;
    }
    const share = shares[index] + left / size;
    if (share >= layers[index].least) {
      shares[index] = share;
      left = 0;
    } else if (skipped === null) skipped = index;
  }
  if (left > 1e-9 && skipped !== null) makeRoom(layers, shares, skipped, left, steps);
  return shares;
}

function makeRoom(layers, shares, index, left, steps) {
  const layer = layers[index];
  let tooMuch = layer.least * layer.curve.weights - left;
  const spare = new Map();
  for (const [, other] of [...steps].reverse()) {
    if (other !== index && shares[other] > layers[other].least) spare.set(other, Math.max(layers[other].least, 0));
  }
  const room = fsum([...spare].map(([other, least]) => (shares[other] - least) * layers[other].curve.weights));
  if (room < tooMuch && tooMuch - room > left) return;
  shares[index] = layer.least;
  for (const [other, least] of spare) {
    const give = Math.min((shares[other] - least) * layers[other].curve.weights, tooMuch);
    shares[other] -= give / layers[other].curve.weights;
    tooMuch -= give;
    if (tooMuch <= 0) return;
  }
}

function stepsOf(index, layer, onLoss, onTime) {
  const hull = [];
  layer.levels.forEach((level, number) => {
    if (level !== 0 && !(layer.least <= level && level <= layer.most)) return;
    const point = [level, onLoss * layer.losses[number] + onTime * layer.times[number]];
    while (hull.length > 1 && slope(hull[hull.length - 2], last(hull)) >= slope(last(hull), point)) hull.pop();
    hull.push(point);
  });
  const size = Math.max(layer.curve.weights, 1);
  return hull.slice(1).map((point, n) => [slope(hull[n], point) / size, index, hull[n][0], point[0]]);
}

function speedup(before, after) {
  return before > 0 ? before / Math.max(after, 1e-9 * before) : 1;
}

function recoveryOf(loss, best) {
  if (best <= 0) return loss <= 0 ? 1 : 0;
  return Math.max(0, 2 - loss / best);
}

function notesOf(layers, settings, met) {
  if (!fsum(layers.filter((layer) => layer.counted).map((layer) => layer.curve.weights))) return ["no layer may be pruned."];
  if (Math.abs(met - settings.sparsity) <= TOLERANCE) return [];
  const byHand = layers.filter((layer) => layer.why === "set by hand").length;
  let cause = "caps and filters leave no more";
  if (met > settings.sparsity) {
    cause = byHand ? "what is set by hand is more than that" : "no layer may have less than its least share";
  } else if (byHand) cause = `caps, filters and ${byHand} overrides leave no more`;
  const text = (value) => `${(100 * value).toFixed(1)}%`;
  return [`the average is ${text(met)}, not the ${text(settings.sparsity)} that was asked for: ${cause}.`];
}

/** What `pruning_profile` of allocation.py gives, with the same names. */
function pruningProfile(curves, settings) {
  const free = curves.map((curve) => Layer.of(curve, { ...settings, overrides: {} }));
  const least = (spreads) => smallest(spreads, (one) => [one.loss, one.time]);
  const ideal = least(candidates(free, settings.sparsity));
  let layers = curves.map((curve) => Layer.of(curve, settings));
  if (settings.min_recovery > 0) {
    layers = layers.map((layer, n) => layer.limited(layer.loss(ideal.shares[n]), settings.min_recovery));
  }
  const byHand = Object.keys(settings.overrides).length;
  const spreads = candidates(layers, settings.sparsity, byHand ? [] : [ideal]);
  const reached = Math.max(...spreads.map((one) => average(layers, one.shares)));
  const fewer = reached < average(free, ideal.shares) - TOLERANCE;
  const reference = fewer ? least(candidates(free, reached)) : ideal;
  const losses = Math.max(fsum(layers.map((layer) => layer.highest)), 1e-300);
  const times = Math.max(fsum(layers.map((layer) => layer.curve.ms)), 1e-300);
  const { balance } = settings;
  const chosen = smallest(spreads, (one) => [
    (balance * one.loss) / losses + ((1 - balance) * one.time) / times,
    balance < 1 ? one.loss : one.time,
  ]);
  const choices = layers.map((layer, index) => {
    const { curve } = layer;
    const share = chosen.shares[index];
    const ms = layer.time(share);
    return {
      name: curve.name,
      sparsity: share,
      overridden: Object.hasOwn(settings.overrides, curve.name),
      why: layer.why || (share === 0 ? "its share went to the others" : ""),
      ms,
      speedup: speedup(curve.ms, ms),
      recovery: recoveryOf(layer.loss(share), layer.loss(ideal.shares[index])),
      macs: curve.macs * (1 - share),
      parameters: curve.parameters - curve.weights * share,
    };
  });
  const before = fsum(layers.map((layer) => layer.curve.ms));
  const met = average(layers, chosen.shares);
  return {
    layers: choices,
    sparsity: met,
    recovery: Math.min(1, recoveryOf(chosen.loss, reference.loss)),
    loss: chosen.loss,
    speedup: speedup(before, chosen.time),
    ms_before: before,
    ms_after: chosen.time,
    macs_before: fsum(layers.map((layer) => layer.curve.macs)),
    macs_after: fsum(choices.map((choice) => choice.macs)),
    parameters_before: fsum(layers.map((layer) => layer.curve.parameters)),
    parameters_after: fsum(choices.map((choice) => choice.parameters)),
    notes: notesOf(layers, settings, met),
  };
}
