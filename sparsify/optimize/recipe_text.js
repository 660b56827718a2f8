// The recipe as text, and the learning rate over epochs, from modifiers as sparsify writes them: {type, fields}.
"use strict";

const quoted = (text) => (/^[A-Za-z_][\w.]*$/.test(text) ? text : JSON.stringify(text));
const fraction = (value) => Number(value.toFixed(4));

function yamlValue(value) {
  if (Array.isArray(value)) return `[${value.map(yamlValue).join(", ")}]`;
  if (typeof value === "string") return /^(true|false|null|yes|no|on|off|y|n)$/i.test(value) ? JSON.stringify(value) : quoted(value);
  if (value !== null && typeof value === "object") {
    return `{${Object.entries(value).map(([key, item]) => `${quoted(key)}: ${yamlValue(item)}`).join(", ")}}`;
  }
  // A number with an exponent and no point would be a word to some readers of YAML.
  const text = String(value);
  return typeof value === "number" && /^-?\d+e/.test(text) ? text.replace("e", ".0e") : text;
}

/** `notes` of a modifier stand above it as comments; {params: notes} stand behind the names in a list. */
function yamlModifier({ type, fields, notes = [], behind = {} }) {
  const lines = notes.map((note) => `  # ${oneLine(note)}`);
  lines.push(`  - !${type}`);
  for (const [key, value] of Object.entries(fields)) {
    if (key === "params" && Array.isArray(value)) {
      lines.push("    params:");
      for (const name of value) lines.push(`      - ${yamlValue(name)}${behind[name] ? `  # ${oneLine(behind[name])}` : ""}`);
    } else lines.push(`    ${key}: ${yamlValue(value)}`);
  }
  return lines.join("\n");
}

const oneLine = (text) => text.replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]+/g, " ");

/** One pruning modifier for each distinct sparsity; parameters of `weights` by the layer's name. */
function pruningModifiers(profile, weights, when, evidence) {
  const byShare = new Map();
  for (const choice of profile.layers) {
    const share = fraction(choice.sparsity);
    if (share <= 0 || !Object.hasOwn(weights, choice.name)) continue;
    if (!byShare.has(share)) byShare.set(share, []);
    byShare.get(share).push(choice);
  }
  return [...byShare.keys()].sort((a, b) => a - b).map((share) => {
    const choices = byShare.get(share);
    return {
      type: "GMPruningModifier",
      fields: {
        params: choices.map((choice) => weights[choice.name]),
        init_sparsity: Math.min(when.first, share),
        final_sparsity: share,
        start_epoch: when.start,
        end_epoch: when.end,
        update_frequency: when.frequency,
      },
      behind: Object.fromEntries(choices.map((choice) => [weights[choice.name], evidence(choice)])),
    };
  });
}

function recipeText(header, modifiers) {
  return [...header.map((line) => `# ${oneLine(line)}`), "modifiers:", ...modifiers.map(yamlModifier), ""].join("\n");
}

// ---------------------------------------------------------------- learning rates

const startOf = ({ fields }) => Math.max(0, fields.start_epoch ?? 0);
const endOf = ({ fields }) => (fields.end_epoch === undefined || fields.end_epoch === -1 ? Infinity : fields.end_epoch);
const isSet = ({ type }) => type === "SetLearningRateModifier";

/** The learning rate that one modifier asks for at an epoch from its start on. */
function rateOf(modifier, epoch) {
  const { type, fields } = modifier;
  const start = startOf(modifier);
  const end = endOf(modifier);
  if (isSet(modifier)) return fields.learning_rate;
  if (type === "LearningRateFunctionModifier") {
    const passed = end > start ? Math.min(1, Math.max(0, (epoch - start) / (end - start))) : 1;
    const part = fields.lr_func === "cosine" ? (1 - Math.cos(Math.PI * passed)) / 2 : passed;
    return fields.init_lr + (fields.final_lr - fields.init_lr) * part;
  }
  const whole = Math.floor(Math.max(0, Math.min(epoch, end) - start) + 1e-9);
  const { step_size: size, gamma = 0.1, milestones } = fields.lr_kwargs;
  let times = whole;
  if (fields.lr_class === "StepLR") times = Math.floor(whole / size + 1e-9);
  if (fields.lr_class === "MultiStepLR") times = milestones.filter((epochOf) => epochOf <= start + whole).length;
  return fields.init_lr * gamma ** times;
}

/** The one that started last governs; at one start a schedule before a set value, then the later in the list. */
function learningRate(modifiers, epoch) {
  let governing = null;
  const rank = (one) => [startOf(one), isSet(one) ? 0 : 1];
  for (const one of modifiers) {
    if (startOf(one) > epoch + 1e-9) continue;
    if (governing === null) governing = one;
    else {
      const [a, b] = [rank(governing), rank(one)];
      if (b[0] > a[0] || (b[0] === a[0] && b[1] >= a[1])) governing = one;
    }
  }
  return governing === null ? null : rateOf(governing, epoch);
}
