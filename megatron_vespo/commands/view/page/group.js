// All responses to one prompt in an optimizer step, side by side.

import { el, number } from "./dom.js";
import { linkTo, signed } from "./links.js";

const NUMBERS = [
  ["reward", "Reward", number], ["advantage", "A", signed], ["log_w", "log W", signed], ["weight", "φ", number],
  ["staleness", "Staleness part", signed], ["mismatch", "Mismatch part", signed], ["length", "N", number],
  ["given", "Given tokens", number], ["lag", "Lag", number], ["finish", "Finish", String],
];

export async function renderGroup({ element, context, run, signal }, step, group) {
  const answer = await context.api.get(`runs/${run.id}/groups/${step}/${group}`, {}, signal);
  element.append(
    el("p", {}, el("a", { href: linkTo("responses", { side: null }) }, "← all responses")),
    el("h2", {}, `Step ${step}, group ${group}: ${answer.rows.length} responses`),
    el("section", { class: "prompt", "aria-label": "Prompt" },
      el("pre", {}, answer.prompt.text || answer.prompt.tokens),
      answer.prompt.answer ? el("p", { class: "quiet" }, `Reference answer: ${answer.prompt.answer}`) : null),
    el("div", { class: "side-by-side" }, answer.rows.map(card)),
  );
}

function card(row) {
  const largest = 4; // bars beyond e^4 have the same length
  const bar = el("span", { class: row.log_w < 0 ? "bar negative" : "bar positive" });
  bar.style.width = `${(Math.min(Math.abs(row.log_w ?? 0), largest) / largest) * 50}%`;
  return el("article", { class: "card", "data-row": `${row.step}.${row.index}` },
    el("h3", {}, el("a", { href: linkTo("responses", { side: null, open: `${row.step}.${row.index}` }) }, `Response ${row.index}`)),
    el("div", { class: "bar-line", title: "log W from −4 to 4" }, bar),
    el("table", { class: "numbers" }, el("tbody", {}, NUMBERS.map(([name, label, show]) =>
      el("tr", {}, el("th", {}, label), el("td", { class: "number" }, row[name] === null ? "unknown" : show(row[name])))))),
    el("pre", { class: "text" }, row.text || "(no text)"),
  );
}
