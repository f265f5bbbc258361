// Histograms of log W with phi(W) over it, and of phi, by the sign of A.

import uPlot from "./vendor/uPlot.esm.js";
import { number } from "./dom.js";
import { cssColor } from "./links.js";

const HEIGHT = 260;
const SIGNS = [["positive", "A > 0", "#0072b2"], ["negative", "A < 0", "#d55e00"]];

function centres(edges) {
  return edges.slice(1).map((edge, i) => (edge + edges[i]) / 2);
}

// A steps series of counts; `dashed` for what would be.
function counts(label, color, dashed) {
  return {
    label, stroke: color, width: dashed ? 1.5 : 1, dash: dashed ? [5, 3] : undefined, fill: dashed ? undefined : `${color}33`,
    paths: uPlot.paths.stepped({ align: 0 }), points: { show: false }, value: (_, v) => (v === null ? "–" : number(v)),
  };
}

function curve(label, color, dashed) {
  return { label, stroke: color, width: 2, scale: "phi", dash: dashed ? [5, 3] : undefined, points: { show: false }, value: (_, v) => (v === null ? "–" : number(v)) };
}

function plot(element, series, data, xLabel, withPhi) {
  const text = cssColor("--text"), grid = { stroke: cssColor("--grid"), width: 1 };
  const axis = (extra) => ({ stroke: text, grid, ticks: grid, font: "11px system-ui", labelSize: 16, ...extra });
  const width = () => Math.max(260, element.clientWidth);
  const chart = new uPlot({
    width: width(), height: HEIGHT, series: [{ label: xLabel, value: (_, v) => (v === null ? "–" : number(v)) }, ...series],
    scales: { x: { time: false }, y: { range: (_, low, high) => [0, Math.max(1, high ?? 1) * 1.05] }, phi: { range: (_, low, high) => [0, Math.max(1.3, (high ?? 0) * 1.05)] } },
    axes: [axis({ label: xLabel, size: 34 }), axis({ label: "responses", size: 50 }), ...(withPhi ? [axis({ scale: "phi", side: 1, grid: { show: false }, label: "φ", size: 40 })] : [])],
    cursor: { y: false },
  }, data, element);
  const observer = new ResizeObserver(() => chart.setSize({ width: width(), height: HEIGHT }));
  observer.observe(element);
  return { destroy() { observer.disconnect(); chart.destroy(); } };
}

export function drawLogW(element, recorded, other) {
  const x = centres(recorded.log_w.edges);
  const series = [], data = [x];
  for (const [sign, label, color] of SIGNS) {
    series.push(counts(label, color, false), curve(`φ, ${label}`, color, false));
    data.push(recorded.log_w.counts[sign], recorded.log_w.phi[sign]);
    if (other?.phi_over) { series.push(curve(`φ if, ${label}`, color, true)); data.push(other.phi_over[sign]); }
  }
  return plot(element, series, data, "log W", true);
}

export function drawWeights(element, recorded, other) {
  const joined = uPlot.join([recorded, ...(other ? [other] : [])].map(({ weight }) => [centres(weight.edges), ...SIGNS.map(([sign]) => weight.counts[sign])]));
  const series = SIGNS.map(([, label, color]) => counts(label, color, false));
  if (other) series.push(...SIGNS.map(([, label, color]) => counts(`if: ${label}`, color, true)));
  return plot(element, series.map((one) => ({ ...one, spanGaps: true })), joined, "φ", false);
}
