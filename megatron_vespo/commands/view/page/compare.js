// The tab Compare: two runs, their metrics at common steps, held-out accuracy, and what they were started with.

import { Chart } from "./chart.js";
import { el, number } from "./dom.js";
import { explain } from "./panels.js";
import { joined, RunData } from "./series.js";

const METHOD = "Mean of b − a over the last common batches, with its 95% t interval. Differences of the same step are "
  + "taken, so that a trend of both runs cancels. Batches that follow each other are alike: the interval counts fewer of "
  + "them (n′), by the correlation of neighbours (Wilks, Statistical Methods in the Atmospheric Sciences, section 5.2.4, "
  + "with Kendall's correction of 1954 for few values). "
  + "It is about these two runs: it says nothing about other seeds. One of twenty intervals excludes 0 by chance.";

let tab = null;

export async function mount(element, context) {
  const runs = context.runs.filter((run) => !run.gone);
  const params = context.params;
  const first = context.selectedRuns.length > 1 ? context.selectedRuns : runs;
  const mine = {
    element, context, explanations: {}, chart: null, data: new Map(), reply: null, filter: "",
    a: runs.some((run) => run.id === params.a) ? params.a : first[0]?.id,
    b: runs.some((run) => run.id === params.b) ? params.b : first[1]?.id,
    last: Number(params.last) || 20, metric: params.metric ?? "reward/mean", onlyClear: params.clear === "1",
  };
  tab = mine;
  if (runs.length < 2) {
    element.append(el("p", { class: "quiet" }, "Two runs are needed: megatron-vespo view RUN RUN, or a folder of runs."));
    return;
  }
  mine.explanations = await context.api.get("metrics").catch(() => ({}));
  if (tab !== mine) return;
  mine.body = el("div", {});
  element.append(toolbar(mine, runs), mine.body);
  await load(mine);
  context.every(() => load(mine));
}

export function unmount() {
  tab?.chart?.destroy();
  tab = null;
}

function save(mine) {
  const { a, b, last, metric } = mine;
  mine.context.setParams({ a, b, last: last === 20 ? null : last, metric: metric === "reward/mean" ? null : metric, clear: mine.onlyClear ? "1" : null });
}

function toolbar(mine, runs) {
  const choose = (side) => el("label", {}, `${side}: `, el("select", { "aria-label": `Run ${side}`, onchange: (event) => {
    mine[side] = event.target.value;
    save(mine);
    load(mine, true);
  } }, ...runs.map((run) => el("option", { value: run.id, selected: run.id === mine[side] }, run.id))));
  const last = el("input", { type: "number", min: 1, max: 100000, value: mine.last, "aria-label": "Batches", onchange: (event) => {
    mine.last = Math.max(1, Math.round(Number(event.target.value)) || 20);
    save(mine);
    load(mine, true);
  } });
  const search = el("input", { type: "search", placeholder: "Filter metrics", "aria-label": "Filter metrics", oninput: (event) => {
    mine.filter = event.target.value.toLowerCase();
    draw(mine);
  } });
  const clear = el("input", { type: "checkbox", checked: mine.onlyClear, onchange: (event) => {
    mine.onlyClear = event.target.checked;
    save(mine);
    draw(mine);
  } });
  return el("div", { class: "toolbar" }, choose("a"), choose("b"), el("label", {}, "last ", last, " common batches"), search,
    el("label", {}, clear, " only intervals without 0"));
}

async function load(mine, always = false) {
  const { context, a, b, last } = mine;
  const reply = await context.api.get("compare", { a, b, last });
  const changed = always || JSON.stringify(reply) !== JSON.stringify(mine.reply);
  if (tab !== mine || !changed) return;
  mine.reply = reply;
  await loadCurves(mine);
  if (tab === mine) draw(mine);
}

async function loadCurves(mine) {
  for (const id of [mine.a, mine.b]) {
    if (!mine.data.has(id)) mine.data.set(id, new RunData(id));
    await mine.data.get(id).refresh(mine.context.api, [mine.metric]);
  }
}

function draw(mine) {
  const { reply } = mine;
  const scroll = mine.body.querySelector(".metrics")?.scrollTop ?? 0;
  mine.chart ??= new Chart("", { key: "compare" });
  mine.body.replaceChildren(
    el("p", { class: "quiet" }, reply.common
      ? `${reply.common} steps are common; compared are steps ${reply.steps[0]} to ${reply.steps[1]}.`
      : "The runs have no batch that ended at the same optimizer step."),
    el("div", { class: "charts" }, mine.chart.element, accuracy(mine)),
    el("h2", {}, "Metrics"), el("p", { class: "quiet hint" }, METHOD), metricTable(mine),
    differing("Flags that differ", reply.flags, mine, true),
    differing("Versions that differ", reply.versions, mine),
    differing("Machine and environment that differ", reply.machine, mine),
  );
  mine.body.querySelector(".metrics").scrollTop = scroll;
  drawChart(mine);
}

