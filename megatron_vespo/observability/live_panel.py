"""Draws the live panel of a run for a terminal of any size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_vespo.observability.display_rows import (
    ACCURACY,
    IMPORTANCE,
    PHASE_COLUMNS,
    PHASE_FORMAT,
    ROWS,
    shown_phases,
    sparkline,
)

MAX_WIDTH = 120
EDGES = 4  # columns of the panel's border and padding
LABEL_WIDTH = max(len(row.label) for row in ROWS)
VALUE_WIDTH = 16
BESIDE = 72  # columns inside the panel from which on the phases are beside the metrics
PHASES_WIDTH = 18
GAP = 3
MIN_SPARKLINE, MIN_BAR = 4, 10
SEPARATOR = " · "


@dataclass(frozen=True)
class Snapshot:
    """What the panel shows."""

    title: str
    step: int
    total_steps: int
    passed: str
    left: str
    activity: str  # what goes on; "" between phases
    phase: str  # its name
    facts: Sequence[str]
    warnings: Sequence[str]
    history: Mapping[str, Sequence[float]]  # newest value last


def draw(console: Console, shown: Snapshot, width: int, height: int) -> RenderableType:
    """The panel, at most `width` columns and `height` - 1 lines: a full screen would scroll."""
    width, budget = min(width, MAX_WIDTH), max(1, height - 1)
    inner = width - EDGES
    words = [Text(f"▶ {shown.activity}" if shown.activity else " ", "green")]
    words += [Text(line) for line in _joined([fact for fact in shown.facts if fact], inner)]
    words += [Text(f"! {warning}", "yellow") for warning in shown.warnings]
    if inner < 10 or budget < 5:  # only words
        lines = [line for text in words for line in text.wrap(console, max(1, width))]
        return Group(*lines[:budget])
    head: list[RenderableType] = [_progress_line(shown, inner)]
    lines = [line for text in words for line in text.wrap(console, inner)][: budget - 3]
    left = budget - 3 - len(lines)  # for a blank line and the numbers
    known = any(metric in shown.history for metric in IMPORTANCE)
    numbers = _numbers(console, shown, inner, left - 1) if known and left > 1 else []
    body = [*head, *lines, *(["", *numbers] if numbers else [])]
    return Panel(
        Group(*body), title=Text(shown.title, "bold"), border_style="dim", padding=(0, 1), width=width
    )


def _joined(facts: Sequence[str], width: int) -> list[str]:
    """The facts in as few lines as they fit in."""
    lines: list[str] = []
    for fact in facts:
        if lines and len(lines[-1]) + len(SEPARATOR) + len(fact) <= width:
            lines[-1] += SEPARATOR + fact
        else:
            lines.append(fact)
    return lines


def _progress_line(shown: Snapshot, width: int) -> RenderableType:
    counts = f"step {shown.step}/{shown.total_steps}"
    for times in (f"{shown.passed} passed, {shown.left} left", f"{shown.left} left", ""):
        bar_width = width - len(counts) - len(times) - (4 if times else 2)
        if bar_width >= MIN_BAR:
            break
    else:
        return Text(counts, "bold", no_wrap=True, overflow="ellipsis")
    line = Table.grid(padding=(0, 2))
    bar = ProgressBar(shown.total_steps, shown.step, width=bar_width)
    line.add_row(Text(counts, "bold"), bar, Text(times, "dim"))
    return line


def _numbers(console: Console, shown: Snapshot, width: int, max_lines: int) -> list[RenderableType]:
    if width >= BESIDE and max_lines > len(PHASE_COLUMNS):
        table = Table.grid(padding=(0, GAP))
        metrics_width = width - PHASES_WIDTH - GAP
        table.add_row(_metrics_table(shown, metrics_width, max_lines), _phases_table(shown))
        return [table]
    seconds = [
        f"{name} {format(shown.history[f'time/{name}'][-1], PHASE_FORMAT).strip()}"
        for name in PHASE_COLUMNS
        if shown.history.get(f"time/{name}")
    ]
    phases = Text(f"seconds: {', '.join(seconds)}", "dim").wrap(console, width) if seconds else []
    if max_lines < len(phases) + 2:
        return [_metrics_table(shown, width, max_lines)]
    return [_metrics_table(shown, width, max_lines - len(phases)), *phases]


def _metrics_table(shown: Snapshot, width: int, max_rows: int) -> Table:
    """The most important metrics, in their usual order."""
    chosen = set(IMPORTANCE[:max_rows])
    num_blocks = width - LABEL_WIDTH - VALUE_WIDTH - 4
    if num_blocks < MIN_SPARKLINE:
        num_blocks = 0
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, overflow="ellipsis", min_width=min(LABEL_WIDTH, width // 2))
    table.add_column(
        justify="right", no_wrap=True, overflow="ellipsis", min_width=min(VALUE_WIDTH, width // 2)
    )
    if num_blocks:
        table.add_column(style="cyan", no_wrap=True, width=num_blocks)
    for row in ROWS:
        if row is ACCURACY or row.metric not in chosen:
            continue
        history = list(shown.history.get(row.metric, ()))
        value = format(history[-1], row.format).strip() if history else "-"
        if spread := shown.history.get(row.spread):
            value += f" ± {format(spread[-1], row.spread_format).strip()}"
        cells = [row.label, Text(value, "bold" if history else "dim")]
        recent = history[len(history) - min(len(history), num_blocks) :]
        table.add_row(*cells, *([sparkline(recent)] if num_blocks else []))
    return table


def _phases_table(shown: Snapshot) -> Table:
    """Seconds per phase in the newest step that had it; the current phase is marked."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_row(Text("  phase", "dim"), Text("seconds", "dim"))
    for phase in shown_phases(shown.history):
        history = shown.history.get(f"time/{phase}")
        seconds = Text(format(history[-1], PHASE_FORMAT), "bold") if history else Text("-", "dim")
        name = Text(f"▶ {phase}", "green") if phase == shown.phase else Text(f"  {phase}", "dim")
        table.add_row(name, seconds)
    return table
