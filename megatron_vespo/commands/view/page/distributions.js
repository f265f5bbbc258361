// The tab Distributions: log W, phi and ESS of the recorded responses, and what other c1, c2 and N would give.

import { el, number } from "./dom.js";
import { drawLogW, drawWeights } from "./histograms.js";
import { signed } from "./links.js";
import { landmarkText } from "./running.js";
import { runChoice } from "./responses.js";

const DRAG_MS = 120; // after the last move of a slider, until the server is asked
const CONSTANTS = [
  ["c1_positive", "c1, A ≥ 0", "positive", "c1"], ["c2_positive", "c2, A ≥ 0", "positive", "c2"],
  ["c1_negative", "c1, A < 0", "negative", "c1"], ["c2_negative", "c2, A < 0", "negative", "c2"],
];
const LARGEST = 8; // of the sliders
const METRICS = {
  ess: ["ESS", "effective sample size as a share of the responses, (Σφ)² / (n Σφ²)"], mean: ["mean φ", "mean weight"],
  dead: ["dead share", "share of responses with φ < 0.01"], log_w_mean: ["mean log W", "mean of log W"],
  log_w_std: ["sd of log W", "standard deviation of log W"], count: ["responses", "number of responses"],
};
const N_IN_WORDS =
  "N keeps the first N mini-batches (optimizer steps) of every recorded rollout batch. A run with N of them per rollout batch " +
  "would have trained on exactly these, with the same π, π_old and μ. What it would have generated afterwards is not in the record. " +
  "Other c1 and c2 are put into φ of the recorded log W; that they would also have led to another π is left out.";

let unmounted = new AbortController();
let charts = [];

export async function mount(element, context) {
  unmounted = new AbortController();
  const run = context.runs.find((one) => one.id === context.params.run) ?? context.selectedRuns.find((one) => one.has_responses) ?? context.selectedRuns[0];
  if (run === undefined) {
    element.append(el("p", { class: "quiet" }, "No run is chosen."));
    return;
  }
  await new View(element, context, run, unmounted.signal).start();
}

export function unmount() {
  unmounted.abort();
  clear();
}

function clear() {
  charts.forEach((chart) => chart.destroy());
  charts = [];
}

class View {
  constructor(element, context, run, signal) {
    Object.assign(this, { element, context, run, signal, recorded: null, shown: "", timer: 0, asked: 0 });
    this.status = el("p", { class: "quiet", role: "status" });
    this.sliders = el("div", { class: "sliders" });
    this.summary = el("div", { class: "scroll" });
    this.logW = el("div", { class: "chart" });
    this.weights = el("div", { class: "chart" });
    this.landmarks = el("div", { class: "quiet landmarks" });
    this.table = el("div", { class: "scroll" });
  }

  async start() {
    const { context } = this;
    const bound = (name, label) => el("input", { type: "number", step: "1", min: "0", name, value: context.params[name] ?? "", "aria-label": label, oninput: (event) => this.later({ [name]: event.target.value }) });
    this.from = bound("step_min", "Step from");
    this.to = bound("step_max", "Step to");
    const metric = el("select", { "aria-label": "Metric of the table", onchange: (event) => { context.setParams({ metric: event.target.value }); this.draw(); } },
      Object.entries(METRICS).map(([name, [label]]) => el("option", { value: name, selected: name === this.metric() }, label)));
    this.element.append(
      el("div", { class: "filters" }, runChoice(context, this.run), el("div", { class: "field" }, el("span", {}, "Steps"), el("span", { class: "range" }, this.from, "–", this.to))),
      this.status,
      el("section", { class: "what-if", "aria-label": "What if" }, el("h2", {}, "What if"), this.sliders, el("p", { class: "quiet n-words" }, N_IN_WORDS)),
      this.summary,
      el("div", { class: "charts" },
        el("section", {}, el("h2", {}, "log W, and φ(W)"), this.logW, this.landmarks),
        el("section", {}, el("h2", {}, "φ: the weight of a response"), this.weights)),
      el("h2", {}, "By sign, length and mini-batch"), el("label", { class: "choice" }, "Shown: ", metric), this.table);
    await this.load();
    this.context.every(() => this.load());
  }

