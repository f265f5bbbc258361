// The tab Responses: the table with its filters, the responses of a prompt side by side, or one response.
//
// State in the hash: run, the filters, sort, page; open=STEP.INDEX for one response, side=STEP.GROUP for a group.

import { el, number } from "./dom.js";
import { renderGroup } from "./group.js";
import { renderResponse } from "./response.js";
import { linkTo, signed } from "./links.js";

const TYPING_MS = 250; // after the last key, until a filter counts
const DEFAULT_SORT = "-step";
const ANY = "any";
const NUMBER_FILTERS = [
  ["step", "Step", "step_min", "step_max", "1"],
  ["reward", "Reward", "reward_min", "reward_max", "any"],
  ["length", "Length N", "length_min", "length_max", "1"],
  ["lag", "Staleness", "staleness_min", "staleness_max", "1"],
  ["log_w", "log W", "log_w_min", "log_w_max", "any"],
];
const CHOICES = [["sign", "Sign of A"], ["finish", "Finish reason"], ["status", "Reward status"], ["source", "Source"]];
const FILTERS = [...NUMBER_FILTERS.flatMap((one) => [one[2], one[3]]), ...CHOICES.map((one) => one[0]), "group", "text"];
const COLUMNS = [
  ["step", "Step", "optimizer steps done, this one included"],
  ["group", "Group", "responses to one prompt; opens them side by side"],
  ["prompt_id", "Prompt", "row of the prompt file"],
  ["source", "Source", "data source of the prompt"],
  ["reward", "Reward", "the task's reward"],
  ["advantage", "A", "advantage"],
  ["log_w", "log W", "log of the product of importance ratios of the response"],
  ["weight", "φ", "what multiplies A grad log π: φ(W) for VESPO"],
  ["staleness", "Stale", "staleness part of log W: log(π / π_old)"],
  ["mismatch", "Mism.", "engine mismatch part of log W: log(π_old / μ), as far as it is in W"],
  ["length", "N", "sampled tokens"],
  ["given", "Given", "tokens that a tool or an environment wrote"],
  ["lag", "Lag", "optimizer steps between the oldest token's policy and this step"],
  ["finish", "Finish", "why generation ended"],
];

let unmounted = new AbortController();

export async function mount(element, context) {
  unmounted = new AbortController();
  const run = chosenRun(context);
  if (run === undefined) {
    element.append(el("p", { class: "quiet" }, "No run is chosen."));
    return;
  }
  const place = { element, context, run, signal: unmounted.signal };
  const { open, side } = context.params;
  element.append(runChoice(context, run));
  if (open) await renderResponse(place, ...open.split("."));
  else if (side) await renderGroup(place, ...side.split("."));
  else await renderTable(place);
}

export function unmount() {
  unmounted.abort();
}

function chosenRun(context) {
  const found = context.runs.find((run) => run.id === context.params.run);
  return found ?? context.selectedRuns.find((run) => run.has_responses) ?? context.selectedRuns[0];
}

// Which run is shown: this tab looks at one.
export function runChoice(context, run) {
  if (context.runs.length < 2) return el("span");
  const select = el(
    "select",
    { "aria-label": "Run", onchange: (event) => context.navigate(context.tab ?? location.hash.slice(1).split("?")[0], { run: event.target.value }) },
    context.runs.map((one) => el("option", { value: one.id, selected: one.id === run.id }, one.id)),
  );
  return el("label", { class: "field run-choice" }, el("span", {}, "Run"), select);
}

async function renderTable(place) {
  const { element, context, run } = place;
  const parts = { form: null, summary: el("p", { class: "quiet", role: "status" }), table: el("div", { class: "scroll" }), pages: el("div", { class: "pages" }) };
  let shown = "";
  let request = new AbortController();

  async function load() {
    request.abort();
    request = new AbortController();
    const signal = AbortSignal.any([place.signal, request.signal]);
    let answer;
    try {
      answer = await context.api.get(`runs/${run.id}/responses`, tableParams(context.params), signal);
    } catch (error) {
      if (signal.aborted) return;
      parts.summary.textContent = error.message;
      parts.summary.classList.add("bad");
      return;
    }
    const text = JSON.stringify(answer);
    if (text === shown) return; // nothing new: focus and selection stay
    shown = text;
    parts.summary.classList.remove("bad");
    parts.form.update(answer);
    parts.summary.replaceChildren(...summaryOf(answer, run));
    parts.table.replaceChildren(answer.index.files ? tableOf(answer, context, change) : howToRecord());
    parts.pages.replaceChildren(...pagesOf(answer, change));
  }

  function change(changes) {
    context.setParams({ page: null, ...changes });
    return load();
  }

  parts.form = filterForm(context, change);
  element.append(parts.form.element, parts.summary, parts.table, parts.pages);
  await load();
  context.every(load);
}

function tableParams(params) {
  const names = [...FILTERS, "sort", "page"];
  return Object.fromEntries(names.map((name) => [name, params[name]]));
}

function howToRecord() {
  return el("p", { class: "quiet" }, "This run has no recorded responses. --record-responses of train records them.");
}

