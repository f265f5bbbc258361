"""Plots and summary written at the end of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vespo.observability.display_rows import PHASE_COLUMNS
from megatron_vespo.observability.mean_rewards import are_shares, mean_reward
from megatron_vespo.observability.metrics import batch_records, dump_json
from megatron_vespo.system.disk import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEGEND_WIDTH, LEGEND_HANDLE = 42, 4  # characters that fit above a panel, and that a line sample takes
ALARM_LINES = ("--", ":", "-.")  # line styles of a panel's alarms
LOGPROB_TOLERANCE = 1e-4  # engine against trainer in fp32; drawn as a line

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442",
)  # fmt: skip
GREY, BLACK = "#999999", "#222222"
PHASE_COLORS = dict(zip(PHASE_COLUMNS, (BLUE, BLACK, PURPLE, SKY, ORANGE, GREEN, YELLOW, RED), strict=True))
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


def _series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the records that have a finite `name`."""
    seen = [record for record in metrics if math.isfinite(record.get(name, math.nan))]
    return [record["step"] for record in seen], [record[name] for record in seen]


def _line(axes: Axes, metrics: list[dict], name: str, label: str | None, color: str, **style: Any) -> None:
    steps, values = _series(metrics, name)
    if steps:
        marker = "o" if len(steps) == 1 else ""  # a single point has no line
        axes.plot(steps, values, label=label, color=color, **{"marker": marker, **style})


def _plot_accuracy(axes: Axes, metrics: list[dict]) -> None:
    rewards = [value for name in ("reward/mean", "eval/accuracy") for value in _series(metrics, name)[1]]
    axes.set_title("Accuracy" if are_shares(rewards) else "Mean reward")
    _line(axes, metrics, "reward/mean", "training reward", ORANGE, linewidth=1.2)
    _line(axes, metrics, "eval/accuracy", "held-out accuracy", BLUE, marker="o", markersize=5)
    steps, values = _series(metrics, "eval/accuracy")
    # inside the axes, and readable on top of the curves
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for index, offset, side in ((0, (2, -15), "left"), (-1, (2, -17), "right")) if len(steps) > 1 else ():
        axes.annotate(
            mean_reward(values[index], rewards, 0), (steps[index], values[index]), offset,
            textcoords="offset points", ha=side, color=BLUE, weight="bold", bbox=box,
        )  # fmt: skip
    if are_shares(rewards):
        axes.set_ylim(0.0, 1.05)


def _plot_length(axes: Axes, metrics: list[dict]) -> None:
    axes.set_title("Response length (tokens)")
    _line(axes, metrics, "response/length_mean", None, BLUE)
    axes.set_ylim(bottom=0)


def _plot_log_w(axes: Axes, metrics: list[dict]) -> None:
    axes.set_title("Sequence log W")
    names = ("ratio/log_w_mean", "ratio/log_w_std")
    both = [record for record in metrics if all(math.isfinite(record.get(name, math.nan)) for name in names)]
    if both:
        low = [record[names[0]] - record[names[1]] for record in both]
        high = [record[names[0]] + record[names[1]] for record in both]
        steps = [record["step"] for record in both]
        axes.fill_between(steps, low, high, color=BLUE, alpha=0.18, linewidth=0, label="± std")
    _line(axes, metrics, "ratio/log_w_mean", "mean", BLUE)
    _line(axes, metrics, "ratio/staleness_std", "staleness, std", ORANGE, linewidth=1.2)
    _line(axes, metrics, "ratio/mismatch_std", "mismatch, std", RED, linewidth=1.2)
    axes.axhline(0.0, color=GREY, linewidth=0.8)


def _plot_weight(axes: Axes, metrics: list[dict]) -> None:
    axes.set_title("Weight of a sequence")
    _line(axes, metrics, "weight/mean/positive", "advantage > 0", GREEN)
    _line(axes, metrics, "weight/mean/negative", "advantage < 0", RED)
    _line(axes, metrics, "weight/ess", "ESS", GREY, linestyle="--")
    _line(axes, metrics, "weight/dead_share", "dead", PURPLE, linestyle=":")