  metric() {
    return this.context.params.metric in METRICS ? this.context.params.metric : "ess";
  }

  later(changes) {
    this.context.setParams(changes);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.load(), DRAG_MS);
  }

  range() {
    const { step_min, step_max } = this.context.params;
    return { step_min, step_max };
  }

  changed() {
    return [...CONSTANTS.map(([name]) => name), "mini_batches"].filter((name) => this.context.params[name] !== undefined);
  }

  async load() {
    const turn = ++this.asked;
    const { api, params } = this.context;
    try {
      const recorded = await api.get(`runs/${this.run.id}/distributions`, this.range(), this.signal);
      const names = this.changed();
      const asked = Object.fromEntries(names.map((name) => [name, params[name]]));
      const other = names.length ? await api.get(`runs/${this.run.id}/what_if`, { ...this.range(), ...asked }, this.signal) : null;
      if (turn !== this.asked || this.signal.aborted) return;
      const text = JSON.stringify([recorded, other]);
      if (text === this.shown) return;
      this.shown = text;
      this.recorded = recorded;
      this.other = other;
      this.status.classList.remove("bad");
      this.draw();
    } catch (error) {
      if (this.signal.aborted) return;
      this.status.textContent = error.message;
      this.status.classList.add("bad");
    }
  }

  draw() {
    const { recorded, other } = this;
    const [first, last] = recorded.range;
    this.from.placeholder = first ?? "";
    this.to.placeholder = last ?? "";
    this.status.replaceChildren(statusText(recorded));
    this.drawSliders();
    clear();
    this.summary.replaceChildren(...(recorded.responses ? [summaryTable(recorded, other)] : []));
    this.table.replaceChildren(...(recorded.responses ? [partsTable(recorded, other, this.metric())] : []));
    this.landmarks.replaceChildren(...[["positive", 1], ["negative", -1]].map(([name, sign]) => {
      const { c1, c2, ...thresholds } = (other ?? recorded).kernel[name];
      return el("p", {}, landmarkText({ running: { c1, c2, thresholds }, advantage: sign }));
    }));
    this.logW.replaceChildren();
    this.weights.replaceChildren();
    if (recorded.responses) charts = [drawLogW(this.logW, recorded, other), drawWeights(this.weights, recorded, other)];
  }

  drawSliders() {
    if (this.sliders.contains(document.activeElement) && this.sliders.childElementCount) return; // it is being moved
    const { params } = this.context;
    const { kernel, mini_batches: most } = this.recorded;
    const slider = (name, label, recorded, options) => {
      const value = params[name] ?? String(recorded);
      const said = el("output", {}, value);
      const input = el("input", { type: "range", ...options, name, "aria-label": label, oninput: (event) => {
        said.textContent = event.target.value;
        this.later({ [name]: Number(event.target.value) === recorded ? null : event.target.value });
      } });
      input.value = value; // after min, max and step, which it is cut to
      return el("label", { class: "slider" }, el("span", {}, label), input, said, el("span", { class: "quiet" }, `recorded ${number(recorded)}`));
    };
    this.sliders.replaceChildren(
      ...CONSTANTS.map(([name, label, sign, constant]) => slider(name, label, kernel[sign][constant], { min: 0, max: Math.max(LARGEST, kernel[sign][constant]), step: 0.05 })),
      slider("mini_batches", "N, mini-batches per rollout batch", Math.max(1, most), { min: 1, max: Math.max(1, most), step: 1 }),
      el("button", { type: "button", onclick: () => {
        document.activeElement.blur();
        this.context.setParams(Object.fromEntries(this.changed().map((name) => [name, null])));
        this.load();
      } }, "As recorded"));
  }
}

