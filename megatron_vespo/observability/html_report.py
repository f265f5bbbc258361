"""Writes report.html: all that a reader needs to know of a run in one file that can be mailed.

The file is made from the output folder alone. It has no script and loads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_vespo.algorithms.alarms import check
from megatron_vespo.observability.html_charts import draw
from megatron_vespo.observability.html_panels import names_of, panels, phase_names
from megatron_vespo.observability.html_parts import page, safe, table
from megatron_vespo.observability.html_samples import samples_section
from megatron_vespo.observability.html_setup import flags_section, setup_section, starts_section
from megatron_vespo.observability.mean_rewards import mean_reward
from megatron_vespo.observability.report import duration
from megatron_vespo.observability.run_files import RunFiles, outcome_of
from megatron_vespo.system.disk import write_atomically

REPORT_NAME = "report.html"
MAX_EPISODES = 5  # of one alarm
MAX_EVALUATIONS = 12
MAX_MESSAGE = 2000

GOOD = ("finished",)
OUTCOMES = {
    "finished": "The run has finished.",
    "alarm": "An alarm stopped the run.",
    "preempted": "The run was preempted.",
    "interrupted": "The run was interrupted.",
    "failed": "The run failed.",
}


def write_report(folder: Path) -> Path | None:
    """Writes report.html into a run's output folder; None if the folder has no metrics yet."""
    run = RunFiles.read(folder)
    if not run.metrics:
        return None
    path = folder / REPORT_NAME
    write_atomically(path, render(run))
    return path


def render(run: RunFiles) -> str:
    """The page about a run, also of a folder without summary.json, sample responses or a record."""
    title = f"Run {run.folder.resolve().name}"
    made = [(name, heading, _made(make, run)) for name, heading, make in SECTIONS]
    present = [section for section in made if section[2]]
    links = "".join(f'<a href="#{name}">{safe(heading)}</a> ' for name, heading, _ in present)
    body = "".join(
        f'<section id="{name}"><h2>{safe(heading)}</h2>{content}</section>'
        for name, heading, content in present
    )
    written = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = f"<h1>{safe(title, 300)}</h1>{_made(_outcome, run)}<nav>{links}</nav>"
    foot = (
        f'<p class="soft">Written {written} from {safe(run.folder.resolve())}. This file has prompts, '
        "responses, paths and the name of a machine.</p>"
    )
    return page(title, f"{head}<main>{body}</main>{foot}")


def _made(make: Callable[[RunFiles], str], run: RunFiles) -> str:
    """A part of the page. Files of another version may have other types: then one line says so."""
    try:
        return make(run)
    except Exception as error:
        return f'<p class="soft">This part could not be made: {safe(repr(error), 300)}</p>'


def _outcome(run: RunFiles) -> str:
    outcome = outcome_of(run.last_start)
    how, message = outcome.get("how"), outcome.get("message") or ""
    if how is None:
        how = "finished" if run.summary else ""
    words = OUTCOMES.get(how, "The run has not ended yet, or was killed: its record has no end.")
    steps = f"{run.last_step:,} optimizer steps are done"
    if wanted := run.argument("train_iters"):
        steps = f"{run.last_step:,} of {wanted:,} optimizer steps are done"
    kind = "good" if how in GOOD else "bad" if how in ("alarm", "failed") else ""
    said = f"<pre>\n{safe(message, MAX_MESSAGE)}</pre>" if message else ""
    return f'<div class="outcome {kind}"><strong>{words}</strong> {steps}.{said}</div>'


def _summary(run: RunFiles) -> str:
    rows: list[tuple[str, str]] = []
    if model := run.argument("hf_checkpoint"):
        rows.append(("model", f"<code>{safe(model, 300)}</code>"))
    batches, evaluations, summary = run.batches, run.evaluations, run.summary
    if evaluations:
        rows.append(("held-out accuracy", _change([e["eval/accuracy"] for e in evaluations])))
    if rewards := [record["reward/mean"] for record in batches if "reward/mean" in record]:
        rows.append(("mean training reward", _change(rewards)))
    for label, name, form in (
        ("response length", "response/length_mean", "{:,.0f} tokens"),
        ("log W, std", "ratio/log_w_std", "{:.3g}"),
        ("effective sample size", "weight/ess", "{:.1%}"),
        ("entropy", "train/entropy", "{:.3g} nats per token"),
    ):
        if values := [record[name] for record in batches if name in record]:
            rows.append((label, f"{form.format(values[0])} → {form.format(values[-1])}"))
    if loss := run.argument("policy_loss"):
        rows.append(("loss", safe(loss, 100)))
    for label, name in (("tokens trained", "train/tokens"), ("tokens generated", "rollout/tokens")):
        if total := sum(record.get(name, 0.0) for record in batches):
            rows.append((label, f"{total:,.0f}"))
    for label, key in (("training", "train_seconds"), ("set-up", "setup_seconds")):
        if (seconds := summary.get(key)) is not None:
            rows.append((label, duration(seconds)))
    if (difference := summary.get("max_logprob_difference")) is not None:
        rows.append(("max log-prob difference", f"{difference:.1e} (engine and trainer)"))
    last = batches[-1] if batches else {}
    for label, name in (("engine restarts", "engines/restarts"), ("lost requests", "engines/lost_requests")):
        if last.get(name):
            rows.append((label, f"{last[name]:.0f}"))
    if layout := summary.get("layout"):
        rows.append(("layout", safe(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in layout.items()))))
    rows += [(safe(label), f"<code>{safe(path)}</code>") for label, path in summary.get("paths", {}).items()]
    return table(rows)


def _change(values: list[float]) -> str:
    first, last = mean_reward(values[0], values), mean_reward(values[-1], values)
    return f"{first} → <strong>{last}</strong>"


