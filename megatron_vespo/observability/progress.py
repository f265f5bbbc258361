"""Displays a running training: a live panel on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import atexit
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from time import monotonic, time_ns
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.control import Control
from rich.live import Live
from rich.text import Text

from megatron_vespo.observability.activity import (
    NO_ENGINES,
    Background,
    EngineStates,
    Noteworthy,
    OpenPhase,
    sentence,
)
from megatron_vespo.observability.display_rows import (
    ACCURACY,
    PHASE_COLUMNS,
    PHASE_FORMAT,
    ROWS,
    clock,
    plain_cell,
    shown_phases,
)
from megatron_vespo.observability.live_panel import Snapshot, draw

HEADER_INTERVAL = 20  # plain lines between headers
REFRESHES_PER_SECOND = 2
HISTORY = 40  # values a sparkline can show
RECENT = 30  # messages that come back after the terminal's size has changed


class ResizableLive(Live):
    """A live display that starts on a clean screen when the terminal's size has changed.

    A terminal wraps old lines at its new width. Where they start is then not known.
    """

    def __init__(self, renderable: RunDisplay, recent: deque[str], **options: Any):
        super().__init__(renderable, **options)
        self._recent, self._size = recent, self.console.size

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        processed = super().process_renderables(renderables)
        size = self.console.size
        if size != self._size:
            self._size = size
            # the first one moves the cursor to the old panel
            processed[:1] = [Control.clear(), Control.home(), *(Text(text) for text in list(self._recent))]
        return processed


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
        self._recent: deque[str] = deque(maxlen=RECENT)
        # isatty, not rich's own test, which obeys variables that CI systems set for colour in their logs.
        self._console = Console(file=self._stream, force_terminal=self._stream.isatty())
        can_draw = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live: Live | None = None
        if can_draw and not self._console.options.ascii_only:
            self._live = ResizableLive(
                self,
                self._recent,
                console=self._console,
                refresh_per_second=REFRESHES_PER_SECOND,
                vertical_overflow="crop",
            )

        # The refresh thread reads the attributes below. The console has its own lock: never call it holding
        # this one.
        self._lock = Lock()
        self._history: dict[str, deque[float]] = {}
        self._updates: deque[tuple[int, float]] = deque(maxlen=20)  # (step, when)
        self._noteworthy = Noteworthy()
        self._engines: Callable[[], EngineStates] = lambda: NO_ENGINES
        self._background: Background | None = None
        self._phases: list[OpenPhase] = []  # innermost last
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
            self._phases.append(OpenPhase(name))
        started = time_ns()
        try:
            yield
        finally:
            with self._lock:
                self._charge()
                self._phases.pop()
            if self._on_phase is not None:
                self._on_phase(name, started, time_ns())

    def progress(self, done: int, total: int) -> None:
        """Counts in the innermost phase. Any thread may call it, at any rate."""
        with self._lock:
            if self._phases:
                self._phases[-1].done, self._phases[-1].total = done, total

    def background(self, ready: int, wanted: int) -> None:
        """Counts the groups that generation beside training has ready for the next batch. Any thread may."""
        with self._lock:
            self._background = Background(ready, wanted)

    def watch_engines(self, states: Callable[[], EngineStates]) -> None:
        """`states` is called whenever the panel is drawn, so it must not block."""
        self._engines = states

    def saved(self, step: int) -> None:
        """Shows `step` as that of the last checkpoint."""
        with self._lock:
            self._noteworthy.saved = step, monotonic()

    @property
    def current_phase(self) -> str:
        """The innermost phase of this moment, "" between phases. Any thread may ask."""
        with self._lock:
            return self._phases[-1].name if self._phases else ""

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
            self._noteworthy.evaluated(metrics)

    def _remember(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._history.setdefault(name, deque(maxlen=HISTORY)).append(float(value))

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of `step`. All are optional; the live panel keeps the newest value of each."""
        with self._lock:
            self._updates.append((step, monotonic()))
            self._remember(metrics)
            self._noteworthy.update(step, metrics)
        if self._live is None:
            self._print_line(step, metrics)

    def message(self, text: str) -> None:
        """Prints `text` on its own lines, above the live panel. Any thread may call it."""
        if self._live is None:
            self._print(text)
        else:
            self._console.print(text, markup=False, highlight=False)
            self._recent.append(text)

    def _charge(self) -> None:
        now = monotonic()
        if self._phases:
            phase = self._phases[-1].name
            self._phase_seconds[phase] = self._phase_seconds.get(phase, 0.0) + now - self._charged_at
        self._charged_at = now

    def _time_left(self) -> str:
        if len(self._updates) < 2:
            return "-"
        (first_step, first_time), (step, last_time) = self._updates[0], self._updates[-1]
        if step == first_step:
            return "-"
        left = (last_time - first_time) / (step - first_step) * (self._total_steps - step)
        # a slow batch takes no time from those after it
        a_batch = (last_time - first_time) / (len(self._updates) - 1)
        return clock(max(0.0, left - min(monotonic() - last_time, a_batch)))

    # Plain mode

    def _print(self, text: str) -> None:
        print(text + "\n", end="", file=self._stream, flush=True)  # in one piece: threads may interleave

    def _print_line(self, step: int, metrics: dict[str, float]) -> None:
        digits = len(str(self._total_steps))
        cells = [("step", f"{step:{digits}d}/{self._total_steps}"), ("left", f"{self._time_left():>7}")]
        for row in ROWS:
            if row.column:
                spec = row.format_for(self._noteworthy.accuracies) if row is ACCURACY else row.format
                cells.append(plain_cell(row.column, spec, metrics.get(row.metric)))
            if row.spread:
                cells.append(plain_cell("std", row.spread_format, metrics.get(row.spread)))
        for phase in shown_phases(self._history):
            cells.append(plain_cell(PHASE_COLUMNS[phase], PHASE_FORMAT, metrics.get(f"time/{phase}")))
        if self._lines_printed % HEADER_INTERVAL == 0:
            self._print(" ".join(f"{heading:>{len(value)}}" for heading, value in cells))
        self._print(" ".join(value for _, value in cells))
        self._lines_printed += 1

    # Live mode

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = self._snapshot(self._engines())
        yield draw(console, shown, options.max_width, options.size.height)

    def _snapshot(self, engines: EngineStates) -> Snapshot:
        with self._lock:
            now, activity, phase = monotonic(), "", ""
            if self._phases:
                phase = self._phases[-1].name
                seconds = self._phase_seconds.get(phase, 0.0) + now - self._charged_at
                activity = f"{sentence(self._phases[-1], engines, self._background)} ({seconds:.1f} s)"
            facts = [self._noteworthy.accuracy(), self._noteworthy.checkpoint(now)]
            if not activity.startswith(("Starting ", "Waiting for engines")):  # these have it
                facts.append(engines.condition())
            if self._background is not None and phase != "generate":
                ready, wanted = self._background.ready, self._background.wanted
                facts.append(f"in the background: {ready} of {wanted} groups of the next batch are ready")
            return Snapshot(
                title=self._title,
                step=self._updates[-1][0] if self._updates else 0,
                total_steps=self._total_steps,
                passed=clock(now - self._started_at),
                left=self._time_left(),
                activity=activity,
                phase=phase,
                facts=facts,
                warnings=self._noteworthy.warnings(),
                history={name: list(values) for name, values in self._history.items()},
            )
