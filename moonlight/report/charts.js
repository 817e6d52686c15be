// ---- Lines over time. A group is one entry of the legend: a color and one or two series.
class Lines extends Panel {
  constructor(parent, spec, variants) {
    super(parent, spec.title, spec.unit, spec.height || 210);
    Object.assign(this, { spec, variants, variant: Object.keys(variants)[0], log: false, all: false, off: new Set() });
    if (Object.keys(variants).length > 1) {
      const select = make(this.controls, "select");
      select.setAttribute("aria-label", `what ${spec.title} shows`);
      for (const name of Object.keys(variants)) make(select, "option", "", name);
      select.addEventListener("change", () => { this.variant = select.value; this.build(); refresh([this]); });
    }
    if (spec.log) button(this.controls, "log", false, (b) => {
      this.log = !this.log;
      b.setAttribute("aria-pressed", this.log);
      refresh([this]);
    });
    this.allButton = button(this.controls, "show all", false, (b) => {
      this.all = !this.all;
      b.setAttribute("aria-pressed", this.all);
      refresh([this]);
    });
    this.note = make(this.figure, "p", "note", "The y axis leaves out the first 2% of the steps and outliers.");
    this.build();
  }
  get groups() { return this.variants[this.variant]; }
  build() {
    this.legend.replaceChildren();
    this.at = make(this.legend, "span", "where");
    for (const group of this.groups) {
      const entry = button(this.legend, "", !this.off.has(group.label), (b) => {
        this.off.has(group.label) ? this.off.delete(group.label) : this.off.add(group.label);
        b.setAttribute("aria-pressed", !this.off.has(group.label));
        refresh([this]);
      });
      entry.className = "entry";
      make(entry, "i", `swatch c${group.color}`);
      make(entry, "span", "", group.label);
      group.value = make(entry, "b");
    }
  }
  get shown() { return this.groups.filter((g) => !this.off.has(g.label)).flatMap((g) => g.series.map((s) => [g, s])); }
  scale(value) { return value * (this.spec.scale || 1); }
  range() {
    const [a, b] = domain();
    const skip = view.range || this.all ? a : a + 0.02 * (b - a);
    let lows = [], highs = [];
    const means = [];
    this.outside = false;
    for (const [, s] of this.shown) {
      const x = xs(s);
      for (let i = 0; i < x.length; i++) {
        if (x[i] < a || x[i] > b || !Number.isFinite(s.mean[i]) || (this.log && s.low[i] <= 0)) continue;
        lows.push(s.low[i]);
        highs.push(s.high[i]);
        if (x[i] >= skip) means.push([s.low[i], s.high[i], s.mean[i]]);
      }
    }
    if (!lows.length) return null;
    let low = lows.reduce((m, v) => Math.min(m, v)), high = highs.reduce((m, v) => Math.max(m, v));
    if (this.spec.robust && !view.range && means.length > 20) {
      const pick = (list, share) => list.sort((p, q) => p - q)[Math.round(share * (list.length - 1))];
      const near = [Math.min(pick(means.map((m) => m[0]), 0.02), pick(means.map((m) => m[2]), 0)),
        Math.max(pick(means.map((m) => m[1]), 0.98), pick(means.map((m) => m[2]), 0.99))];
      const room = 0.3 * (near[1] - near[0] || Math.abs(near[1]) || 1); // tolerate values slightly outside
      this.outside = low < near[0] - room || high > near[1] + room;
      if (this.outside && !this.all) [low, high] = [Math.max(low, near[0]), Math.min(high, near[1])];
    }
    [low, high] = [this.scale(low), this.scale(high)];
    if (this.log) return [Math.log10(low) - 0.03, Math.log10(high) + 0.03];
    if (this.spec.zero) [low, high] = [Math.min(0, low), high || 1];
    const room = 0.07 * (high - low || Math.abs(high) || 1);
    return [this.spec.zero && low === 0 ? 0 : low - room, high + room];
  }
  draw(ctx) {
    const range = this.range();
    this.allButton.hidden = !this.outside;
    this.note.hidden = !this.outside || this.all;
    const bottom = this.height - this.bottom, right = this.width - this.right;
    const [low, high] = range || [0, 1];
    const py = (v) => bottom - (((this.log ? Math.log10(v) : v) - low) / (high - low)) * (bottom - this.top);
    ctx.textAlign = "right";
    for (const [at, text] of this.log ? logTicks(low, high) : ticks(low, high, 6)) {
      const y = bottom - ((at - low) / (high - low)) * (bottom - this.top);
      ctx.strokeStyle = css("--grid");
      line(ctx, this.left, y, right, y);
      ctx.fillStyle = css("--muted");
      ctx.fillText(text, this.left - 6, y);
    }
    ctx.strokeStyle = css("--axis");
    line(ctx, this.left, bottom, right, bottom);
    ctx.save();
    ctx.beginPath();
    ctx.rect(this.left, this.top, right - this.left, bottom - this.top);
    ctx.clip();
    const those = this.shown;
    for (const [group, s] of those) this.curve(ctx, group, s, py, those.length > 3 ? 0.1 : 0.22);
    ctx.restore();
    this.marks(ctx);
  }
  curve(ctx, group, s, py, bandAlpha) {
    const x = xs(s), parts = [[]];
    const [a, b] = domain();
    for (let i = 0; i < x.length; i++) {
      if ((x[i + 1] < a) || (x[i - 1] > b)) continue;
      const usable = Number.isFinite(s.mean[i]) && !(this.log && this.scale(s.low[i]) <= 0);
      const far = i > 0 && s.steps[i] - s.steps[i - 1] > s.gap && !s.points;
      if ((!usable || far) && parts[parts.length - 1].length) parts.push([]);
      if (usable) parts[parts.length - 1].push([this.px(x[i]), py(this.scale(s.mean[i])), i]);
    }
    ctx.strokeStyle = ctx.fillStyle = css(`--c${group.color}`);
    ctx.lineWidth = 1.4;
    ctx.setLineDash(DASHES[group.color] || []);
    const many = parts.reduce((sum, part) => sum + part.length, 0);
    for (const part of parts) {
      if (!part.length) continue;
      if (s.band) {
        ctx.globalAlpha = bandAlpha;
        ctx.beginPath();
        for (const [px, , i] of part) ctx.lineTo(px, py(this.scale(s.high[i])));
        for (const [px, , i] of part.slice().reverse()) ctx.lineTo(px, py(this.scale(s.low[i])));
        ctx.fill();
        ctx.globalAlpha = 1;
      }
      ctx.beginPath();
      for (const [px, y] of part) ctx.lineTo(px, y);
      ctx.globalAlpha = s.points && group.series.length > 1 ? 0.5 : 1;
      ctx.stroke();
      ctx.globalAlpha = 1;
      if (part.length === 1 || (s.points && many < this.width / 8)) for (const [px, y] of part) {
        ctx.beginPath();
        ctx.arc(px, y, 2.4, 0, 7);
        ctx.fill();
      }
    }
    ctx.setLineDash([]);
    ctx.lineWidth = 1;
  }
  values(pick, newest = false) {
    for (const group of this.groups) {
      const found = group.series.map((s) => {
        const i = pick(s);
        return i === null ? "–" : short(this.scale(newest && s.newest !== undefined ? s.newest : s.mean[i]));
      });
      group.value.textContent = found.join(" · ");
    }
  }
  read(x) {
    const several = view.x === "steps" ? `step ${whole(x)}` : `${short(x)} tokens`;
    this.at.textContent = SEVERAL ? several : this.where(RUNS[0], x);
    this.values((s) => {
      const i = nearest(xs(s), x), at = convertBack(s.run, x);
      return Math.abs(s.steps[i] - at) > Math.max(s.gap, 2 * s.run.width) ? null : i;
    });
  }
  rest() {
    if (view.range) { // the end of the visible range
      this.read(view.range[1]);
      return;
    }
    this.at.textContent = "last values";
    this.values((s) => (s.mean.length ? s.mean.length - 1 : null), true);
  }
}
const convertBack = (run, x) => (view.x === "steps" ? x : convert(run.tokens, run.steps, x));

