// Where the seconds went: phases of each rollout batch, and idle time by cause.

import { Chart } from "./chart.js";
import { el } from "./dom.js";

// A phase, and waiting for it, have the same colour. The last three are beyond Okabe and Ito's.
const PHASE_COLOR = {
  generate: "#0072b2", reward: "#d55e00", "log-probs": "#cc79a7", train: "#009e73", sync: "#e69f00",
  evaluate: "#56b4e9", save: "#7a5195",
};
const CAUSE_COLOR = {
  generation: "#0072b2", "slower engines": "#a05d2c", training: "#009e73", rewards: "#d55e00", sync: "#e69f00",
  evaluation: "#56b4e9", saving: "#7a5195", calls: "#4b5a6b", other: "#999999",
};
const PHASES = Object.keys(PHASE_COLOR), CAUSES = Object.keys(CAUSE_COLOR);

export async function mountIdle(element, context, dataOf) {
  const view = new Idle(element, context, dataOf);
  await view.refresh();
  return view;
}

class Idle {
  constructor(element, context, dataOf) {
    Object.assign(this, { element, context, dataOf, charts: new Map(), boxes: new Map(), gone: false });
  }

  async refresh() {
    for (const run of this.context.selectedRuns) {
      const data = this.dataOf(run.id);
      if (!data || data.error) continue;
      const reply = await this.context.api.get(`runs/${run.id}/idle`).catch(() => null);
      if (this.gone) return;
      this.drawRun(run, data, reply);
    }
  }

  drawRun(run, data, reply) {
    if (!this.boxes.has(run.id)) {
      const box = el("section", { class: "times", "data-run": run.id });
      this.boxes.set(run.id, box);
      this.element.append(box);
    }
    const box = this.boxes.get(run.id);
    const phases = this.drawPhases(run, data);
    const idle = reply?.source ? idleTable(reply) : null;
    const over = reply?.parts?.length ? ["trainer", "engines"].map((who) => this.drawParts(run, who, reply.parts)) : [];
    box.replaceChildren(...(phases || idle ? [el("h2", {}, `${run.id}: where the seconds went`)] : []),
      el("div", { class: "charts" }, ...[phases, idle, ...over].filter(Boolean)));
  }

  drawPhases(run, data) {
    const found = [...data.series.keys()].filter((name) => name.startsWith("time/")).map((name) => name.slice(5));
    const names = [...PHASES.filter((name) => found.includes(name)), ...found.filter((name) => !PHASES.includes(name)).sort()];
    if (!names.length) return null;
    const xs = [...new Set(names.flatMap((name) => data.curve(`time/${name}`, "step")[0]))].sort((a, b) => a - b);
    const columns = names.map((name) => {
      const [x, y] = data.curve(`time/${name}`, "step");
      const by = new Map(x.map((place, index) => [place, y[index]]));
      return xs.map((place) => by.get(place) ?? 0);
    });
    return this.stacked(`${run.id} phases`, "Seconds of a rollout batch by phase", names, xs, columns, (name) => PHASE_COLOR[name] ?? "#888888", "optimizer step", (_, least, most) => [0, 1.05 * most]);
  }

  drawParts(run, who, parts) {
    const names = CAUSES.filter((cause) => parts.some((part) => (part.idle[who]?.[cause] ?? 0) > 0.001));
    if (!names.length) return null;
    const minutes = parts.map((part) => ((part.start + part.end) / 2 - parts[0].start) / 60);
    const columns = names.map((cause) => parts.map((part) => part.idle[who]?.[cause] ?? 0));
    return this.stacked(`${run.id} ${who}`, `Share of time that ${who === "trainer" ? "the trainer" : "engines"} waited, by cause`, names, minutes, columns, (name) => CAUSE_COLOR[name], "minutes of training", [0, 1]);
  }

  // Bars on top of each other; the highest sum is drawn first, and the others over it.
  stacked(key, title, names, xs, columns, colorOf, xLabel, yRange = null) {
    if (!this.charts.has(key)) this.charts.set(key, new Chart(title, { key, help: `x: ${xLabel}` }));
    const sums = [];
    columns.forEach((column, index) => sums.push(column.map((value, i) => value + (index ? sums[index - 1][i] : 0))));
    const order = names.map((_, index) => index).reverse();
    const series = order.map((index) => ({ label: names[index], color: colorOf(names[index]), bars: true, values: columns[index] }));
    const chart = this.charts.get(key);
    queueMicrotask(() => chart.draw({ data: [xs, ...order.map((index) => sums[index])], series, stacked: true, xLabel, yRange }));
    return chart.element;
  }

  destroy() {
    this.gone = true;
    for (const chart of this.charts.values()) chart.destroy();
  }
}

// Shares of the whole time as bars with a table: trainer and engines.
function idleTable({ source, idle }) {
  const rows = Object.entries(idle).flatMap(([who, shares]) => {
    const idleShare = Object.values(shares).reduce((a, b) => a + b, 0);
    const parts = CAUSES.filter((cause) => (shares[cause] ?? 0) >= 0.0005);
    const bar = el("div", { class: "sharebar" }, ...parts.map((cause) => el("span", {
      title: `${cause}: ${percent(shares[cause])}`, style: { background: CAUSE_COLOR[cause], width: percent(shares[cause]) },
    })));
    return [
      el("h4", {}, `${who === "trainer" ? "Trainer" : "Engines"}: idle `, el("b", { class: "value", "data-idle": who }, percent(idleShare)), " of the time"),
      bar,
      el("div", { class: "legend" }, ...parts.map((cause) => el("span", { class: "entry" },
        el("span", { class: "swatch", style: { background: CAUSE_COLOR[cause] } }), cause, " ", el("b", { class: "value" }, percent(shares[cause]))))),
    ];
  });
  return el("section", { class: "chart" }, el("div", { class: "chart-head" }, el("h3", { title: `from ${source}` }, "Idle time by cause")), ...rows);
}

function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}
