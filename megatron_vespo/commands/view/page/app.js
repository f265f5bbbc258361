// The shell: runs, tabs, and the address's hash, which holds the whole state: #TAB?runs=a,b&name=value.
//
// A tab is a module with `mount(element, context)` and `unmount()`. Its context:
//   api.get(path, params)      JSON of /api/PATH
//   runs                       all runs, as /api/runs describes them; renewed every two seconds
//   selectedRuns               those that are chosen, in the order of their colours (colorOf(id))
//   params                     the tab's own part of the hash, an object of strings
//   setParams(changes)         changes it without a new mount; null removes an entry
//   navigate(tab, params)      another tab, or this one anew
//   every(callback)            called every two seconds while the page is seen, until unmount
// A change of tab, of runs, or of the hash by hand mounts anew.

import * as api from "./api.js";
import { color, duration, el } from "./dom.js";

const POLL_MS = 2000;
const TABS = { curves: "Curves", responses: "Responses", distributions: "Distributions", compare: "Compare" };

const view = document.getElementById("view");
const state = { tab: "curves", params: {}, runs: [], chosen: null, module: null, callbacks: [], mounted: 0 };

function readHash() {
  const [tab, query] = location.hash.slice(1).split("?");
  const params = Object.fromEntries(new URLSearchParams(query ?? ""));
  const chosen = params.runs === undefined ? null : params.runs.split(",").filter(Boolean);
  delete params.runs;
  return { tab: tab in TABS ? tab : "curves", params, chosen };
}

function hashOf(tab, params, chosen) {
  const query = new URLSearchParams();
  if (chosen !== null) query.set("runs", chosen.join(","));
  for (const [name, value] of Object.entries(params)) {
    if (value !== null && value !== undefined && value !== "") query.set(name, value);
  }
  const text = query.toString().replaceAll("%2C", ",").replaceAll("%2F", "/");
  return `#${tab}${text ? `?${text}` : ""}`;
}

function selectedRuns() {
  if (state.chosen === null) return state.runs.filter((run) => !run.gone).slice(0, 6);
  return state.runs.filter((run) => state.chosen.includes(run.id));
}

function colorOf(id) {
  return color(Math.max(0, state.runs.findIndex((run) => run.id === id)));
}

function setStatus(text, bad = false) {
  const status = document.getElementById("status");
  status.textContent = text;
  status.classList.toggle("bad", bad);
}

function drawTabs() {
  const nav = document.getElementById("tabs");
  nav.replaceChildren(
    ...Object.entries(TABS).map(([tab, name]) =>
      el("a", { href: hashOf(tab, {}, state.chosen), "aria-current": tab === state.tab ? "page" : null }, name),
    ),
  );
}

function stateOf(run) {
  if (run.gone) return "its folder has gone";
  if (run.finished) return "finished";
  if (run.modified === null) return "no metrics yet";
  const age = Math.max(0, Date.now() / 1000 - run.modified);
  return age < 60 ? "writing" : `last record ${duration(age)} ago`;
}

// Elements stay while the same runs are there: a click must not meet a box that was just replaced.
function drawRuns() {
  const box = document.getElementById("runs");
  if ([...box.children].map((label) => label.dataset.run).join() !== state.runs.map((run) => run.id).join()) {
    box.replaceChildren(...state.runs.map((run) => {
      const check = el("input", { type: "checkbox", value: run.id, onchange: () => toggle(run.id) });
      const mark = el("span", { class: "swatch", style: { background: colorOf(run.id) } });
      return el("label", { class: "run", title: run.path, "data-run": run.id }, check, mark, el("b", {}, run.id),
        el("span", { class: "state" }));
    }));
  }
  const ids = new Set(selectedRuns().map((run) => run.id));
  state.runs.forEach((run, index) => {
    const label = box.children[index];
    label.querySelector("input").checked = ids.has(run.id);
    const said = label.querySelector(".state");
    if (said.textContent !== stateOf(run)) said.textContent = stateOf(run);
    said.classList.toggle("bad", run.gone);
  });
}

function toggle(id) {
  const ids = new Set(selectedRuns().map((run) => run.id));
  if (!ids.delete(id)) ids.add(id);
  state.chosen = state.runs.map((run) => run.id).filter((one) => ids.has(one));
  history.pushState(null, "", hashOf(state.tab, state.params, state.chosen));
  show();
}

const context = {
  api,
  colorOf,
  get runs() { return state.runs; },
  get selectedRuns() { return selectedRuns(); },
  get params() { return { ...state.params }; },
  setParams(changes) {
    state.params = { ...state.params, ...changes };
    for (const [name, value] of Object.entries(state.params)) {
      if (value === null || value === undefined || value === "") delete state.params[name];
    }
    history.replaceState(null, "", hashOf(state.tab, state.params, state.chosen));
  },
  navigate(tab, params = {}) {
    const hash = hashOf(tab, params, state.chosen);
    if (hash === location.hash) show();
    else location.hash = hash;
  },
  every(callback) { state.callbacks.push(callback); },
};

async function show() {
  const turn = ++state.mounted;
  state.callbacks = [];
  try {
    state.module?.unmount();
  } catch (error) {
    console.error(error);
  }
  state.module = null;
  drawTabs();
  drawRuns();
  const element = el("div", { class: `tab ${state.tab}` });
  view.replaceChildren(element);
  document.title = `${TABS[state.tab]} · megatron-vespo`;
  try {
    const module = await import(`./${state.tab}.js`);
    if (turn !== state.mounted) return;
    state.module = module;
    await module.mount(element, context);
  } catch (error) {
    if (turn === state.mounted) element.append(el("p", { class: "bad", role: "alert" }, error.message));
  }
}

async function poll() {
  try {
    const before = state.runs.map((run) => run.id).join();
    state.runs = await api.get("runs");
    setStatus("");
    if (state.runs.map((run) => run.id).join() !== before && state.module) return show();
    drawRuns();
  } catch (error) {
    setStatus(error.message, true);
    return undefined;
  }
  for (const callback of state.callbacks) {
    try {
      await callback();
    } catch (error) {
      setStatus(error.message, true);
    }
  }
  return undefined;
}

async function pollForever() {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    if (!document.hidden) await poll();
  }
}

window.addEventListener("hashchange", () => {
  Object.assign(state, readHash());
  show();
});

// the cookie has the token now; the address bar, and so bookmarks and the history, forget it
if (location.search) history.replaceState(null, "", `/${location.hash}`);
Object.assign(state, readHash());
try {
  state.runs = await api.get("runs");
  await show();
} catch (error) {
  setStatus(error.message, true);
  view.replaceChildren();
}
pollForever();
