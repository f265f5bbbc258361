"""Displays a running training: a live panel on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import atexit
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from threading import Lock
from time import monotonic, time_ns
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Row:
    """One displayed metric. Plain mode keeps the width in `format`; the live panel strips the padding."""

    metric: str
    label: str  # in the live panel
    format: str
    column: str = ""  # heading in plain mode; rows without one are on the live panel only
    spread: str = ""  # metric shown after "±"; in plain mode a column of its own, "std"

    @property
    def spread_format(self) -> str:
        return self.format.lstrip("+")


ROWS = (
    Row("reward/mean", "reward", "7.3f", "reward"),
    Row("eval/accuracy", "held-out accuracy", "8.1%", "held-out"),
    Row("response/length_mean", "response length", "7.1f", "length"),
    Row("response/truncated_share", "truncated", "6.1%"),
    Row("ratio/log_w_mean", "log W", "+8.4f", "logW", spread="ratio/log_w_std"),
    Row("weight/mean", "weight", "6.3f", "weight"),
    Row("weight/mean/positive", "weight, advantage > 0", "6.3f", "wght+"),
    Row("weight/mean/negative", "weight, advantage < 0", "6.3f", "wght-"),
    Row("weight/ess", "effective sample size", "6.3f", "ESS"),
    Row("weight/dead_share", "dead (weight near 0)", "6.1%", "dead"),
    Row("policy/lag_mean", "policy lag", "5.2f", "lag"),
    Row("train/grad_norm", "gradient norm", "7.3f"),
    Row("train/tokens_per_second", "tokens/s trained", "8,.0f", "trained/s"),
    Row("rollout/tokens_per_second", "tokens/s generated", "8,.0f", "sampled/s"),
    Row("check/max_logprob_difference", "max log-prob difference", "8.1e", "maxdiff"),
    Row("reward/error_count", "reward errors", "6.0f"),
    Row("reward/timeout_count", "reward time-outs", "6.0f"),
)
PHASE_COLUMNS = {  # phase of a step -> heading in plain mode; every other phase is start-up
    "generate": "gen",
    "reward": "rew",
    "log-probs": "logp",
    "train": "train",
    "sync": "sync",
    "save": "save",
    "evaluate": "eval",
}
PHASE_FORMAT = "5.1f"

HEADER_INTERVAL = 20  # plain lines between headers
REFRESHES_PER_SECOND = 2
HISTORY = 40  # values a sparkline can show
FIXED_WIDTH = 76  # of the panel without the sparklines
BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: list[float]) -> str:
    """One block per value, scaled to the range of the finite ones; a gap for NaN and infinities."""
    finite = [value for value in values if isfinite(value)]
    if not finite:
        return " " * len(values)
    low, span = min(finite), max(finite) - min(finite)
    scale = (len(BLOCKS) - 1) / span if span else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] if isfinite(value) else " " for value in values)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 3723.0 -> "1:02:03"."""
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


