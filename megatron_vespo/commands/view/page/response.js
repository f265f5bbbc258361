// One response: its numbers, the prompt, and log W per token in colours, as a curve, and as the ten tokens
// that decided it.

import { el, number } from "./dom.js";
import { linkTo, signed } from "./links.js";
import { RunningChart, landmarkText } from "./running.js";
import { LEVELS, TokenText, automaticLimit, level, quoted } from "./tokens.js";

const DECISIVE = 10;
const MODES = {
  total: ["log(π/μ)", "total", "all of the token's log ratio"],
  staleness: ["staleness: log(π/π_old)", "staleness_per_token", "what the optimizer steps since the rollout changed"],
  mismatch: ["engine mismatch: log(π_old/μ)", "mismatch_per_token", "what trainer and engine compute differently"],
  experts: ["experts that differ", "expert_differences", "experts of the engine that the trainer's router would not have chosen, over layers"],
  advantage: ["A of the token", "advantages_per_token", "the reward's and the teacher's advantage of the token"],
};
const MISSING = { expert_differences: "no experts were replayed", advantages_per_token: "all tokens have the response's A" };

const LIMITS = ["auto", "0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "5"];

export async function renderResponse(place, step, index) {
  const { element, context, run, signal } = place;
  const detail = await context.api.get(`runs/${run.id}/responses/${step}/${index}`, {}, signal);
  const info = el("div", { class: "token-info", "aria-live": "polite" }, el("p", { class: "quiet" }, "Point at a token, or move with the arrow keys."));
  const legend = el("div", { class: "legend" });
  const show = (token) => info.replaceChildren(tokenInfo(detail, text, token));
  const text = new TokenText(detail,
    (token) => { show(token); chart.show(text.sampledOf[token]); },
    (token) => { context.setParams({ token }); });
  const toToken = (n, reveal) => {
    const token = text.tokenOf[n];
    if (token === undefined) return;
    text.point(token, false);
    show(token);
    chart.show(n);
    if (reveal) { text.reveal(token); context.setParams({ token }); }
  };
  const chart = new RunningChart(detail, (n) => toToken(n, false), (n) => toToken(n, true));
  element.append(
    navigation(detail),
    numbers(detail),
    promptOf(detail),
    el("div", { class: "response" },
      el("div", { class: "reading" }, controls(detail, text, legend, context), legend, text.element),
      el("aside", { class: "beside" },
        el("h2", {}, "log W after each token"),
        detail.running.why_not ? el("p", { class: "bad" }, `log W is unknown here: ${detail.running.why_not}`) : null,
        chart.element,
        difference(detail),
        info,
        decisive(detail, text, toToken),
        el("p", { class: "quiet landmarks" }, landmarkText(detail)))),
  );
  if (detail.length) chart.draw();
  signal.addEventListener("abort", () => chart.destroy());
  const token = Number(context.params.token ?? -1);
  if (token >= 0) { text.point(token); text.reveal(token); }
}

function navigation(detail) {
  const sibling = (index, label) => el("a", { href: linkTo("responses", { open: `${detail.step}.${index}`, token: null }) }, label);
  return el("p", { class: "links" },
    el("a", { href: linkTo("responses", { open: null, token: null }) }, "← all responses"),
    el("a", { href: linkTo("responses", { open: null, token: null, side: `${detail.step}.${detail.group}` }) }, "all responses to this prompt"),
    detail.index > 0 ? sibling(detail.index - 1, "‹ previous") : null,
    detail.index + 1 < detail.responses ? sibling(detail.index + 1, "next ›") : null);
}

function numbers(detail) {
  const unknown = "unknown: pi_old was not computed";
  const known = (value) => (value === null ? unknown : signed(value));
  const rows = [
    ["Step", `${detail.step}, mini-batch ${detail.mini_batch} of its rollout batch`], ["Response", detail.index],
    ["Prompt", `${detail.prompt_id}${detail.source ? `, ${detail.source}` : ""}`],
    ["Reward", number(detail.reward) + (detail.overlong_penalty ? ` ${signed(detail.overlong_penalty)} for length` : "")],
    ...Object.entries(detail.reward_parts).map(([name, value]) => [`Reward part ${name}`, number(value)]),
    detail.turn_rewards.length ? ["Rewards of turns", detail.turn_rewards.map((value) => number(value)).join(", ")] : null,
    detail.status === "ok" ? null : ["Reward status", detail.status],
    detail.environment_error ? ["Environment's error", detail.environment_error] : null,
    [detail.advantages_per_token ? "A, mean of its tokens" : "A", signed(detail.advantage)], ["log W", signed(detail.log_w), "log-w"], ["φ, the weight", number(detail.weight), "weight"],
    ["Staleness part of log W", known(detail.staleness_in_w)], ["Engine mismatch part of log W", known(detail.mismatch_in_w)],
    ["log(π_old/μ) of the response", known(detail.mismatch)],
    detail.correction === 1 ? null : ["Mismatch correction", number(detail.correction)],
    detail.rejected ? ["Tokens whose correction is 0", `${number(100 * detail.rejected)}%`] : null,
    ["Sampled tokens N", number(detail.length)], ["Given tokens", number(detail.given)],
    ["Lag", detail.lag === null ? "–" : `${detail.lag} optimizer step${detail.lag === 1 ? "" : "s"}`],
    ["Policy versions", detail.versions.map(([version, count]) => `${version} (${number(count)} tokens)`).join(", ") || "–"],
    ["Finish reason", detail.finish], ["Temperature", number(detail.temperature)],
    detail.num_retractions ? ["Retractions", detail.num_retractions] : null,
    ["Loss", `${detail.settings.policy_loss ?? "unknown"}, W of ${detail.settings.ratio_denominator ?? "an unknown denominator"}`],
    Object.keys(detail.reward_data).length ? ["Reward data", JSON.stringify(detail.reward_data)] : null,
  ].filter(Boolean);
  return el("dl", { class: "facts" }, rows.map(([name, value, id]) =>
    el("div", {}, el("dt", {}, name), el("dd", { "data-fact": id ?? null }, String(value)))));
}

function promptOf({ prompt }) {
  return el("details", { class: "prompt", open: true }, el("summary", {}, `Prompt · ${number(prompt.length)} tokens`),
    el("pre", {}, prompt.text || prompt.tokens || "(no text)"),
    prompt.answer ? el("p", { class: "quiet" }, `Reference answer: ${prompt.answer}`) : null,
    prompt.tokens && prompt.tokens !== prompt.text ? el("details", {}, el("summary", {}, "as the model reads it"), el("pre", {}, prompt.tokens)) : null);
}

function controls(detail, text, legend, context) {
  const chosen = () => (detail[MODES[context.params.color]?.[1]] ? context.params.color : "total");
  const paint = () => {
    const mode = chosen(), values = detail[MODES[mode][1]], scale = context.params.scale ?? "auto";
    const limit = scale === "auto" ? automaticLimit(values) : Number(scale);
    text.paint(mode === "experts" ? (n) => level(values[n], limit).replace("p", "e") : (n) => level(values[n], limit));
    legend.replaceChildren(...legendOf(mode, limit));
  };
  const buttons = Object.entries(MODES).map(([mode, [label, field, hint]]) => {
    const missing = detail[field] === null;
    const why = MISSING[field] ?? "unknown: pi_old was not computed";
    return el("label", { class: missing ? "choice missing" : "choice", title: missing ? why : hint },
      el("input", { type: "radio", name: "color", value: mode, disabled: missing, checked: mode === chosen(), onchange: () => { context.setParams({ color: mode }); paint(); } }),
      label, missing ? el("span", { class: "quiet" }, ` (${why})`) : null);
  });
  const scale = el("select", { "aria-label": "Colour scale", onchange: (event) => { context.setParams({ scale: event.target.value }); paint(); } },
    LIMITS.map((one) => el("option", { value: one, selected: one === (context.params.scale ?? "auto") }, one === "auto" ? "auto" : `±${one}`)));
  paint();
  return el("fieldset", { class: "controls" }, el("legend", {}, "Colour by"), buttons, el("label", { class: "choice" }, "scale ", scale));
}

function legendOf(mode, limit) {
  const swatches = [];
  for (let step = -LEVELS; step <= LEVELS; step++) {
    if (mode === "experts" && step < 0) continue;
    swatches.push(el("span", { class: step === 0 ? "" : mode === "experts" ? `e${step}` : step < 0 ? `n${-step}` : `p${step}` }, "\u00a0"));
  }
  const [down, up] = mode === "advantage" ? ["pushed down", "pushed up"] : ["less likely now", "more likely now"];
  const ends = mode === "experts" ? ["0", `${number(limit, 3)} or more`] : [`${signed(-limit, 3)}: ${down}`, `${signed(limit, 3)}: ${up}`];
  return [el("span", {}, ends[0]), el("span", { class: "swatches" }, swatches), el("span", {}, ends[1]), el("span", { class: "given-key" }, "given")];
}

function difference({ running }) {
  const off = running.difference;
  if (off === null || Math.abs(off) < 1e-3) return null;
  return el("p", { class: "bad" }, `The sum of the tokens differs from the trainer's log W by ${signed(off)}.`);
}

function tokenInfo(detail, text, token) {
  const n = text.sampledOf[token], id = detail.token_ids[token];
  const rows = [["Token", quoted(detail.pieces[token], id)], ["Id", id], ["Position", `${token + 1} of ${detail.token_ids.length} after the prompt`]];
  if (n < 0) {
    rows.push(["Given", "written by a tool or an environment: no log-prob, not trained"]);
  } else {
    const part = (values) => (values === null ? "unknown: pi_old was not computed" : signed(values[n]));
    const value = (values) => (values === null ? "unknown" : signed(values[n], 6));
    rows.push(
      ["Sampled token", `${n + 1} of ${detail.length}`], ["log π", value(detail.log_pi)], ["log π_old", value(detail.log_pi_old)], ["log μ", value(detail.log_mu)],
      ["log(π/μ)", signed(detail.total[n]), "ratio"], ["staleness", part(detail.staleness_per_token), "staleness"], ["engine mismatch", part(detail.mismatch_per_token), "mismatch"],
      ["adds to log W", detail.running.own === null ? "unknown" : signed(detail.running.own[n])],
      ["log W so far", detail.running.log_w === null ? "unknown" : signed(detail.running.log_w[n]), "log-w-so-far"],
      ...(detail.advantages_per_token ? [["A of the token", signed(detail.advantages_per_token[n]), "advantage"]] : []),
      ["φ(W) so far", detail.running.phi === null ? "unknown" : number(detail.running.phi[n])],
      ["Policy version", versionOf(detail, n)]);
    if (detail.expert_differences !== null) rows.push(["Experts that differ", detail.expert_differences[n]]);
  }
  return el("dl", { class: "token-facts" }, rows.map(([name, value, id_]) =>
    el("div", {}, el("dt", {}, name), el("dd", { "data-value": id_ ?? null }, String(value)))));
}

function versionOf(detail, n) {
  let before = 0;
  for (const [version, count] of detail.versions) {
    before += count;
    if (n < before) return version;
  }
  return "–";
}

function decisive(detail, text, toToken) {
  const values = detail.running.own ?? detail.total;
  const order = values.map((value, n) => [Math.abs(value ?? 0), n]).sort((a, b) => b[0] - a[0]).slice(0, DECISIVE);
  return el("section", { "aria-label": "Decisive tokens" }, el("h2", {}, `The ${order.length} tokens that decided ${detail.running.own ? "log W" : "Σ log(π/μ)"}`),
    el("ol", { class: "decisive" }, order.map(([, n]) => {
      const token = text.tokenOf[n];
      return el("li", {}, el("button", { "data-jump": token, onclick: () => toToken(n, true) },
        el("code", {}, quoted(detail.pieces[token], detail.token_ids[token])), el("span", { class: "quiet" }, ` at ${token + 1} `), el("span", { class: "number" }, signed(values[n]))));
    })));
}
