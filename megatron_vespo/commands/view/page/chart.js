// A chart: a title with buttons, a legend that shows values, and curves drawn by uPlot.

import uPlot from "./vendor/uPlot.esm.js";
import { el, number } from "./dom.js";

const HEIGHT = 190;
const DASHES = [[], [6, 4], [2, 3], [9, 3, 2, 3]];

export function dash(index) {
  return DASHES[index % DASHES.length];
}

function cssColor(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function compact(value) {
  if (Math.abs(value) >= 1e4) {
    return Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(value);
  }
  return String(Number(value.toPrecision(6)));
}

export class Chart {
  // `title`, `help` (tooltip), `buttons`: elements right of the title.
  constructor(title, { help = "", buttons = [], key = title } = {}) {
    this.legend = el("div", { class: "legend" });
    this.plotBox = el("div", { class: "plot", tabindex: "0", role: "img", "aria-label": title });
    const heading = el("h3", { title: help }, title);
    this.element = el("section", { class: "chart", "data-chart": key },
      el("div", { class: "chart-head" }, heading, ...buttons), this.legend, this.plotBox);
    this.plot = null;
    this.shape = "";
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.plotBox);
    this.plotBox.addEventListener("keydown", (event) => this.key(event));
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.onScheme = () => this.plot?.redraw(false, true);
    this.scheme.addEventListener("change", this.onScheme);
  }

  // `series`: [{label, color, dash, faint, width, bars, hidden, value}], one for each column of data but the first.
  // `bands`: [upper column, lower column, colour]. `events`: [{x, name, kind, color}]. `log`: log y axis.
  draw({ data, series, bands = [], events = [], log = false, xLabel = "", sync = null, stacked = false, yRange = null }) {
    this.events = events;
    this.series = series;
    this.data = data;
    const points = data[0].length < 60;
    const shape = JSON.stringify([series.map((one) => ({ ...one, value: null })), bands, log, xLabel, stacked, points]);
    if (this.plot && shape === this.shape) {
      const { min, max } = this.plot.scales.x;
      const old = this.plot.data[0];
      const zoomed = old.length && (min > old[0] || max < old.at(-1));
      this.plot.setData(data, !zoomed);
      if (zoomed) this.plot.redraw();
    } else {
      this.shape = shape;
      this.build({ data, series, bands, log, xLabel, sync, stacked, yRange, points });
    }
    this.showValues(null);
  }

  build({ data, series, bands, log, xLabel, sync, stacked, yRange, points }) {
    this.plot?.destroy();
    const width = Math.max(200, this.plotBox.clientWidth);
    const axis = { stroke: () => cssColor("--quiet"), grid: { stroke: () => cssColor("--grid"), width: 1 },
      ticks: { stroke: () => cssColor("--grid"), width: 1, size: 4 }, font: "11px system-ui, sans-serif" };
    this.plot = new uPlot({
      width, height: HEIGHT, legend: { show: false }, padding: [14, 8, 0, 0],
      cursor: { sync: sync ? { key: sync } : undefined, points: { size: 6 }, drag: { x: true, y: false } },
      scales: { x: { time: false, range: stacked ? barRange : undefined }, y: { distr: log ? 3 : 1, range: yRange ?? undefined } },
      axes: [
        { ...axis, size: 30, values: (_, splits) => splits.map(compact) },
        { ...axis, size: 52, values: (_, splits) => splits.map((v) => (v === null ? "" : compact(v))) },
      ],
      series: [{ label: xLabel }, ...series.map((one) => this.seriesOptions(one, points))],
      bands: bands.map(([upper, lower, fill]) => ({ series: [upper, lower], fill })),
      hooks: { draw: [(u) => this.drawEvents(u)], setCursor: [(u) => this.showValues(u.cursor.idx)] },
    }, data, this.plotBox);
  }

  seriesOptions(one, points) {
    const options = { label: one.label, stroke: one.color, width: one.width ?? 1.6, dash: one.dash ?? [], spanGaps: false };
    if (one.bars) {
      return { ...options, width: 0, fill: one.color, points: { show: false }, paths: uPlot.paths.bars({ size: [0.9, 60], gap: 0 }) };
    }
    if (one.hidden) return { ...options, stroke: "transparent", width: 0, points: { show: false } };
    if (one.faint) return { ...options, stroke: `${one.color}55`, width: 1, points: { show: false } };
    // a single value between two gaps has no line
    return { ...options, points: points ? { show: true, size: 4, fill: one.color } : { size: 4, fill: one.color } };
  }

  resize() {
    const width = this.plotBox.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  // The legend with the values at the cursor, or else the last ones.
  showValues(index) {
    const x = this.data[0];
    const at = index === null || index === undefined ? null : x[index];
    const entries = [];
    const shown = this.series.map((one, i) => [one, i]);
    if (this.series[0]?.bars) shown.reverse(); // as they lie on each other, from below
    shown.forEach(([one, i]) => {
      if (one.hidden || one.faint) return;
      const column = one.values ?? this.data[i + 1];
      const value = at !== null ? near(column, index) : one.bars ? mean(column) : last(column);
      entries.push(el("span", { class: "entry", "data-series": one.label }, swatch(one), one.label, " ",
        el("b", { class: "value", "data-value": value === null ? "" : String(value) }, number(value))));
    });
    if (at === null && this.series[0]?.bars) entries.unshift(el("span", { class: "entry quiet" }, "mean"));
    if (at !== null && at !== undefined) entries.unshift(el("span", { class: "entry quiet" }, `at ${number(at)}`));
    this.legend.replaceChildren(...entries);
  }

  drawEvents(u) {
    const { ctx, bbox } = u;
    const ratio = devicePixelRatio;
    let free = -Infinity;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, 0, bbox.width, bbox.top + bbox.height);
    ctx.clip();
    ctx.textAlign = "left";
    ctx.textBaseline = "alphabetic";
    ctx.font = `${10 * ratio}px system-ui, sans-serif`;
    for (const event of [...this.events].sort((a, b) => a.x - b.x)) {
      const x = Math.round(u.valToPos(event.x, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = ctx.fillStyle = cssColor(event.kind === "alarm" ? "--alarm" : "--quiet");
      ctx.lineWidth = ratio;
      ctx.setLineDash(event.kind === "alarm" ? [4 * ratio, 3 * ratio] : [1 * ratio, 3 * ratio]);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      if (x < free) continue;
      const name = event.name.split(":")[0];
      const width = ctx.measureText(name).width;
      const left = Math.max(bbox.left, Math.min(x, bbox.left + bbox.width - width));
      ctx.fillText(name, left, bbox.top - 3 * ratio);
      free = left + width + 8 * ratio;
    }
    ctx.restore();
  }

  // Arrow keys move the cursor, Escape takes it away.
  key(event) {
    const x = this.plot?.data[0];
    if (!x?.length) return;
    const current = this.plot.cursor.idx ?? x.length;
    const target = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: x.length - 1 }[event.key];
    if (target === undefined) {
      if (event.key === "Escape") this.showValues(null);
      return;
    }
    event.preventDefault();
    const index = Math.min(x.length - 1, Math.max(0, target));
    this.plot.setCursor({ left: this.plot.valToPos(x[index], "x"), top: 10 });
    this.showValues(index);
  }

  destroy() {
    this.observer.disconnect();
    this.scheme.removeEventListener("change", this.onScheme);
    this.plot?.destroy();
    this.plot = null;
  }
}

// Room for half a bar at both ends.
function barRange(u, min, max) {
  const x = u.data[0];
  const half = x.length > 1 ? (x.at(-1) - x[0]) / (x.length - 1) / 2 : 0.5;
  return [min - half, max + half];
}

function mean(column) {
  return column.reduce((sum, value) => sum + value, 0) / column.length;
}

function last(column) {
  for (let i = column.length - 1; i >= 0; i--) if (column[i] !== undefined) return column[i];
  return null;
}

// The value at `index`, or the newest before it, where only other curves have a point.
function near(column, index) {
  for (let i = index; i >= 0; i--) if (column[i] !== undefined) return column[i];
  return null;
}

// A sample of the line, or a box for bars.
function swatch(one) {
  if (one.bars) return el("span", { class: "swatch", style: { background: one.color } });
  const style = one.dash?.length ? (one.dash[0] > 4 ? "dashed" : "dotted") : "solid";
  return el("span", { class: "sample", style: { borderTop: `2px ${style} ${one.color}` } });
}
