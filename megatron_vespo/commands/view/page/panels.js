// Which metrics are shown together, and how.

// `metrics`: [name, label]; the n-th has the n-th dash. `band`: [low, high] metrics around the first one;
// `spread`: its standard deviation. `alarms`: those that are about this panel.
export const PANELS = {
  reward: { title: "Reward", metrics: [["reward/mean", "mean"]], alarms: ["reward collapse", "equal groups"] },
  accuracy: {
    title: "Held-out accuracy", metrics: [["eval/accuracy", "accuracy"]],
    band: ["eval/interval_low", "eval/interval_high"], bandLabel: "95% interval",
  },
  log_w: {
    title: "log W of a response", metrics: [["ratio/log_w_mean", "mean"]], spread: "ratio/log_w_std",
    bandLabel: "± std", alarms: ["passes differ"],
  },
  log_w_parts: {
    title: "Spread of log W by part", alarms: ["engine mismatch"],
    metrics: [["ratio/staleness_std", "staleness"], ["ratio/mismatch_std", "engine mismatch"], ["ratio/floor_std", "rounding"]],
  },
  weight: {
    title: "Weight by sign of A", alarms: ["dead sequences"],
    metrics: [["weight/mean/positive", "A > 0"], ["weight/mean/negative", "A < 0"]],
  },
  ess: {
    title: "Effective sample size", alarms: ["ess collapse", "dead sequences"],
    metrics: [["weight/ess", "ESS"], ["weight/dead_share", "dead share"]],
  },
  length: {
    title: "Response length (tokens)", alarms: ["truncated responses"],
    metrics: [["response/length_mean", "mean"], ["response/length_p90", "90th percentile"]],
  },
  entropy: {
    title: "Entropy (nats per token)", metrics: [["train/entropy", "entropy"]],
    alarms: ["entropy collapse", "entropy explosion"],
  },
  gradient: {
    title: "Gradient norm", alarms: ["gradient spike"], log: true,
    metrics: [["train/grad_norm", "mean"], ["train/grad_norm_max", "largest"]],
  },
  speed: {
    title: "Tokens per second",
    metrics: [["rollout/tokens_per_second", "generated"], ["train/tokens_per_second", "trained"]],
  },
};

const KNOWN_ALARMS = new Set(Object.values(PANELS).flatMap((panel) => panel.alarms ?? []));

// A panel by its key: one of PANELS, or the name of any metric.
export function panelOf(key) {
  return PANELS[key] ?? { title: key, metrics: [[key, key.split("/").slice(1).join("/") || key]] };
}

export function metricsOf(panel) {
  return [...panel.metrics.map(([name]) => name), ...(panel.band ?? []), ...(panel.spread ? [panel.spread] : [])];
}

// Whether the panel marks this event: restarts are marked everywhere, alarms where they belong.
export function concerns(panel, event) {
  if (event.kind !== "alarm") return true;
  if (!panel.alarms) return !KNOWN_ALARMS.has(event.name) || !Object.values(PANELS).includes(panel);
  return panel.alarms.includes(event.name);
}

// The explanation of a metric; the page of metrics writes <name> for any text.
export function explain(name, explanations) {
  if (name in explanations) return explanations[name];
  for (const [pattern, text] of Object.entries(explanations)) {
    if (!pattern.includes("<")) continue;
    const escaped = pattern.split(/<\w+>/).map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    if (new RegExp(`^${escaped.join(".+")}$`).test(name)) return text;
  }
  return "";
}
