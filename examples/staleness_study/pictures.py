"""The study's pictures: curves of the test runs, and accuracy against the learning rate."""

from __future__ import annotations

from pathlib import Path

import design
import numpy as np
from judge import Record, final_accuracy
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table import Runs, test_runs, tuned_learning_rate

from megatron_vespo.observability.report import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, STYLE

COLORS = dict(zip((v.label for v in design.VARIANTS), (BLUE, SKY, ORANGE, RED, PURPLE, GREEN), strict=True))
PANELS = {
    "accuracy": "held-out accuracy",
    "reward": "training reward",
    "entropy": "entropy (nats per token)",
    "grad_norm": "gradient norm",
    "weight": "E[phi], mean weight",
    "ess": "ESS of W",
}
OFF_POLICY = [n for n in design.STALENESS if n > 1]


def _curve(axes: Axes, records: list[Record], name: str, label: str) -> None:
    """Mean over seeds, with their range."""
    length = min(len(record[name]) for record in records)
    values = np.array([record[name][:length] for record in records])
    # what is averaged over an interval stands at its end
    steps = records[0]["steps"][-length:] if name != "accuracy" else records[0]["steps"][:length]
    axes.plot(steps, values.mean(axis=0), color=COLORS[label], label=label)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=COLORS[label], alpha=0.15, lw=0)


def plot_curves(runs: Runs, path: Path, lr: float | None, title: str) -> None:
    """One column an N, one row a quantity; at `lr`, or at each cell's best learning rate."""
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 15), dpi=110, layout="constrained")
        figure.suptitle(title, fontsize=14, weight="bold")
        panels = figure.subplots(len(PANELS), len(OFF_POLICY), sharex=True, sharey="row")
        for row, (name, heading) in zip(panels, PANELS.items(), strict=True):
            for axes, n in zip(row, OFF_POLICY, strict=True):
                axes.set_title(f"{heading}, N = {n}")
                if name in ("grad_norm", "entropy"):
                    axes.set_yscale("log")
                for variant in design.VARIANTS:
                    used = lr or tuned_learning_rate(runs, variant, n)
                    records = test_runs(runs, variant, n, used) if used else []
                    if records:
                        _curve(axes, records, name, variant.label)
        for axes in panels[-1]:
            axes.set_xlabel("optimizer steps")
        panels[0, 0].legend(loc="lower right")
        figure.savefig(path)


def plot_window(runs: Runs, path: Path) -> None:
    """Final accuracy of the tuning runs against the learning rate, one panel an N."""
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 4), dpi=110, layout="constrained")
        panels = figure.subplots(1, len(OFF_POLICY), sharey=True)
        for axes, n in zip(panels, OFF_POLICY, strict=True):
            axes.set_title(f"N = {n}")
            axes.set_xscale("log", base=2)
            axes.set_xlabel("learning rate")
            axes.set_xticks(design.LEARNING_RATES, [f"{lr:g}" for lr in design.LEARNING_RATES])
            for variant in design.VARIANTS:
                found = [runs[t.key] for t in design.tuning_trials(variant, n) if t.key in runs]
                rates = [record["lr"] for record in found]
                axes.plot(rates, [final_accuracy(record) for record in found], marker="o",
                    label=variant.label, color=COLORS[variant.label])  # fmt: skip
        panels[0].set_ylabel("final accuracy (tuning prompts)")
        panels[0].legend(loc="lower left")
        figure.savefig(path)
