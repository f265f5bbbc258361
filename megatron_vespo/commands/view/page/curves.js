// The tab Curves: panels of metrics over all selected runs, phases and idle time.

import { Chart, dash } from "./chart.js";
import { el, number } from "./dom.js";
import { mountIdle } from "./idle.js";
import { concerns, explain, metricsOf, PANELS, panelOf } from "./panels.js";
import { AXES, joined, RunData, smoothed, timeUnit } from "./series.js";

const MAX_FOUND = 60; // metrics listed by the search
const known = new Map(); // run -> RunData; kept when another tab is opened

let tab = null;

export async function mount(element, context) {
  const settings = readParams(context.params);
  const mine = { element, context, settings, charts: new Map(), explanations: {}, idle: null, stop: new AbortController() };
  tab = mine;
  if (!context.selectedRuns.length) {
    element.append(el("p", { class: "quiet" }, "Choose a run above."));
    return;
  }
  mine.bar = el("div", { class: "toolbar" }, ...toolbar(mine));
  mine.found = el("div", { class: "found", hidden: true });
  mine.events = el("ul", { class: "events", "aria-label": "Alarms and restarts" });
  mine.notes = el("div", { class: "notes" });
  mine.grid = el("div", { class: "charts" });
  mine.below = el("div", { class: "below" });
  element.append(mine.bar, mine.found, mine.notes, mine.events, mine.grid, mine.below);
  mine.explanations = await context.api.get("metrics").catch(() => ({}));
  if (tab !== mine) return;
  await refresh(mine, true);
  if (tab !== mine) return;
  mine.idle = await mountIdle(mine.below, context, (id) => known.get(id));
  context.every(() => refresh(mine, false));
}

export function unmount() {
  tab?.stop.abort();
  for (const chart of tab?.charts.values() ?? []) chart.destroy();
  tab?.idle?.destroy();
  tab = null;
}

function readParams(params) {
  return {
    axis: params.x in AXES ? params.x : "step",
    smooth: Math.min(0.99, Math.max(0, Number(params.smooth) || 0)),
    show: params.show === undefined ? Object.keys(PANELS) : params.show.split(",").filter(Boolean),
    flipped: new Set((params.log ?? "").split(",").filter(Boolean)), // panels whose y axis is not their usual one
  };
}

function save(mine) {
  const { axis, smooth, show, flipped } = mine.settings;
  const usual = show.join() === Object.keys(PANELS).join();
  mine.context.setParams({
    x: axis === "step" ? null : axis, smooth: smooth || null, log: [...flipped].join(",") || null,
    show: usual ? null : show.join(",") || ",",
  });
}

function toolbar(mine) {
  const { settings } = mine;
  const search = el("input", {
    type: "search", placeholder: "Add a metric: name or meaning", "aria-label": "Add a metric",
    oninput: (event) => listFound(mine, event.target.value),
    onkeydown: (event) => {
      if (event.key === "Escape") { event.target.value = ""; listFound(mine, ""); }
      if (event.key === "Enter") mine.found.querySelector("button")?.click();
      if (event.key === "ArrowDown") mine.found.querySelector("button")?.focus();
    },
  });
  const axis = el("select", { "aria-label": "x axis", onchange: (event) => {
    settings.axis = event.target.value;
    save(mine);
    drawAll(mine);
  } }, ...Object.entries(AXES).map(([key, name]) => el("option", { value: key, selected: key === settings.axis }, name)));
  const shown = el("output", {}, settings.smooth ? String(settings.smooth) : "off");
  const slider = el("input", {
    type: "range", min: 0, max: 0.99, step: 0.01, value: settings.smooth, "aria-label": "Smoothing",
    title: "weight of the past in a moving average; the curve without it stays faint", oninput: (event) => {
      settings.smooth = Number(event.target.value);
      shown.value = settings.smooth ? String(settings.smooth) : "off";
      save(mine);
      drawAll(mine);
    },
  });
  const reset = el("button", { onclick: () => {
    Object.assign(settings, readParams({}));
    save(mine);
    mine.context.navigate("curves", {});
  } }, "Reset");
  return [search, el("label", {}, "x: ", axis), el("label", { class: "slider" }, "smoothing ", slider, shown), reset];
}