def _plot_entropy(axes: Axes, metrics: list[dict]) -> None:
    axes.set_title("Entropy (nats per token)")
    distils = any("distillation/reverse_kl" in record for record in metrics)
    _line(axes, metrics, "train/entropy", "entropy" if distils else None, BLUE)
    _line(axes, metrics, "distillation/reverse_kl", "reverse KL to the teacher", ORANGE)
    axes.set_ylim(bottom=0)


def _plot_gradient(axes: Axes, metrics: list[dict]) -> None:
    axes.set_title("Gradient norm")
    axes.set_yscale("log")
    # parts without gradient have no place on a log scale
    for name, label, color in (
        ("train/grad_norm_max", "largest", GREY),
        ("train/grad_norm", "mean", BLUE),
        ("gradient/router", "router", RED),
    ):
        seen = [record for record in metrics if record.get(name, 0.0) > 0.0]
        _line(axes, seen, name, label, color, linewidth=1.8 if color == BLUE else 1.2)


def _plot_logprob_difference(axes: Axes, metrics: list[dict]) -> None:
    axes.set_title("Log-prob gap to the engine")
    axes.set_yscale("log")
    # An exact match, 0, has no place on a log scale.
    seen = [record for record in metrics if record.get("check/max_logprob_difference", 0.0) > 0.0]
    _line(axes, seen, "check/max_logprob_difference", "largest", BLUE)
    label = f"tolerance {LOGPROB_TOLERANCE:g}"
    axes.axhline(LOGPROB_TOLERANCE, color=RED, linestyle="--", linewidth=1.2, label=label)


def _plot_phases(axes: Axes, metrics: list[dict]) -> None:
    axes.set_title("Seconds per rollout batch")
    axes.grid(axis="x", visible=False)
    names = {name for record in metrics for name in record if name.startswith("time/")}
    present = {name.removeprefix("time/") for name in names}
    steps = [record["step"] for record in metrics]
    width = 0.85 * min((b - a for a, b in zip(steps, steps[1:], strict=False) if b > a), default=1)
    bottom = [0.0] * len(metrics)
    for phase in [*PHASE_COLUMNS, *sorted(present - PHASE_COLUMNS.keys())]:
        if phase in present:
            seconds = [record.get(f"time/{phase}", 0.0) for record in metrics]
            axes.bar(steps, seconds, width, bottom, label=phase, color=PHASE_COLORS.get(phase, GREY))
            bottom = [below + above for below, above in zip(bottom, seconds, strict=True)]


def _fits(labels: list[str], num_rows: int) -> bool:
    """Whether the legend's columns, filled one after the other, fit side by side. One always fits."""
    columns = [labels[i : i + num_rows] for i in range(0, len(labels), num_rows)]
    width = sum(LEGEND_HANDLE + max(len(label) for label in column) for column in columns)
    return width <= LEGEND_WIDTH or len(columns) == 1


