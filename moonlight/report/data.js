"use strict";
// Data of the page, and number formats. The files data, panel, charts and page form one script, in this order.

const RUNS = JSON.parse(document.getElementById("data").textContent).runs;
const SEVERAL = RUNS.length > 1;
const root = document.documentElement;
const view = { x: "steps", range: null, hidden: new Set() }; // shared by all charts; hidden: kinds of marks
const panels = [];
const MARKS = { stage: ["┊", "stage starts"], restart: ["▲", "restart"], spike: ["◆", "loss spike"],
  rollback: ["◄", "rolled back"], skipped: ["×", "skipped step"] };
const DASHES = [[], [], [], [], [], [6, 3], [6, 3], [2, 3], [2, 3]];

// ---- The data: bytes in base64, decoded when a chart first needs them
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const floats = (text) => text && new Float32Array(bytes(text).buffer);
const doubles = (text) => text && new Float64Array(bytes(text).buffer);
for (const run of RUNS) {
  run.steps = doubles(run.steps);
  run.tokens = doubles(run.tokens);
  run.filled = run.filled || Array.from(run.steps.keys());
  run.bucket = new Map(run.filled.map((at, i) => [at, i])); // bucket -> index in run.steps
  run.decoded = {};
}
const HAS_TOKENS = RUNS.length > 0 && RUNS.every((run) => run.tokens);

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= value) low = middle; else high = middle;
  }
  return Math.abs(sorted[high] - value) < Math.abs(sorted[low] - value) ? high : low;
}
// Convert steps to tokens, or back, by linear interpolation between the bucket means.
function convert(from, to, value) {
  if (from.length < 2) return to[0];
  let i = nearest(from, value);
  if ((from[i] > value && i > 0) || i === from.length - 1) i -= 1;
  return to[i] + (to[i + 1] - to[i]) * (value - from[i]) / (from[i + 1] - from[i]);
}
const toX = (run, step) => (view.x === "steps" ? step : convert(run.steps, run.tokens, step));

function series(run, key) {
  if (!(key in run.series)) return null;
  if (!run.decoded[key]) {
    const raw = run.series[key];
    const at = raw.at || Array.from({ length: run.size }, (_, i) => i);
    const steps = raw.points || at.map((i) => run.steps[run.bucket.get(i)]);
    const tokens = run.tokens && Array.from(steps, (step) => convert(run.steps, run.tokens, step));
    const gaps = Array.from(steps.slice(1), (step, i) => step - steps[i]).sort((a, b) => a - b);
    const mean = floats(raw.mean);
    run.decoded[key] = { run, steps, tokens, mean, low: floats(raw.low) || mean, high: floats(raw.high) || mean,
      newest: raw.newest, band: Boolean(raw.low), points: Boolean(raw.points), buckets: raw.points ? null : at,
      gap: 3 * (gaps[gaps.length >> 1] || 1) };
  }
  return run.decoded[key];
}
const xs = (s) => (view.x === "steps" ? s.steps : s.tokens);
function everything() {
  const ends = RUNS.flatMap((run) => [toX(run, run.first), toX(run, run.last)]);
  const [from, to] = [Math.min(...ends), Math.max(...ends)];
  return to > from ? [from, to] : [from - 1, to + 1];
}
const domain = () => view.range || everything();

// ---- Numbers as text
const UNITS = [[1e15, "P"], [1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"], [1, ""]];
function short(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3) return value.toExponential(2).replace("e-", "e−");
  const [unit, letter] = UNITS.find(([least]) => size >= least * 0.99995) || [1, ""];
  return String(Number((value / unit).toPrecision(digits))).replace("-", "−") + letter;
}
const whole = (value) => Math.round(value).toLocaleString("en-US");
function ticks(low, high, most) {
  const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  const largest = Math.max(Math.abs(low), Math.abs(high));
  if (largest >= 1e3) return found.map((v) => [v, short(v, 6)]);
  let [unit, letter] = [1, ""];
  if (largest < 1e-2) {
    const exponent = Math.floor(Math.log10(largest));
    [unit, letter] = [10 ** exponent, `e−${-exponent}`];
  }
  const digits = Math.max(0, Math.min(8, -Math.floor(Math.log10(step / unit) + 1e-9)));
  return found.map((v) => [v, v === 0 ? "0" : (v / unit).toFixed(digits).replace("-", "−") + letter]);
}
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(low); power <= high; power++) {
    for (const factor of high - low > 3 ? [1] : [1, 2, 5]) {
      const value = factor * 10 ** power, at = Math.log10(value);
      if (at >= low && at <= high) found.push([at, short(value, 3)]);
    }
  }
  if (found.length > 2) return found;
  return ticks(10 ** low, 10 ** high, 4).filter(([v]) => v > 0).map(([v, text]) => [Math.log10(v), text]);
}

// ---- Small helpers for elements and colors
function make(parent, tag, name = "", text = "") {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text) element.textContent = text;
  parent.append(element);
  return element;
}
function button(parent, text, pressed, press) {
  const element = make(parent, "button", "small", text);
  element.type = "button";
  element.setAttribute("aria-pressed", pressed);
  element.addEventListener("click", () => press(element));
  return element;
}
let colors = {};
function css(name) {
  return (colors[name] = colors[name] || getComputedStyle(root).getPropertyValue(name).trim());
}
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
function ramp(kind) { // 256 colors interpolated between the stops in the style sheet
  const name = `ramp ${kind}`;
  if (!colors[name]) {
    const stops = css(`--${kind}`).split(/,\s*/).map(rgb);
    colors[name] = Array.from({ length: 256 }, (_, i) => {
      const at = (i / 255) * (stops.length - 1), left = Math.min(Math.floor(at), stops.length - 2);
      return stops[left].map((v, c) => Math.round(v + (stops[left + 1][c] - v) * (at - left)));
    });
  }
  return colors[name];
}
