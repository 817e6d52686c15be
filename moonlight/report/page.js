// ---- Charts of the page
const EXPERTS = "Experts";
const LINES = {
  Loss: [
    { title: "Loss", unit: "nats per token", robust: true, log: true, wide: true, height: 300,
      keys: { training: "loss/train", validation: "loss/validation" } },
    { title: "Validation loss by source", unit: "nats per token", robust: true, log: true, family: "loss/validation/" },
    { title: "Auxiliary loss", unit: "before its coefficient", robust: true, keys: { auxiliary: "loss/aux" } },
    { title: "Spike score", unit: "standard deviations above recent losses", robust: true,
      keys: { score: "loss/spike_score" } },
  ],
  Schedule: [
    { title: "Learning rate", zero: true, keys: { "learning rate": "optim/lr" } },
    { title: "Global batch", unit: "sequences per step", zero: true, keys: { batch: "optim/global_batch_size" } },
    { title: "Router bias update rate", unit: "per step", zero: true,
      keys: { rate: "optim/router_bias_update_rate" } },
  ],
  "Gradients, updates, weights": [
    { title: "Gradient norm", unit: "before clipping", robust: true, log: true, keys: { all: "optim/grad_norm" } },
    { title: "Gradient norm by group", unit: "before clipping", robust: true, log: true, family: "optim/grad_norm/" },
    { title: "Update RMS by group", unit: "before the learning rate", robust: true, log: true,
      family: "optim/update_rms/" },
    { title: "Weight RMS by group", robust: true, log: true, family: "optim/weight_rms/" },
    { title: "SVD entropy by group", unit: "1 = all singular values equal", robust: true,
      family: "optim/svd_entropy/" },
  ],
  Attention: [
    { title: "Largest attention logit", unit: "over all layers and heads", robust: true, log: true,
      keys: { largest: "attention/max_logit" } },
    { title: "Heads clipped by MuonClip", unit: "per step", zero: true, keys: { heads: "attention/clipped_heads" } },
  ],
  [EXPERTS]: [
    { title: "Largest load of an expert", unit: "1 = even load", robust: true, keys: { largest: "moe/max_load" } },
    { title: "Dead experts", unit: "without a token, all layers", zero: true, keys: { dead: "moe/dead_experts" } },
  ],
  "Speed and memory": [
    { title: "Speed", unit: "tokens/s", robust: true, zero: true, keys: { speed: "speed/tokens_per_second" } },
    { title: "Arithmetic", unit: "model TFLOP/s per process", robust: true, zero: true,
      keys: { "TFLOP/s": "speed/model_tflops" } },
    { title: "Model FLOPs utilization", unit: "%", scale: 100, robust: true, zero: true, keys: { MFU: "speed/mfu" } },
    { title: "Step time", unit: "s", robust: true, log: true, keys: { step: "time/step_seconds" } },
    { title: "Other times", unit: "s", log: true, family: "time/", except: "time/step_seconds" },
    { title: "Memory", unit: "GB", scale: 1e-9, zero: true, family: "memory/" },
  ],
};
const LAYER_MAPS = {
  Attention: [["attention/max_logit_by_layer", "Largest attention logit by layer", "", 0]],
  [EXPERTS]: [
    ["moe/max_load_by_layer", "Largest load by layer", "1 = even load", 1],
    ["moe/load_spread_by_layer", "Spread of loads by layer", "standard deviation / mean", 1],
  ],
};
const GROUPS = ["attention_qo", "attention_kv", "experts", "shared_experts", "router", "dense", "embedding", "head",
  "norms"];
const NUM_COLORS = 9;

