// ---- Panel: title, readout, canvas with axes, crosshair, drag to zoom
class Panel {
  constructor(parent, title, unit, height) {
    this.figure = make(parent, "figure", "panel");
    const head = make(this.figure, "figcaption");
    make(head, "h3", "", title);
    if (unit) make(head, "span", "unit", unit);
    this.controls = make(head, "span", "controls");
    this.legend = make(this.figure, "div", "legend");
    this.plot = make(this.figure, "div", "plot");
    this.plot.style.height = `${height}px`;
    this.canvas = make(this.plot, "canvas");
    this.canvas.setAttribute("role", "img");
    this.cross = make(this.plot, "div", "cross");
    this.sweep = make(this.plot, "div", "sweep");
    Object.assign(this, { title, height, visible: false, dirty: true, left: 50, right: 10, top: 12, bottom: 22 });
    this.listen();
    panels.push(this);
    watcher.observe(this.plot);
    sizes.observe(this.plot);
  }
  px(x) { const [a, b] = domain(); return this.left + ((x - a) / (b - a)) * (this.width - this.left - this.right); }
  x(px) { const [a, b] = domain(); return a + ((px - this.left) / (this.width - this.left - this.right)) * (b - a); }
  paint() {
    this.width = this.plot.clientWidth;
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    const ctx = this.canvas.getContext("2d");
    ctx.scale(ratio, ratio);
    ctx.font = `11px ${css("--font")}`;
    ctx.lineJoin = "round";
    const [a, b] = domain();
    ctx.fillStyle = css("--muted");
    ctx.textBaseline = "middle";
    const found = ticks(a, b, Math.max(2, Math.floor(this.width / 75)));
    found.forEach(([value, text]) => {
      const px = this.px(value), half = ctx.measureText(text).width / 2;
      ctx.textAlign = px + half > this.width ? "right" : "center";
      ctx.fillText(text, Math.min(px, this.width), this.height - 8);
    });
    ctx.textAlign = "right";
    ctx.fillText(view.x, this.left - 6, this.height - 8);
    this.canvas.setAttribute("aria-label", `${this.title}, ${view.x} ${whole(a)} to ${whole(b)}`);
    this.draw(ctx);
    if (!this.pointed) this.rest();
  }
  listen() {
    let start = null;
    const at = (event) => event.clientX - this.plot.getBoundingClientRect().left;
    const inside = (px) => Math.max(this.left, Math.min(this.width - this.right, px));
    const y = (event) => event.clientY - this.plot.getBoundingClientRect().top;
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button === 0 && this.width) start = inside(at(event));
      this.point(inside(at(event)), y(event));
    });
    this.plot.addEventListener("pointermove", (event) => {
      const px = inside(at(event));
      if (!event.buttons) start = null; // released outside of the chart
      if (start !== null && Math.abs(px - start) > 6) {
        if (!this.sweeping) this.plot.setPointerCapture(event.pointerId);
        this.sweeping = true;
        this.sweep.style.cssText = `display:block;left:${Math.min(px, start)}px;width:${Math.abs(px - start)}px`;
      }
      this.point(px, y(event));
    });
    const end = (event, zooms) => {
      const px = inside(at(event));
      const sweeping = this.sweeping;
      this.sweep.style.display = "none";
      this.sweeping = false;
      const ends = [this.x(Math.min(px, start)), this.x(Math.max(px, start))];
      if (zooms && sweeping && Math.abs(px - start) > 6) zoom(ends);
      start = null;
    };
    this.plot.addEventListener("pointerup", (event) => end(event, true));
    this.plot.addEventListener("pointercancel", (event) => end(event, false)); // the page scrolls
    this.plot.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") unpoint(); });
    this.plot.addEventListener("dblclick", () => zoom(null));
  }
  point(px, py) {
    if (!this.width) return;
    const x = this.x(px);
    for (const other of panels) {
      other.pointed = other.visible && other.width > 0;
      if (!other.pointed) continue;
      other.cross.style.cssText = `display:block;left:${other.px(x)}px`;
      if (other === this || other instanceof Lines) other.read(x, py); else other.rest();
    }
  }
  where(run, x) { // text for the bucket of a run under the crosshair
    const i = nearest(view.x === "steps" ? run.steps : run.tokens, x);
    const first = run.first + run.filled[i] * run.width, last = Math.min(first + run.width - 1, run.last);
    const tokens = run.tokens ? ` · ${short(run.tokens[i])} tokens` : "";
    return (first === last ? `step ${whole(first)}` : `steps ${whole(first)}–${whole(last)}`) + tokens;
  }
  marks(ctx, strip = null) { // in a separate strip if they would cover the data
    const bottom = this.height - this.bottom;
    const [a, b] = domain();
    for (const run of this.run ? [this.run] : RUNS) {
      for (const [kind, [glyph]] of Object.entries(MARKS)) {
        if (view.hidden.has(kind)) continue;
        const own = kind === "stage" || kind === "restart" ? "--muted" : "--alarm";
        ctx.fillStyle = ctx.strokeStyle = css(SEVERAL && !this.run ? `--c${run.color}` : own);
        ctx.textAlign = "center";
        const above = kind === "spike" || kind === "rollback";
        run.marks[kind].forEach((mark, i, all) => {
          const x = toX(run, kind === "stage" ? mark[0] : mark), px = this.px(x);
          const next = kind === "stage" && i + 1 < all.length ? toX(run, all[i + 1][0]) : b;
          if (kind === "stage") this.stage(ctx, mark[1], x, next, strip);
          else if (x >= a && x <= b) ctx.fillText(glyph, px, strip ?? (above ? this.top + 6 : bottom - 6));
        });
      }
    }
  }
  stage(ctx, name, x, next, strip) { // a line at its start, and its name if it fits above the stage
    const [a, b] = domain(), bottom = this.height - this.bottom;
    if (x > b || next < a) return;
    const from = Math.max(this.left, this.px(x)), to = Math.min(this.width - this.right, this.px(next));
    if (x >= a) {
      ctx.setLineDash([2, 3]);
      line(ctx, from, this.top, from, bottom);
      ctx.setLineDash([]);
    }
    if (strip === null && !SEVERAL && ctx.measureText(name).width + 6 < to - from) {
      ctx.textAlign = "left";
      ctx.fillText(name, from + 3, this.top - 5);
      ctx.textAlign = "center";
    }
  }
}
function unpoint() {
  for (const p of panels) {
    p.pointed = false;
    p.cross.style.display = "none";
    p.rest();
  }
}
function line(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}