class RunDisplay:
    """Shows a run of `total_steps` steps on `stream` (default: standard output). One thread drives it.

    `on_phase(name, start, end)` is called at the end of every phase; times in nanoseconds since 1970.

    Example:
        with RunDisplay("tiny", total_steps=100) as display:
            with display.phase("generate"):
                ...
            seconds = display.phase_seconds()
            display.update(step, {"reward/mean": 0.5, "time/generate": seconds["generate"]})
    """

    def __init__(
        self,
        title: str,
        total_steps: int,
        stream: TextIO | None = None,
        on_phase: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._title, self._total_steps, self._on_phase = title, total_steps, on_phase
        self._stream = sys.stdout if stream is None else stream
        # isatty, not rich's own test, which obeys variables that CI systems set for colour in their logs.
        self._console = Console(file=self._stream, force_terminal=self._stream.isatty())
        can_draw = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Live | None = None
        if can_draw and not self._console.options.ascii_only:
            self._live = Live(self, console=self._console, refresh_per_second=REFRESHES_PER_SECOND)

        # The refresh thread reads the attributes below. The console has its own lock: never call it holding
        # this one.
        self._lock = Lock()
        self._history: dict[str, deque[float]] = {}
        self._updates: deque[tuple[int, float]] = deque(maxlen=20)  # (step, when)
        self._phases: list[str] = []  # the open ones, innermost last
        self._phase_seconds: dict[str, float] = {}
        self._started_at = self._charged_at = monotonic()
        self._lines_printed = 0

    def __enter__(self) -> RunDisplay:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        self._started_at = monotonic()
        if self._live is None:
            self._print(f"{self._title}: {self._total_steps} steps")
            return
        atexit.register(self.stop)  # the cursor comes back even if nobody calls stop
        self._live.start()

    def stop(self) -> None:
        """Leaves the last picture on the screen and releases the terminal. May be called twice."""
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self.stop)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows the phase `name` and measures its seconds, without those of phases inside it."""
        if self._live is None and name not in PHASE_COLUMNS:
            self._print(f"[{clock(monotonic() - self._started_at)}] {name} ...")
        with self._lock:
            self._charge()
            self._phases.append(name)
        started = time_ns()
        try:
            yield
        finally:
            with self._lock:
                self._charge()
                self._phases.pop()
            if self._on_phase is not None:
                self._on_phase(name, started, time_ns())

    def phase_seconds(self) -> dict[str, float]:
        """Seconds per phase since the last call, by name; counting restarts from zero."""
        with self._lock:
            self._charge()
            seconds, self._phase_seconds = self._phase_seconds, {}
        return seconds

    def recall(self, metrics: dict[str, float]) -> None:
        """Values known before the first `update`; the live panel shows them until newer ones come."""
        with self._lock:
            self._remember(metrics)

    def _remember(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._history.setdefault(name, deque(maxlen=HISTORY)).append(float(value))

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of `step`. All are optional; the live panel keeps the newest value of each."""
        with self._lock:
            self._updates.append((step, monotonic()))
            self._remember(metrics)
        if self._live is None:
            self._print_line(step, metrics)

    def message(self, text: str) -> None:
        """Prints `text` on its own lines, above the live panel. Any thread may call it."""
        if self._live is None:
            self._print(text)
        else:
            self._console.print(text, markup=False, highlight=False)

    def _charge(self) -> None:
        now = monotonic()
        if self._phases:
            phase = self._phases[-1]
            self._phase_seconds[phase] = self._phase_seconds.get(phase, 0.0) + now - self._charged_at
        self._charged_at = now

    def _time_left(self) -> str:
        if len(self._updates) < 2:
            return "-"
        (first_step, first_time), (step, last_time) = self._updates[0], self._updates[-1]
        if step == first_step:
            return "-"
        left = (last_time - first_time) / (step - first_step) * (self._total_steps - step)
        return clock(max(0.0, left - (monotonic() - last_time)))

    # Plain mode

    def _print(self, text: str) -> None:
        print(text + "\n", end="", file=self._stream, flush=True)  # in one piece: threads may interleave

    def _print_line(self, step: int, metrics: dict[str, float]) -> None:
        digits = len(str(self._total_steps))
        cells = [("step", f"{step:{digits}d}/{self._total_steps}"), ("left", f"{self._time_left():>7}")]
        for row in ROWS:
            if row.column:
                cells.append(_plain_cell(row.column, row.format, metrics.get(row.metric)))
            if row.spread:
                cells.append(_plain_cell("std", row.spread_format, metrics.get(row.spread)))
        for phase, heading in PHASE_COLUMNS.items():
            cells.append(_plain_cell(heading, PHASE_FORMAT, metrics.get(f"time/{phase}")))
        if self._lines_printed % HEADER_INTERVAL == 0:
            self._print(" ".join(f"{heading:>{len(value)}}" for heading, value in cells))
        self._print(" ".join(value for _, value in cells))
        self._lines_printed += 1

    # Live mode

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        with self._lock:
            tables = Table.grid(padding=(0, 4))
            tables.add_row(self._metrics_table(num_blocks=max(0, width - FIXED_WIDTH)), self._phases_table())
            group = Group(self._progress_line(width), "", tables, "", self._status_line())
        yield Panel(group, title=Text(self._title, "bold"), border_style="dim", padding=(0, 1), width=width)

    def _progress_line(self, width: int) -> Table:
        step = self._updates[-1][0] if self._updates else 0
        counts = Text(f"step {step}/{self._total_steps}", "bold")
        times = Text(f"{clock(monotonic() - self._started_at)} passed, {self._time_left()} left", "dim")
        bar_width = max(10, width - len(counts) - len(times) - 8)  # 8: the panel's edges and the gaps
        line = Table.grid(padding=(0, 2))
        line.add_row(counts, ProgressBar(self._total_steps, step, width=bar_width), times)
        return line

    def _metrics_table(self, num_blocks: int) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(justify="right", no_wrap=True, min_width=16)
        table.add_column(style="cyan", no_wrap=True, min_width=num_blocks)
        for row in ROWS:
            history = list(self._history.get(row.metric, ()))
            value = format(history[-1], row.format).strip() if history else "-"
            if row.spread in self._history:
                value += f" ± {format(self._history[row.spread][-1], row.spread_format).strip()}"
            recent = history[len(history) - min(len(history), num_blocks) :]
            table.add_row(row.label, Text(value, "bold" if history else "dim"), sparkline(recent))
        return table

    def _phases_table(self) -> Table:
        """Seconds per phase in the newest step that had it; the current phase is marked."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_row(Text("  phase", "dim"), Text("seconds", "dim"))
        for phase in PHASE_COLUMNS:
            history = self._history.get(f"time/{phase}")
            seconds = Text(format(history[-1], PHASE_FORMAT), "bold") if history else Text("-", "dim")
            is_current = phase in self._phases[-1:]
            table.add_row(Text(f"▶ {phase}", "green") if is_current else Text(f"  {phase}", "dim"), seconds)
        return table

    def _status_line(self) -> Text:
        if not self._phases:
            return Text("")
        phase = self._phases[-1]
        seconds = self._phase_seconds.get(phase, 0.0) + monotonic() - self._charged_at
        return Text(f"▶ {phase} {seconds:.1f} s", "green")


def _plain_cell(heading: str, format_spec: str, value: float | None) -> tuple[str, str]:
    """The heading, and the value (or "-") padded to the wider of heading and format."""
    width = max(len(heading), len(format(0.0, format_spec)))
    return heading, f"{'-' if value is None else format(value, format_spec):>{width}}"
