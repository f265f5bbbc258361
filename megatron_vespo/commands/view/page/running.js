// The chart of log W as it grows token by token, its parts, phi(W) at that point, and phi's landmarks.

import uPlot from "./vendor/uPlot.esm.js";
import { el, number } from "./dom.js";
import { cssColor, signed } from "./links.js";

const HEIGHT = 260;
const BLUE = "#0072b2", ORANGE = "#e69f00", GREEN = "#009e73", PURPLE = "#cc79a7";

// Sums of a list, as long as it.
export function sums(values) {
  let sum = 0;
  return values.map((value) => (sum += value ?? 0));
}

// Phi's landmarks as [log W, label] lines.
export function landmarks({ thresholds: t }) {
  const lines = [[t.dead[0], "φ dead below"], [t.half[0], "φ ½ of peak"], [t.peak, "φ peak"], [t.half[1], "φ ½ of peak"], [t.dead[1], "φ dead above"]];
  return lines.filter(([at]) => at !== null);
}

export function landmarkText({ running, advantage, advantages_per_token: perToken }) {
  const { c1, c2, thresholds: t } = running;
  const sign = `${perToken ? "mean " : ""}${(advantage ?? 0) >= 0 ? "A ≥ 0" : "A < 0"}`;
  const parts = [`${sign}: (c1, c2) = (${number(c1)}, ${number(c2)})`];
  if (t.peak !== null) {
    parts.push(`φ peaks at ${number(t.phi_peak)} where W = c1/c2 = ${number(c1 / c2)} (log W = ${signed(t.peak, 3)})`);
    parts.push(`φ is half of its peak at log W = ${signed(t.half[0], 3)} and ${signed(t.half[1], 3)}`);
  }
  const dead = t.dead.map((at, i) => (at === null ? null : `${i ? "above" : "below"} ${signed(at, 3)}`)).filter(Boolean);
  if (dead.length) parts.push(`dead (φ < 0.01) ${dead.join(" and ")}`);
  const other = running.loss && !running.loss.startsWith("vespo") ? `The loss ${running.loss} has no φ; this is the one of VESPO. ` : "";
  const own = perToken ? "Tokens have their own A: φ of each goes by its own sign, the landmarks by the mean's. " : "";
  return `${other}${own}${parts.join("; ")}. From log φ = c1 log W + c2 (1 − W), algorithms/vespo.py.`;
}

// `onPoint(n)` gets the index among the sampled tokens under the cursor, `onPick(n)` that of a click.
export class RunningChart {
  constructor(detail, onPoint, onPick) {
    this.detail = detail;
    this.waiting = -1; // what to show when the plot is ready
    this.element = el("div", { class: "running" });
    this.points = { onPoint, onPick };
    this.plot = null;
    this.lines = landmarks(detail.running);
  }

  // Call when `element` is in the page: its width counts.
  draw() {
    const { detail } = this;
    const x = Float64Array.from(detail.total, (_, i) => i + 1);
    const text = cssColor("--text"), grid = { stroke: cssColor("--grid"), width: 1 };
    const axis = (extra) => ({ stroke: text, grid, ticks: grid, size: 52, font: "11px system-ui", ...extra });
    const series = [{ label: "token" }];
    const data = [x];
    const add = (label, values, stroke, width, extra = {}) => {
      if (!values) return;
      series.push({ label, stroke, width, points: { show: false }, value: (_, v) => (v === null ? "–" : signed(v)), ...extra });
      data.push(values);
    };
    add("log W", detail.running.log_w, text, 2);
    add("Σ log(π/μ)", sums(detail.total), PURPLE, 1);
    add("Σ staleness", detail.staleness_per_token && sums(detail.staleness_per_token), ORANGE, 1);
    add("Σ mismatch", detail.mismatch_per_token && sums(detail.mismatch_per_token), BLUE, 1);
    add("φ(W)", detail.running.phi, GREEN, 1.5, { scale: "phi", value: (_, v) => number(v) });
    const options = {
      width: this.width(), height: HEIGHT, series, cursor: { y: false, points: { size: 7 } }, legend: { live: true },
      scales: { x: { time: false }, y: { range: (_, low, high) => padded(low, high) }, phi: { range: (_, low, high) => [0, Math.max(1.3, (high ?? 0) * 1.05)] } },
      axes: [axis({ size: 30 }), axis({ scale: "y", label: "log W", labelSize: 16 }), axis({ scale: "phi", side: 1, grid: { show: false }, label: "φ", labelSize: 16, stroke: GREEN })],
      hooks: { ready: [() => this.show(this.waiting)], draw: [(plot) => this.drawLines(plot)], setCursor: [(plot) => this.moved(plot)] },
    };
    this.plot = new uPlot(options, data, this.element);
    this.plot.over.addEventListener("click", () => {
      if (this.plot.cursor.idx !== null && this.plot.cursor.idx !== undefined) this.points.onPick(this.plot.cursor.idx);
    });
    this.observer = new ResizeObserver(() => this.plot.setSize({ width: this.width(), height: HEIGHT }));
    this.observer.observe(this.element);
  }

  width() {
    return Math.max(240, this.element.clientWidth);
  }

  moved(plot) {
    const { event, idx } = plot.cursor; // no event: `show` has moved it
    if (!event || idx === null || idx === undefined || idx === this.waiting) return;
    this.waiting = idx;
    this.points.onPoint(idx);
  }

  // Moves the cursor to a sampled token, without telling anybody.
  show(n) {
    if (n === this.plot?.cursor.idx) return;
    this.waiting = n;
    if (this.plot?.status !== 1 || n < 0) return;
    this.plot.setCursor({ left: this.plot.valToPos(n + 1, "x"), top: 10 });
  }

  drawLines(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.font = `${10 * devicePixelRatio}px system-ui`;
    ctx.strokeStyle = ctx.fillStyle = cssColor("--quiet");
    ctx.textAlign = "right";
    ctx.setLineDash([4, 4]);
    for (const [at, label] of this.lines) {
      const y = plot.valToPos(at, "y", true);
      if (y < bbox.top || y > bbox.top + bbox.height) continue;
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.fillText(label, bbox.left + bbox.width - 4, y - 3);
    }
    ctx.restore();
  }

  destroy() {
    this.observer?.disconnect();
    this.plot?.destroy();
  }
}

function padded(low, high) {
  if (low === null || low === undefined) return [-1, 1];
  const margin = Math.max((high - low) * 0.08, 0.01);
  return [Math.min(low, 0) - margin, Math.max(high, 0) + margin];
}
