"""Reports simulated runs: a table, and a plot of throughput against the staleness bound."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vespo.commands.simulate.result import Result
from megatron_vespo.observability.report import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
SYNCHRONOUS = "sync"


@dataclass(frozen=True)
class Row:
    """A simulated run. `where` names its machines; runs with different bounds share it."""

    where: str
    gpus: int
    trainer: int  # number of GPUs
    max_staleness: int  # 0: synchronous
    result: Result


def format_table(rows: list[Row]) -> str:
    """One line per run; "faster" is relative to the first run of the same machines."""
    head = ("where", "trainer", "bound", "s/step", "tokens/s", "samples/s", "faster", "trainer idle",
            "engines idle", "lag mean", "max", "in vain", "length")  # fmt: skip
    lines = [head]
    for _, group in groupby(rows, key=lambda row: row.where):
        runs = list(group)
        for row in runs:
            result, shares = row.result, row.result.staleness
            mean = sum(lag * share for lag, share in enumerate(shares))
            speed = result.samples_per_second / runs[0].result.samples_per_second
            lines.append((  # pyright: ignore[reportArgumentType]
                row.where, str(row.trainer), str(row.max_staleness or SYNCHRONOUS),
                f"{result.step_seconds:,.3g}" if result.step_seconds < 100 else f"{result.step_seconds:,.0f}",
                f"{result.tokens_per_second:,.0f}", f"{result.samples_per_second:,.1f}", f"{speed:.2f}x",
                f"{sum(result.trainer_idle.values()):.0%}", f"{sum(result.engines_idle.values()):.0%}",
                f"{mean:.2f}", str(int(shares.nonzero()[0].max())), f"{result.in_vain:.1%}",
                f"{result.mean_length:,.0f}",
            ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)  # fmt: skip


def check_picture_name(flag: str, path: Path) -> None:
    """ValueError for a file name extension that matplotlib does not support."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"{flag} {path}: must end in .png or another of {', '.join(sorted(formats))}")


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Draws `rows` into the PNG `path`: throughput, idle shares, and the lags of samples."""
    # as in observability/report.py
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    runs = {where: list(group) for where, group in groupby(rows, key=lambda row: row.where)}
    with rc_context(STYLE):
        figure = Figure(figsize=(13, 4.4), dpi=90, layout="constrained")
        figure.suptitle(title, fontsize=13, weight="bold", x=0.01, ha="left")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]
        throughput, idle, lags = figure.subplots(1, 3)
        _plot_throughput(throughput, runs)
        _plot_idle(idle, runs)
        _plot_lags(lags, list(runs.values())[-1], several=len(runs) > 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _plot_throughput(axes: Axes, runs: dict[str, list[Row]]) -> None:
    axes.set_title("Throughput (response tokens/s a GPU)")
    for color, (where, group) in zip(_colors(runs), runs.items(), strict=True):
        values = [row.result.tokens_per_second / row.gpus for row in group]
        axes.plot(_bounds(group), values, color=color, marker="o", markersize=5, label=where)
    axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.05)
    _bound_axis(axes, runs)
    axes.legend(loc="lower right")


def _plot_idle(axes: Axes, runs: dict[str, list[Row]]) -> None:
    axes.set_title("Idle share of the time")
    for color, group in zip(_colors(runs), runs.values(), strict=True):
        trainer = [sum(row.result.trainer_idle.values()) for row in group]
        engines = [sum(row.result.engines_idle.values()) for row in group]
        axes.plot(_bounds(group), trainer, color=color, marker="o", markersize=5)
        axes.plot(_bounds(group), engines, color=color, marker="s", markersize=4, linestyle="--")
    axes.plot([], [], color=GREY, marker="o", markersize=5, label="trainer")
    axes.plot([], [], color=GREY, marker="s", markersize=4, linestyle="--", label="engines")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _bound_axis(axes, runs)
    axes.legend(loc="upper right")


def _plot_lags(axes: Axes, group: list[Row], several: bool) -> None:
    """One strip per run of one machine: the darker, the more samples have this lag; a line marks the mean."""
    axes.set_title(f"Age of the samples{f', {group[0].where}' if several else ''}")
    axes.grid(visible=False)
    beside = {"xycoords": ("axes fraction", "data"), "annotation_clip": False, "color": RED}
    for place, row in enumerate(group):
        shares = row.result.staleness
        mean = sum(lag * share for lag, share in enumerate(shares))
        for lag, share in enumerate(shares):
            axes.barh(
                place, 1, left=lag - 0.5, height=0.7, color=BLUE, alpha=share / shares.max(), linewidth=0
            )
        axes.plot([mean, mean], [place - 0.42, place + 0.42], color=RED)
        axes.annotate(f"{mean:.1f}", (1.01, place), va="center", **beside)
    axes.set_yticks(range(len(group)), [str(row.max_staleness or SYNCHRONOUS) for row in group])
    axes.annotate("mean", (1.01, len(group) - 0.4), **beside)
    axes.set_ylim(-0.6, len(group) - 0.4)
    axes.set_ylabel("--max-staleness")
    axes.xaxis.get_major_locator().set_params(integer=True)  # pyright: ignore[reportCallIssue]
    axes.set_xlabel("total lag (optimizer steps)")


def _bounds(group: list[Row]) -> list[int]:
    return [row.max_staleness for row in group]


def _bound_axis(axes: Axes, runs: dict[str, list[Row]]) -> None:
    bounds = sorted({bound for group in runs.values() for bound in _bounds(group)})
    axes.set_xticks(bounds, [str(bound or SYNCHRONOUS) for bound in bounds])
    axes.set_xlabel("--max-staleness (optimizer steps)")


def _colors(things) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(things))]