def _curves(run: RunFiles) -> str:
    marks = [(first, name) for name, episodes in alarm_episodes(run.batches).items() for first, _ in episodes]
    resumes = [step for start in run.starts if (step := _step_of(start.get("resumed_from")))]
    charts = "".join(draw(panel) for panel in panels(run.metrics, sorted(marks), resumes))
    if not charts:
        return ""
    return f'<div class="charts">{charts}</div><p class="soft">Point at a curve to see its numbers.</p>'


def _step_of(checkpoint: Any) -> int | None:
    """The step of a checkpoint's folder, .../iter_0000040 -> 40."""
    found = re.search(r"iter_0*(\d+)$", str(checkpoint or ""))
    return int(found[1]) if found else None


def alarm_episodes(batches: list[dict]) -> dict[str, list[tuple[int, int]]]:
    """Alarm name -> (first step, last step) of every stretch of rollout batches in which it was on."""
    episodes: dict[str, list[tuple[int, int]]] = {}
    for metric in sorted(name for name in names_of(batches) if name.startswith("alarm/")):
        stretches: list[tuple[int, int]] = []
        was_on = False
        for record in batches:
            if is_on := metric in record:
                first = stretches.pop()[0] if was_on else record["step"]
                stretches.append((first, record["step"]))
            was_on = is_on
        episodes[metric.removeprefix("alarm/")] = stretches
    return episodes


def _alarms(run: RunFiles) -> str:
    batches, rows = run.batches, []
    for name, episodes in alarm_episodes(batches).items():
        where = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in episodes]
        more = f" and {len(where) - MAX_EPISODES} more" if len(where) > MAX_EPISODES else ""
        what = _what_an_alarm_said(name, episodes[0][0], batches)
        rows.append((safe(name.replace("_", " "), 100), ", ".join(where[:MAX_EPISODES]) + more, what))
    if not rows:
        return "<p>No alarm came on.</p>" if batches else ""
    return table(rows, ("alarm", "optimizer steps", "what it said first, and what to do"))


def _what_an_alarm_said(name: str, step: int, batches: list[dict]) -> str:
    """The rules are applied again: metrics.jsonl has the names alone."""
    number = next(i for i, record in enumerate(batches) if record["step"] == step)
    for alarm in check(batches[number], batches[:number]):
        if alarm.name == name:
            return f"{safe(alarm.message)}.<br>{safe(alarm.advice[:1].upper() + alarm.advice[1:])}."
    return "-"


def _evaluation(run: RunFiles) -> str:
    evaluations = run.evaluations
    if not evaluations:
        return ""
    names = sorted({n for e in evaluations for n in e if re.fullmatch(r"eval/pass_at_\d+", n)}, key=_k)
    shown_as = ("eval/accuracy", "eval/interval_low", "eval/interval_high")
    values = [record[name] for record in evaluations for name in shown_as if name in record]
    rows = []
    for number in _spread_out(len(evaluations), MAX_EVALUATIONS):
        record = evaluations[number]
        cells = [f"{record['step']:,}", mean_reward(record["eval/accuracy"], values)]
        bounds = [mean_reward(record[name], values) for name in shown_as[1:] if name in record]
        cells.append(" to ".join(bounds) or "-")
        cells += [f"{record[name]:.1%}" if name in record else "-" for name in names]
        cells.append(f"{record['eval/length_mean']:,.1f}" if "eval/length_mean" in record else "-")
        rows.append(cells)
    heading = ("step", "mean reward", "95% interval", *(f"pass@{_k(name)}" for name in names), "tokens")
    prompts = f", on {run.summary['eval_prompts']:,} prompts" if run.summary.get("eval_prompts") else ""
    shown = "" if len(rows) == len(evaluations) else f"; {len(rows)} of {len(evaluations)} are shown"
    note = f'<p class="soft">Intervals are 95%, over prompts{prompts}{shown}.</p>'
    return table(rows, heading, numbers=range(len(heading))) + note


def _k(name: str) -> int:
    return int(name.rpartition("_")[2])


def _spread_out(number: int, limit: int) -> list[int]:
    """At most `limit` indices from the first to the last of `number`."""
    if number <= limit:
        return list(range(number))
    return sorted({round(i * (number - 1) / (limit - 1)) for i in range(limit)})


def _time(run: RunFiles) -> str:
    batches = run.batches
    seconds = {name: sum(b.get(f"time/{name}", 0.0) for b in batches) for name in phase_names(batches)}
    total = sum(seconds.values())
    rows = [(safe(name), duration(value), f"{value / total:.1%}") for name, value in seconds.items() if total]
    parts = [table(rows, ("phase of the driver", "in all", "share"), numbers=(1, 2))]
    idle = run.summary.get("idle") or run.last_start.get("idle") or {}
    for who, shares in idle.items():
        causes = sorted((cause for cause in shares if shares[cause] >= 0.001), key=shares.get, reverse=True)
        said = ", ".join(f"{cause} {shares[cause]:.1%}" for cause in causes)
        waited = f"{sum(shares.values()):.1%} of the time"
        parts.append(f"<p><strong>{safe(who)} idle</strong>: {waited}{': ' + safe(said) if said else ''}</p>")
    return "".join(parts)


SECTIONS: tuple[tuple[str, str, Callable[[RunFiles], str]], ...] = (
    ("summary", "Summary", _summary),
    ("curves", "Curves", _curves),
    ("alarms", "Alarms", _alarms),
    ("evaluation", "Evaluation", _evaluation),
    ("responses", "Sample responses", samples_section),
    ("time", "Time", _time),
    ("starts", "Starts and restarts", starts_section),
    ("flags", "Flags", flags_section),
    ("setup", "Software and machine", setup_section),
)