function statusText({ responses, unknown, settings, agreement, index }) {
  const parts = [`${number(responses)} responses`];
  if (index.files === 0) parts.push("this run has no recorded responses; --record-responses of train records them");
  if (index.indexed < index.files) parts.push(`${index.indexed} of ${index.files} step files are indexed`);
  if (unknown) parts.push(`${number(unknown)} more have no finite log W`);
  if (settings.policy_loss) parts.push(`loss ${settings.policy_loss}, W of ${settings.ratio_denominator}`);
  if (settings.policy_loss && !settings.policy_loss.startsWith("vespo")) parts.push("its weight is no φ: what if shows the φ that VESPO would have used");
  if (settings.has_advantages_per_token) parts.push("tokens have their own A: a response is listed by the sign of its mean A, and with other constants φ goes by that sign");
  if (agreement !== null && agreement > 1e-3) parts.push(`recorded and recomputed φ differ by up to ${number(agreement)}: the constants changed in these steps`);
  return parts.join(" · ");
}

function summaryTable(recorded, other) {
  const columns = ["count", "mean", "ess", "dead", "log_w_mean", "log_w_std"];
  const row = (name, label) => el("tr", { "data-part": name }, el("th", { scope: "row" }, label),
    columns.map((column) => el("td", { class: "number", "data-metric": column }, pair(column, recorded.overall[name][column], other?.overall[name][column], other))));
  return el("table", { class: "summary" }, el("thead", {}, el("tr", {}, el("th", {}, other ? "recorded → what if" : "recorded"), columns.map((name) => el("th", { class: "number", title: METRICS[name][1] }, METRICS[name][0])))),
    el("tbody", {}, row("all", "all"), row("positive", "A > 0"), row("negative", "A < 0")));
}

function show(metric, value) {
  if (value === null || value === undefined) return "–";
  if (metric === "dead") return `${number(100 * value, 3)}%`;
  return metric === "log_w_mean" ? signed(value) : number(value);
}

function pair(metric, before, after, other) {
  if (!other) return show(metric, before);
  return `${show(metric, before)} → ${show(metric, after)}`;
}

// Rows: sign and length bin; columns: mini-batches of the rollout batch.
function partsTable(recorded, other, metric) {
  const key = (line) => `${line.sign}|${line.bucket}|${line.mini_batch}`;
  const [before, after] = [recorded, other].map((one) => new Map((one?.table ?? []).map((line) => [key(line), line])));
  const miniBatches = [...new Set(recorded.table.map((line) => line.mini_batch))].sort((a, b) => a - b);
  const rows = new Map(recorded.table.map((line) => [`${line.sign}|${line.bucket}`, line]));
  return el("table", { class: "parts" },
    el("thead", {}, el("tr", {}, el("th", {}, "Sign of A"), el("th", {}, "Tokens"), miniBatches.map((index) => el("th", { class: "number" }, `mini-batch ${index}`)))),
    el("tbody", {}, [...rows].map(([place, { sign, length }]) => el("tr", {},
      el("th", { scope: "row" }, sign === "positive" ? "A > 0" : "A < 0"), el("td", {}, length),
      miniBatches.map((index) => {
        const line = before.get(`${place}|${index}`);
        if (!line) return el("td", { class: "number quiet" }, "–");
        const text = pair(metric, line[metric], after.get(`${place}|${index}`)?.[metric], other);
        return el("td", { class: `number ${shade(metric, line[metric])}`, title: `${line.count} responses, ESS ${number(line.ess, 3)}, mean φ ${number(line.mean, 3)}, dead ${number(100 * line.dead, 3)}%` }, text);
      })))));
}

// Shares are shaded where they are bad: a low ESS or mean phi, many dead responses.
function shade(metric, value) {
  if (!["ess", "mean", "dead"].includes(metric) || value === null) return "";
  const bad = metric === "dead" ? value : 1 - Math.min(1, value);
  const step = Math.round(bad * 10);
  return step > 0 ? `p${step}` : "";
}