function drawChart(mine) {
  const curves = [mine.a, mine.b].map((id) => mine.data.get(id).curve(mine.metric, "step"));
  const series = [mine.a, mine.b].map((id, index) => ({ label: id, color: mine.context.colorOf(id), dash: index ? [6, 4] : [] }));
  const heading = mine.chart.element.querySelector("h3");
  heading.textContent = mine.metric;
  heading.title = explain(mine.metric, mine.explanations);
  mine.chart.draw({ data: joined(curves), series, xLabel: "optimizer step" });
}

function metricTable(mine) {
  const rows = mine.reply.metrics.filter((row) => row.name.toLowerCase().includes(mine.filter)
    && (!mine.onlyClear || isClear(row)));
  const head = el("tr", {}, ...["metric", "a", "b", "b − a", "95% interval", "n (n′)"].map((text, index) => el("th", { class: index ? "number" : null }, text)));
  return el("div", { class: "scroll metrics" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows.map((row) =>
    el("tr", { class: isClear(row) ? "clear" : null, "data-metric": row.name },
      el("td", {}, el("button", { class: "link", title: explain(row.name, mine.explanations), "aria-pressed": String(row.name === mine.metric), onclick: () => pick(mine, row.name) }, row.name)),
      el("td", { class: "number" }, number(row.a)), el("td", { class: "number" }, number(row.b)),
      el("td", { class: "number difference", "data-value": String(row.difference) }, signed(row.difference)),
      el("td", { class: "number interval" }, row.low === null ? "too few" : `${signed(row.low)} … ${signed(row.high)}`),
      el("td", { class: "number" }, `${row.number} (${number(row.effective, 2)})`))))),
  rows.length ? null : el("p", { class: "quiet" }, "no metric"));
}

function isClear(row) {
  return row.low !== null && (row.low > 0 || row.high < 0);
}

function signed(value) {
  if (typeof value === "number" && value > 0) return `+${number(value, 3)}`;
  return typeof value === "number" ? number(value, 3).replace("-", "−") : number(value);
}

async function pick(mine, name) {
  mine.metric = name;
  save(mine);
  await loadCurves(mine);
  draw(mine);
}

// Every run's evaluations have intervals of their own: what other prompts of the same kind would give.
function accuracy(mine) {
  const { accuracy: found } = mine.reply;
  const steps = found.a.filter((one) => found.b.some((other) => other.step === one.step)).map((one) => one.step);
  const step = steps.at(-1);
  const line = (side, name, one) => el("tr", {}, el("td", {}, name), el("td", {}, mine[side]),
    el("td", { class: "number" }, one ? number(one.step) : "–"), el("td", { class: "number" }, one ? percent(one.value) : "–"),
    el("td", { class: "number" }, one && one.low !== null ? `${percent(one.low)} … ${percent(one.high)}` : "–"));
  const rows = ["a", "b"].flatMap((side) => {
    const every = found[side];
    return [
      line(side, "common step", every.findLast((one) => one.step === step)),
      line(side, "newest", every.at(-1)),
    ];
  });
  rows.sort((x, y) => x.cells[0].textContent.localeCompare(y.cells[0].textContent));
  const head = el("tr", {}, ...["", "run", "step", "accuracy", "95% interval"].map((text, index) => el("th", { class: index > 1 ? "number" : null }, text)));
  return el("section", { class: "chart" }, el("h3", {}, "Held-out accuracy"),
    el("div", { class: "scroll" }, el("table", { class: "accuracy" }, el("thead", {}, head), el("tbody", {}, ...rows))),
    el("p", { class: "quiet hint" }, "Each interval is that of its own evaluation, over prompts. Two runs on the same prompts can differ although their intervals overlap."));
}

function percent(value) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)}%`;
}

function differing(title, rows, mine, flags = false) {
  if (rows === null) return el("div", {}, el("h2", {}, title), el("p", { class: "quiet" }, "A run has no run-001.json."));
  const own = flags ? rows.filter((row) => row.given) : rows;
  const derived = flags ? rows.filter((row) => !row.given) : [];
  const table = (some) => el("div", { class: "scroll" }, el("table", { class: "differing" },
    el("thead", {}, el("tr", {}, el("th", {}, "name"), el("th", {}, `a: ${mine.a}`), el("th", {}, `b: ${mine.b}`))),
    el("tbody", {}, ...some.map((row) => el("tr", { "data-name": row.name }, el("td", {}, row.name), el("td", {}, shown(row.a)), el("td", {}, shown(row.b)))))));
  return el("div", {}, el("h2", {}, title), own.length ? table(own) : el("p", { class: "quiet" }, "none"),
    derived.length ? el("details", {}, el("summary", {}, `others, which follow from these or are defaults: ${derived.length}`), table(derived)) : null);
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number" && value !== 0 && Math.abs(value) < 1e-3) return value.toExponential();
  return typeof value === "string" ? value : JSON.stringify(value);
}