function listFound(mine, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  mine.found.hidden = !words.length;
  if (!words.length) return;
  const names = [...new Set(mine.context.selectedRuns.flatMap((run) => known.get(run.id)?.names ?? []))].sort();
  const rows = names.map((name) => [name, explain(name, mine.explanations)])
    .filter(([name, meaning]) => words.every((word) => `${name} ${meaning}`.toLowerCase().includes(word)))
    // a name that has the words comes before a meaning that has them
    .sort((a, b) => words.every((w) => b[0].includes(w)) - words.every((w) => a[0].includes(w)));
  mine.found.replaceChildren(...rows.slice(0, MAX_FOUND).map(([name, meaning]) =>
    el("button", { class: "hit", onclick: () => add(mine, name) }, el("b", {}, name), " ", el("span", { class: "quiet" }, meaning))));
  if (!rows.length) mine.found.append(el("span", { class: "quiet" }, "no metric of these runs has this in its name or meaning"));
  if (rows.length > MAX_FOUND) mine.found.append(el("span", { class: "quiet" }, `and ${rows.length - MAX_FOUND} more`));
}

async function add(mine, name) {
  mine.settings.show = [name, ...mine.settings.show.filter((key) => key !== name)];
  mine.bar.querySelector("input[type=search]").value = "";
  listFound(mine, "");
  save(mine);
  await refresh(mine, true);
}

function remove(mine, key) {
  mine.settings.show = mine.settings.show.filter((one) => one !== key);
  save(mine);
  drawAll(mine);
}

// Fetches what is new, and draws if there was anything.
async function refresh(mine, always) {
  const names = [...new Set(mine.settings.show.flatMap((key) => metricsOf(panelOf(key)))), "time/*"];
  let changed = always;
  for (const run of mine.context.selectedRuns) {
    if (!known.has(run.id)) known.set(run.id, new RunData(run.id));
    try {
      changed = (await known.get(run.id).refresh(mine.context.api, names, mine.stop.signal)) || changed;
    } catch (error) {
      if (mine.stop.signal.aborted) return;
      throw error;
    }
  }
  if (tab !== mine || !changed) return;
  drawAll(mine);
  await mine.idle?.refresh();
}

function drawAll(mine) {
  const runs = mine.context.selectedRuns.map((run) => known.get(run.id)).filter(Boolean);
  const unit = mine.settings.axis === "time" ? timeUnit(Math.max(0, ...runs.map((run) => run.seconds()))) : null;
  for (const [key, chart] of mine.charts) {
    if (mine.settings.show.includes(key)) continue;
    chart.destroy();
    chart.element.remove();
    mine.charts.delete(key);
  }
  for (const key of mine.settings.show) {
    if (!mine.charts.has(key)) mine.charts.set(key, makeChart(mine, key));
    drawChart(mine, key, runs, unit);
  }
  const elements = mine.settings.show.map((key) => mine.charts.get(key).element).filter((one) => !one.hidden);
  if (elements.some((one, index) => mine.grid.children[index] !== one) || mine.grid.children.length !== elements.length) {
    mine.grid.replaceChildren(...elements);
  }
  drawNotes(mine, runs, unit);
  drawEventList(mine, runs);
}

function makeChart(mine, key) {
  const panel = panelOf(key);
  const log = el("button", { class: "small", title: "logarithmic y axis", "aria-pressed": "false", onclick: () => {
    if (!mine.settings.flipped.delete(key)) mine.settings.flipped.add(key);
    save(mine);
    drawAll(mine);
  } }, "log");
  const close = el("button", { class: "small", title: "remove", "aria-label": `Remove ${panel.title}`, onclick: () => remove(mine, key) }, "×");
  const help = panel.metrics.map(([name]) => `${name}: ${explain(name, mine.explanations)}`).join("\n");
  const chart = new Chart(panel.title, { help, key, buttons: [log, close] });
  chart.logButton = log;
  return chart;
}