// Groups of lines of a chart, by name in its selection menu; a single name needs no menu.
function variantsOf(spec) {
  const keys = spec.keys || {};
  if (spec.family) {
    const names = new Set(RUNS.flatMap((run) => Object.keys(run.series)).filter((key) => key.startsWith(spec.family)));
    names.delete(spec.except);
    const order = (key) => (GROUPS.indexOf(key.slice(spec.family.length)) + 100) % 100;
    for (const key of [...names].sort((p, q) => order(p) - order(q) || (p < q ? -1 : 1))) {
      keys[key.slice(spec.family.length)] = key;
    }
  }
  const entries = Object.entries(keys).filter(([, key]) => RUNS.some((run) => key in run.series));
  if (!entries.length) return null;
  const all = (run, list) => list.map(([, key]) => series(run, key)).filter(Boolean);
  const byRun = (list) => RUNS.map((run) => ({ label: run.name, color: run.color, series: all(run, list) }))
    .filter((group) => group.series.length);
  if (SEVERAL && spec.family) return Object.fromEntries(entries.map((entry) => [entry[0], byRun([entry])]));
  if (SEVERAL) return { all: byRun(entries) };
  return { all: entries.map(([label, key], i) => ({ label, color: i % NUM_COLORS, series: [series(RUNS[0], key)] })) };
}

function layerMap(parent, run, [key, title, unit, ofExperts]) {
  const map = run.maps[key];
  if (!map || map.shape.length !== 1) return;
  const values = floats(map.mean), rows = map.shape[0];
  // All runs have one color scale.
  const all = RUNS.flatMap((other) => (other.maps[key] ? Array.from(floats(other.maps[key].mean)) : []));
  const sorted = all.filter(Number.isFinite).sort((p, q) => p - q);
  const scaleOf = [0.01, 0.99].map((share) => sorted[Math.round(share * (sorted.length - 1))]);
  const value = (c, r) => values[c * rows + r];
  new Heat(parent, run, map, {
    title: SEVERAL ? `${title}: ${run.name}` : title, unit, rows, row: "layer", scaleOf, ramp: "rising", bar: true,
    firstRow: ofExperts ? run.firstExpertLayer : 0, height: Math.max(90, Math.min(400, rows * 9)),
    color: (c, r) => {
      const share = (value(c, r) - scaleOf[0]) / (scaleOf[1] - scaleOf[0] || 1);
      return Number.isFinite(value(c, r)) ? ramp("rising")[Math.round(255 * Math.max(0, Math.min(1, share)))] : null;
    },
    text: (c, r) => short(value(c, r)),
  });
}

function expertMaps(parent, run) {
  const map = run.maps["moe/load_by_expert"];
  if (!map || map.shape.length !== 2) return;
  const [layers, experts] = map.shape;
  const codes = bytes(map.codes);
  const load = (code) => 2 ** (((code - 2) / 253) * 6 - 3);
  for (let layer = 0; layer < layers; layer++) {
    const code = (c, r) => codes[(c * layers + layer) * experts + r];
    new Heat(parent, run, map, {
      title: `Layer ${run.firstExpertLayer + layer}`, rows: experts, row: "expert", firstRow: 0,
      height: Math.max(64, Math.min(2 * experts, Math.max(128, experts))), hint: "load of each expert",
      color: (c, r) => {
        const it = code(c, r);
        if (it === 0) return null;
        return it === 1 ? rgb(css("--dead")) : ramp("around")[Math.round(((it - 2) / 253) * 255)];
      },
      text: (c, r) => {
        const it = code(c, r);
        if (it < 2) return it ? "dead" : "not recorded";
        return `load ${it === 2 ? "≤ 0.125" : it === 255 ? "≥ 8" : load(it).toFixed(2)}`;
      },
    });
  }
}

function loadLegend(parent) {
  const legend = make(parent, "p", "loads");
  make(legend, "span", "", "Load relative to the even load:");
  for (const [text, name] of [["1/8", ""], ["", "ramp-around"], ["8", ""], ["", "dead"], ["dead: no token", ""]]) {
    make(legend, text ? "span" : "i", name, text);
  }
  make(legend, "span", "", "The middle of the scale is 1; each column is the mean over its steps.");
}