def _place_legend(axes: Axes) -> None:
    """Puts the legend between title and axes, where it hides no curve."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        num_rows = next(rows for rows in range(1, len(labels) + 1) if _fits(labels, rows))
        legend = axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=math.ceil(len(labels) / num_rows),
            borderpad=0.2, handlelength=1.2, handletextpad=0.5, columnspacing=1.0, labelspacing=0.2,
        )  # fmt: skip
        legend.set_in_layout(False)  # a wide one would narrow the whole column; the title reserves its space
        axes.set_title(axes.get_title(loc="left"), pad=6 + 15 * num_rows)


def _mark_alarms(axes: Axes, metrics: list[dict], names: tuple[str, ...]) -> None:
    """Draws a line where one of the alarms went on; batches in which it stayed on get none."""
    batches = batch_records(metrics)
    for name, style in zip(names, ALARM_LINES, strict=False):
        on = [f"alarm/{name}" in record for record in batches]
        label: str | None = f"! {name.replace('_', ' ')}"
        for record, before, now in zip(batches, [False, *on], on, strict=False):
            if now and not before:
                axes.axvline(record["step"], color=BLACK, linewidth=1.2, linestyle=style, label=label)
                label = None  # one legend entry for all lines


# (function that draws a panel, its alarms)
PANELS: tuple[tuple[Callable[[Axes, list[dict]], None], tuple[str, ...]], ...] = (
    (_plot_accuracy, ("reward_collapse", "equal_groups")),
    (_plot_length, ("truncated_responses",)),
    (_plot_entropy, ("entropy_collapse", "entropy_explosion", "distillation_diverges")),
    (_plot_gradient, ("gradient_spike",)),
    (_plot_log_w, ("passes_differ",)),
    (_plot_weight, ("dead_sequences", "ess_collapse")),
    (_plot_logprob_difference, ("engine_mismatch",)),
    (_plot_phases, ()),
)


def plot_curves(metrics: list[dict], path: Path, title: str) -> None:
    """Draws the curves of a run into the PNG `path`, 2400 x 1120; `metrics` are records from read_metrics."""
    # Imported here, because matplotlib takes a second to import. No pyplot: it keeps global state.
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    with rc_context(STYLE):
        figure = Figure(figsize=(15, 7), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        figure.suptitle(title, fontsize=14, weight="bold")
        panels = figure.subplots(2, 4, sharex=True)
        for axes, (draw, alarms) in zip(panels.flat, PANELS, strict=True):
            draw(axes, metrics)
            _mark_alarms(axes, metrics, alarms)
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
            _place_legend(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))  # all panels share it
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def write_summary(path: Path, summary: dict) -> None:
    """Writes `summary` as JSON, atomically; keys that format_summary does not know are kept."""
    write_atomically(path, dump_json(summary, indent=2) + "\n")


def duration(seconds: float) -> str:
    """Example: 750.2 -> "12 min 30 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, second = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {second:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _accuracy(when: str, summary: dict) -> str:
    both = [summary.get(f"eval_accuracy_{time}", 0.0) for time in ("before", "after")]
    numbers = [summary[f"eval_accuracy_{when}"], *summary[f"eval_interval_{when}"]]
    mean, low, high = (mean_reward(number, both + numbers) for number in numbers)
    return f"{mean:>6}   95% interval {low} to {high} ({summary['eval_prompts']} prompts)"


def format_summary(summary: dict) -> str:
    """One screen of aligned text about a run; keys missing in `summary` are skipped.

    Known keys: eval_accuracy_before, eval_accuracy_after (mean rewards), with these eval_interval_before,
    eval_interval_after (their bounds) and eval_prompts; steps, train_seconds, setup_seconds,
    max_logprob_difference, exported_max_logprob_difference, layout (name -> size), idle (who -> cause ->
    share) and paths (label -> path).
    """
    lines: list[tuple[str, str]] = []
    for when in ("before", "after"):
        if summary.get(f"eval_accuracy_{when}") is not None:
            lines.append((f"held-out accuracy {when}", _accuracy(when, summary)))
    if (steps := summary.get("steps")) is not None:
        lines.append(("steps", str(steps)))
    if (seconds := summary.get("train_seconds")) is not None:
        a_step = f" ({seconds / steps:.2f} s per step)" if steps else ""
        lines.append(("training", duration(seconds) + a_step))
    if (seconds := summary.get("setup_seconds")) is not None:
        lines.append(("set-up", duration(seconds)))
    for who, shares in summary.get("idle", {}).items():
        causes = sorted((cause for cause in shares if shares[cause] >= 0.001), key=shares.get, reverse=True)
        parts = ", ".join(f"{cause} {shares[cause]:.1%}" for cause in causes)
        lines.append((f"{who} idle", f"{sum(shares.values()):.1%} of the time: {parts or '-'}"))
    if layout := summary.get("layout"):
        sizes = [f"{name.replace('_', ' ')} {size}" for name, size in layout.items()]
        lines.append(("layout", ", ".join(sizes)))
    if (difference := summary.get("max_logprob_difference")) is not None:
        lines.append(("max log-prob difference", f"{difference:.1e} (engine and trainer)"))
    if (difference := summary.get("exported_max_logprob_difference")) is not None:
        lines.append(("the same after export", f"{difference:.1e} (exported checkpoint and trainer)"))
    lines += summary.get("paths", {}).items()
    width = max((len(label) for label, _ in lines), default=0)
    return "\n".join(f"{label:<{width}}  {text}" for label, text in lines)