// ---- Zooming and drawing
let seenOnce = false;
const watcher = new IntersectionObserver((seen) => {
  seenOnce = true;
  for (const entry of seen) for (const p of panels) if (p.plot === entry.target) p.visible = entry.isIntersecting;
  schedule();
}, { rootMargin: "150px" });
const sizes = new ResizeObserver((changed) => {
  const targets = new Set(changed.map((entry) => entry.target));
  refresh(panels.filter((p) => targets.has(p.plot) && p.width !== p.plot.clientWidth));
});
let waiting = false;
function schedule() {
  if (!waiting) requestAnimationFrame(() => {
    waiting = false;
    const due = panels.filter((p) => p.dirty && p.visible && p.plot.clientWidth);
    for (const p of due) { p.dirty = false; p.paint(); }
    if (seenOnce) root.dataset.drawn = "yes"; // everything in view is drawn
  });
  waiting = true;
}
function refresh(which) { for (const p of which) p.dirty = true; schedule(); }
function zoom(range) {
  if (range && range[1] - range[0] < 1) return;
  view.range = range;
  unpoint();
  reset.disabled = !range;
  const text = view.x === "steps" ? whole : short;
  shown.textContent = range ? `${view.x} ${text(range[0])}–${text(range[1])}` : `all ${view.x}`;
  refresh(panels);
}