// ---- The bar above the charts
const place = document.getElementById("charts");
const bar = make(place, "div", "toolbar");
const choice = make(bar, "span", "choice");
const modes = ["steps", "tokens"].map((mode) => button(choice, mode, mode === view.x, () => {
  const from = view.x, run = RUNS[0];
  view.x = mode;
  modes.forEach((other) => other.setAttribute("aria-pressed", other.textContent === mode));
  const ends = mode === "steps" ? [run.tokens, run.steps] : [run.steps, run.tokens];
  // Runs with different batch sizes have no range that is the same in steps and tokens.
  const kept = from !== mode && view.range && !SEVERAL;
  zoom(kept ? view.range.map((at) => convert(...ends, at)) : from === mode ? view.range : null);
}));
choice.hidden = !HAS_TOKENS;
const reset = button(bar, "reset zoom", false, () => zoom(null));
reset.removeAttribute("aria-pressed");
reset.disabled = true;
const shown = make(bar, "span", "shown", "all steps");
const kinds = make(place, "div", "kinds");
for (const [kind, [glyph, label]] of Object.entries(MARKS)) {
  if (!RUNS.some((run) => run.marks[kind].length)) continue;
  const entry = button(kinds, "", true, (b) => {
    view.hidden.has(kind) ? view.hidden.delete(kind) : view.hidden.add(kind);
    b.setAttribute("aria-pressed", !view.hidden.has(kind));
    refresh(panels);
  });
  entry.className = "entry";
  make(entry, "i", `glyph ${kind}`, glyph);
  make(entry, "span", "", label);
}
kinds.before(make(place, "p", "help", "Point at a chart, or tap it, to read values. Drag across it to zoom all " +
  "charts; a double click or double tap resets the zoom. A line shows the mean of each bucket of steps, the band " +
  "the smallest and largest value; zooming does not refine the buckets. Click a legend entry to hide or show it."));

// ---- All charts, each drawn when it comes into view
for (const [title, specs] of Object.entries(LINES)) {
  const charts = specs.map((spec) => [spec, variantsOf(spec)]).filter(([, variants]) => variants);
  const maps = (LAYER_MAPS[title] || []).flatMap((map) => RUNS.map((run) => [run, map]))
    .filter(([run, map]) => run.maps[map[0]]);
  const experts = title === EXPERTS ? RUNS.filter((run) => run.maps["moe/load_by_expert"]) : [];
  if (!charts.length && !maps.length && !experts.length) continue;
  const section = make(place, "section");
  make(section, "h2", "", title);
  const grid = make(section, "div", "grid");
  for (const [spec, variants] of charts) {
    // With several runs, each legend entry is a run and lists the values of its series in order.
    const names = SEVERAL && !spec.family ? Object.keys(spec.keys) : [];
    const unit = names.length > 1 ? `${spec.unit}: ${names.join(" · ")}` : spec.unit;
    const panel = new Lines(grid, { ...spec, unit }, variants);
    if (spec.wide) panel.figure.classList.add("wide");
  }
  for (const [run, map] of maps) layerMap(grid, run, map);
  const narrow = grid.querySelectorAll(".panel:not(.wide)");
  if (narrow.length % 2) narrow[narrow.length - 1].classList.add("wide");
  if (experts.length) {
    make(section, "h3", "", "Load of every expert");
    loadLegend(section);
  }
  experts.forEach((run, i) => {
    if (!SEVERAL) return expertMaps(make(section, "div", "grid small"), run);
    const details = make(section, "details");
    make(details, "summary", "", run.name);
    const inside = make(details, "div", "grid small");
    details.addEventListener("toggle", () => { if (!inside.childElementCount) expertMaps(inside, run); });
    details.open = i === 0;
  });
}

if (!panels.length) {
  make(place, "p", "", "metrics.jsonl has no metrics to plot.");
  root.dataset.drawn = "yes";
}
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  colors = {};
  refresh(panels);
});
window.addEventListener("beforeprint", () => panels.forEach((p) => { if (p.plot.clientWidth) p.paint(); }));
window.addEventListener("keydown", (event) => { if (event.key === "Escape") zoom(null); });