function summaryOf({ total, index }, run) {
  const parts = [`${number(total)} of ${number(index.responses)} responses`];
  if (index.indexed < index.files) parts.push(` · ${index.indexed} of ${index.files} step files are indexed`);
  if (index.problem) parts.push(el("span", { class: "bad" }, ` · ${index.problem}`));
  if (index.damaged.length) {
    parts.push(el("details", { class: "damaged" },
      el("summary", {}, `${index.damaged.length} damaged step files are left out`),
      el("ul", {}, index.damaged.map((line) => el("li", {}, line)))));
  }
  return parts;
}

function filterForm(context, change) {
  const params = context.params;
  let timer = 0;
  const later = (name) => (event) => {
    clearTimeout(timer);
    const value = event.target.value;
    timer = setTimeout(() => change({ [name]: value }), TYPING_MS);
  };
  const input = (name, label, step, hint = "") =>
    el("input", { type: "number", step, name, value: params[name] ?? "", "aria-label": label, placeholder: hint, oninput: later(name) });
  const ranges = {};
  const fields = NUMBER_FILTERS.map(([facet, label, low, high, step]) => {
    ranges[facet] = [input(low, `${label} from`, step), input(high, `${label} to`, step)];
    return el("div", { class: "field" }, el("span", {}, label), el("span", { class: "range" }, ranges[facet][0], "–", ranges[facet][1]));
  });
  const selects = Object.fromEntries(CHOICES.map(([name, label]) => [
    name, el("select", { name, "aria-label": label, onchange: (event) => change({ [name]: event.target.value }) }),
  ]));
  const search = el("input", {
    type: "search", name: "text", value: params.text ?? "", "aria-label": "Search in the text", oninput: later("text"),
    placeholder: 'words, or "words side by side"', class: "wide",
  });
  const form = el("form", { class: "filters", onsubmit: (event) => event.preventDefault() },
    el("label", { class: "field" }, el("span", {}, "Search"), search),
    fields,
    CHOICES.map(([name, label]) => el("label", { class: "field" }, el("span", {}, label), selects[name])),
    el("label", { class: "field" }, el("span", {}, "Group"), input("group", "Group", "1")),
    el("button", { type: "button", class: "clear", onclick: () => context.navigate("responses", { run: params.run }) }, "Clear"),
  );
  function update({ facets }) {
    for (const [name] of CHOICES) fillSelect(selects[name], facets[name], context.params[name] ?? "");
    for (const [facet, inputs] of Object.entries(ranges)) {
      inputs.forEach((one, i) => { one.placeholder = facets[facet][i] === null ? "" : number(facets[facet][i], 3); });
    }
  }
  return { element: form, update };
}

function fillSelect(select, counts, value) {
  const names = Object.keys(counts);
  if (value && !names.includes(value)) names.push(value);
  select.replaceChildren(
    el("option", { value: "" }, ANY),
    ...names.map((name) => el("option", { value: name }, `${name} (${number(counts[name] ?? 0)})`)),
  );
  select.value = value;
}

function tableOf(answer, context, change) {
  const sort = context.params.sort ?? DEFAULT_SORT;
  const head = COLUMNS.map(([name, label, hint]) => {
    const order = sort === name ? "ascending" : sort === `-${name}` ? "descending" : null;
    const next = sort === `-${name}` ? name : `-${name}`;
    const arrow = order === "ascending" ? " ▲" : order === "descending" ? " ▼" : "";
    return el("th", { "aria-sort": order, title: hint, class: isText(name) ? null : "number" },
      el("button", { class: "sort", "data-sort": name, onclick: () => change({ sort: next }) }, label + arrow));
  });
  const rows = answer.rows.map((row) =>
    el("tr", { "data-row": `${row.step}.${row.index}` },
      COLUMNS.map(([name]) => el("td", { class: isText(name) ? null : "number" }, cell(name, row))),
      el("td", { class: "preview" }, el("a", { href: linkTo("responses", { open: `${row.step}.${row.index}` }) }, row.text || "(no text)")),
    ));
  return el("table", { class: "responses" }, el("thead", {}, el("tr", {}, head, el("th", {}, "Response"))), el("tbody", {}, rows));
}

function isText(name) {
  return name === "source" || name === "finish";
}

function cell(name, row) {
  const value = row[name];
  if (name === "group") return el("a", { href: linkTo("responses", { side: `${row.step}.${value}` }), title: "side by side" }, String(value));
  if (name === "step" || name === "prompt_id") return value === null ? "–" : String(value);
  if (name === "finish") return row.status === "ok" ? value : `${value}, reward: ${row.status}`;
  if (name === "source") return value ?? "–";
  if (["advantage", "log_w", "staleness", "mismatch"].includes(name)) return signed(value);
  return number(value);
}

function pagesOf({ total, page, page_size: size }, change) {
  const last = Math.max(0, Math.ceil(total / size) - 1);
  const go = (to, label, name) => el("button", { disabled: to < 0 || to > last || to === page, "aria-label": name, onclick: () => change({ page: to || null }) }, label);
  return [go(0, "«", "First page"), go(page - 1, "‹", "Page before"), el("span", {}, `page ${page + 1} of ${last + 1}`),
    go(page + 1, "›", "Next page"), go(last, "»", "Last page")];
}