// ---- Heat maps: one column for each bucket of steps, one row for each layer or expert
class Heat extends Panel {
  constructor(parent, run, map, options) {
    const { height, ...rest } = options;
    super(parent, options.title, options.unit, height + 34);
    Object.assign(this, { run, map, ...rest });
    this.at = make(this.legend, "span", "where");
    const starts = map.at.map((i) => map.first + i * map.width);
    const gaps = starts.slice(1).map((s, i) => s - starts[i]).sort((p, q) => p - q);
    const usual = Math.max(map.width, gaps[gaps.length >> 1] || map.width);
    // A column spans its steps and half of the gap to each neighbor, unless the neighbor is far away.
    const reach = Math.max(0.75 * usual, 0.5 * usual + map.width), middle = (map.width - 1) / 2;
    const at = starts.map((s) => s + middle);
    this.steps = starts;
    this.starts = at.map((s, i) => Math.max(s - reach, i ? (at[i - 1] + s) / 2 : -Infinity));
    this.ends = at.map((s, i) => Math.min(s + reach, i + 1 < at.length ? (s + at[i + 1]) / 2 : run.last));
    if (this.bar) this.colorBar();
  }
  colorBar() {
    const bar = make(this.legend, "span", "bar");
    make(bar, "span", "", short(this.scaleOf[0], 3));
    make(bar, "i", `ramp-${this.ramp}`);
    make(bar, "span", "", short(this.scaleOf[1], 3));
  }
  image() {
    if (this.cached && this.cachedColors === colors) return this.cached;
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.starts.length, this.rows];
    const ctx = canvas.getContext("2d"), image = ctx.createImageData(canvas.width, canvas.height);
    for (let c = 0; c < canvas.width; c++) for (let r = 0; r < this.rows; r++) {
      const color = this.color(c, r), at = 4 * (r * canvas.width + c);
      if (color) image.data.set([...color, 255], at);
    }
    ctx.putImageData(image, 0, 0);
    [this.cached, this.cachedColors] = [canvas, colors];
    return canvas;
  }
  draw(ctx) {
    const image = this.image(), inner = this.height - this.top - this.bottom;
    const [a, b] = domain();
    ctx.imageSmoothingEnabled = false;
    for (let c = 0; c < this.starts.length; c++) {
      const x0 = toX(this.run, this.starts[c]), x1 = toX(this.run, this.ends[c]);
      if (x1 < a || x0 > b) continue;
      const from = Math.round(2 * Math.max(this.left, this.px(x0))) / 2;
      const to = Math.round(2 * Math.min(this.width - this.right, this.px(x1))) / 2;
      if (to > from) ctx.drawImage(image, c, 0, 1, this.rows, from, this.top, to - from, inner);
    }
    ctx.strokeStyle = css("--axis");
    ctx.strokeRect(this.left - 0.5, this.top - 0.5, this.width - this.left - this.right + 1, inner + 1);
    ctx.fillStyle = css("--muted");
    ctx.textAlign = "right";
    const every = Math.ceil((this.rows * 14) / inner);
    const step = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100].find((s) => s >= every) || every;
    for (let r = 0; r < this.rows; r += step) {
      ctx.fillText(String(this.firstRow + r), this.left - 5, this.top + ((r + 0.5) * inner) / this.rows);
    }
    this.marks(ctx, this.top - 6);
  }
  read(x, py) {
    const at = convertBack(this.run, x);
    let c = this.starts.findIndex((s, i) => at >= s && at < this.ends[i]);
    if (c < 0) c = nearest(this.steps, at);
    const inner = this.height - this.top - this.bottom;
    const r = Math.max(0, Math.min(this.rows - 1, Math.floor(((py - this.top) / inner) * this.rows)));
    const first = this.steps[c], last = Math.min(first + this.map.width - 1, this.run.last);
    const steps = first === last ? `step ${whole(first)}` : `steps ${whole(first)}–${whole(last)}`;
    this.at.textContent = `${this.row} ${this.firstRow + r} · ${steps} · ${this.text(c, r)}`;
  }
  rest() { this.at.textContent = this.hint || ""; }
}