function drawChart(mine, key, runs, unit) {
  const { axis, smooth, flipped } = mine.settings;
  const panel = panelOf(key), chart = mine.charts.get(key);
  const log = Boolean(panel.log) !== flipped.has(key);
  chart.logButton.setAttribute("aria-pressed", String(log));
  const curves = [], series = [], bands = [];
  const addCurve = (curve, options) => series.push({ ...options }) && curves.push(scaled(curve, unit, log));
  for (const run of runs) {
    const color = mine.context.colorOf(run.id);
    const several = runs.length > 1 ? `${run.id} ` : "";
    panel.metrics.forEach(([name, label], index) => {
      const [x, y] = run.curve(name, axis);
      if (!x.length) return;
      const ends = index === 0 ? bandOf(panel, run, axis, [x, y]) : null;
      if (ends) {
        addCurve(ends.high, { label: `${run.id} high`, hidden: true });
        addCurve(ends.low, { label: `${run.id} low`, hidden: true });
        bands.push([curves.length - 1, curves.length, `${color}2b`]);
      }
      if (smooth) addCurve([x, y], { label: `${run.id} ${name} raw`, color, faint: true });
      const text = panel.metrics.length > 1 || !several ? `${several}${label}` : run.id;
      addCurve([x, smoothed(y, smooth)], { label: text, color, dash: dash(index) });
    });
  }
  chart.element.hidden = !curves.length && key in PANELS;
  if (chart.element.hidden) return;
  const events = runs.flatMap((run) => run.events.filter((event) => concerns(panel, event)).map((event) => ({
    ...event, x: run.place(event[axis], axis) / (unit?.divisor ?? 1),
  })));
  chart.draw({ data: joined(curves), series, bands, events, log, sync: "curves", xLabel: unit?.name ?? AXES[axis] });
}

// Upper and lower curve around [x, y]; null if the panel or the run has none.
function bandOf(panel, run, axis, [x, y]) {
  if (panel.spread) {
    const [atX, spread] = run.curve(panel.spread, axis);
    const by = new Map(atX.map((place, index) => [place, spread[index]]));
    const end = (sign) => y.map((value, i) => (value === null || by.get(x[i]) == null ? null : value + sign * by.get(x[i])));
    return { high: [x, end(1)], low: [x, end(-1)] };
  }
  if (!panel.band) return null;
  const [low, high] = panel.band.map((name) => run.curve(name, axis));
  return low[0].length ? { low, high } : null;
}

function scaled([x, y], unit, log) {
  return [unit ? x.map((value) => value / unit.divisor) : x, log ? y.map((v) => (v !== null && v > 0 ? v : null)) : y];
}

function drawNotes(mine, runs, unit) {
  const lines = runs.flatMap((run) => {
    if (run.error) return [[`${run.id}: ${run.error}`, "bad"]];
    if (!run.records) return [[`${run.id} has no metrics yet; the page waits for them`, "quiet"]];
    return run.badLines ? [[`${run.id}: ${run.badLines} lines of metrics.jsonl are no records and are left out`, "bad"]] : [];
  });
  const axis = unit ? `x: ${unit.name} since the run began` : `x: ${AXES[mine.settings.axis]}`;
  mine.notes.replaceChildren(...lines.map(([text, kind]) => el("p", { class: kind }, text)),
    el("p", { class: "quiet hint" }, `${axis}. Drag zooms, a double click zooms out, arrow keys move the cursor.`));
}

function drawEventList(mine, runs) {
  const several = runs.length > 1;
  const entries = runs.flatMap((run) => run.events.map((event) => el("li", { class: event.kind },
    `${several ? `${run.id}: ` : ""}${event.name} `, el("span", { class: "quiet" }, `step ${number(event.step)}`))));
  mine.events.replaceChildren(...entries);
  mine.events.hidden = !entries.length;
}
