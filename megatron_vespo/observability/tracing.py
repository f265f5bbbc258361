"""Records a timeline of the whole run, and what trainer and engines waited for.

The file has the JSON array form of the Trace Event Format. https://ui.perfetto.dev and chrome://tracing read
it, also without the closing bracket that a killed run leaves out.

Every process reads its own clock (time.time_ns), and all clocks are treated as one. On one machine they are
one. Between nodes a rank's row is shifted by the difference of the clocks, milliseconds with NTP: durations
are right, starts and waiting times are off by that much. A call ends when it returns: a kernel that still
runs on the GPU then is charged to the call that waits for it.
"""

from __future__ import annotations

import json
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

Span = tuple[str, int, int]  # name, start, end: nanoseconds since 1970

DRIVER, TRAINER, ENGINES = "driver", "trainer", "engines"
ROWS = (DRIVER, TRAINER, ENGINES)  # one process each in the viewer; its id is the index here

# a trainer rank works in these calls and waits in all others
TRAINING_CALLS = ("take", "prepare", "train_step", "log_probs")
# cause of a wait -> phases of the driver; if several are active, the first one is charged
TRAINER_CAUSES = {
    "sync": ("sync",),
    "saving": ("save",),
    "rewards": ("reward", "teacher"),
    "evaluation": ("evaluate",),
    "generation": ("generate",),
    "calls": ("train", "log-probs"),  # samples and results in transfer
}
ENGINE_CAUSES = {
    "sync": ("sync",),
    "saving": ("save",),
    "rewards": ("reward", "teacher", "evaluate"),
    "training": ("train", "log-probs"),
}
SLOWER_ENGINES, OTHER = "slower engines", "other"


class Spans:
    """Collects the spans of one process until they are fetched."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = time.time_ns()
        try:
            yield
        finally:
            self._spans.append((name, start, time.time_ns()))

    def take(self) -> list[Span]:
        taken, self._spans = self._spans, []
        return taken


class Trace:
    """Writes every span to `path` as soon as it is known; an existing file becomes trace.previous.json.

    Several threads may use it. Spans of one row must nest or follow each other.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.replace(path.with_name("trace.previous.json"))
        self._lock = threading.Lock()
        self._origin = time.time_ns()
        self._rows: dict[str, list[str]] = {kind: [] for kind in ROWS}  # in the order of their first span
        # alternating starts and ends: 16 bytes per span, however long the run is
        self._phases: dict[str, array] = defaultdict(lambda: array("q"))
        self._busy: dict[str, dict[str, array]] = {
            kind: defaultdict(lambda: array("q")) for kind in (TRAINER, ENGINES)
        }
        self._file = path.open("w", encoding="utf-8")
        when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self._origin / 1e9))
        names = [_metadata("process_name", kind, name=kind) for kind in ROWS]
        events = [*names, _metadata("process_labels", DRIVER, labels=f"0 s is {when}")]
        self._file.write("[\n" + ",\n".join(map(json.dumps, events)))
        self._file.flush()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._file.write("\n]\n")
            self._file.close()

    def phase(self, name: str, start: int, end: int) -> None:
        """Adds a phase of the driver; each of its threads has a row."""
        with self._lock:
            self._phases[name].extend((start, end))
            self._write(DRIVER, threading.current_thread().name, [(name, start, end)])

    def calls(self, rank: int, spans: Iterable[Span]) -> None:
        """Adds the calls of a trainer rank."""
        spans, row = list(spans), f"rank {rank}"
        with self._lock:
            for name, start, end in spans:
                if name in TRAINING_CALLS:
                    self._busy[TRAINER][row].extend((start, end))
            self._write(TRAINER, row, spans)

    def requests(self, engine: int, start: int, end: int, number: int) -> None:
        """Adds an engine's work for one batch, from the first to the last of `number` completions."""
        row = f"engine {engine}"
        with self._lock:
            self._busy[ENGINES][row].extend((start, end))
            self._write(ENGINES, row, [("generate", start, end)], completions=number)

    def count(self, name: str, **values: float) -> None:
        """Adds counter values that are valid from now on."""
        with self._lock:
            if not self._file.closed:
                when = (time.time_ns() - self._origin) / 1000
                event = {"name": name, "ph": "C", "pid": ROWS.index(DRIVER), "ts": when, "args": values}
                self._file.write(",\n" + json.dumps(event))

    def idle(self, start: int, end: int) -> dict[str, dict[str, float]]:
        """For "trainer" and "engines": shares of [start, end) that they waited, by cause, mean over the rows.

        The rest to 1 is work; it includes the time that ranks wait for each other inside a call.
        """
        with self._lock:
            phases = {name: _pairs(times) for name, times in self._phases.items()}
            busy = {kind: [_pairs(t) for t in rows.values()] for kind, rows in self._busy.items()}
        return idle_by_cause(phases, busy, start, end)

    def _write(self, kind: str, row: str, spans: list[Span], **details: int) -> None:
        if self._file.closed:  # a thread of the driver may outlive the run for a moment
            return
        rows, events = self._rows[kind], []
        if row not in rows:
            rows.append(row)
            events.append(_metadata("thread_name", kind, rows.index(row), name=row))
        for name, start, end in spans:
            event = {"name": name, "ph": "X", "pid": ROWS.index(kind), "tid": rows.index(row)}
            times = {"ts": (start - self._origin) / 1000, "dur": (end - start) / 1000}  # microseconds
            events.append(event | times | ({"args": details} if details else {}))
        self._file.write("".join(",\n" + json.dumps(event) for event in events))
        self._file.flush()


def idle_by_cause(
    phases: dict[str, np.ndarray], busy: dict[str, list[np.ndarray]], start: int, end: int
) -> dict[str, dict[str, float]]:
    """As Trace.idle, from intervals, int64 [n, 2] each.

    `phases` are those of the driver by name, `busy` the work of each row of "trainer" and "engines".
    """
    causes = {TRAINER: TRAINER_CAUSES, ENGINES: ENGINE_CAUSES}
    result = {}
    for kind, rows in busy.items():
        if rows:
            known = {cause: _joined(phases, names) for cause, names in causes[kind].items()}
            if kind == ENGINES:  # while one engine works, the others wait only for it
                known = {SLOWER_ENGINES: np.concatenate(rows)} | known
            result[kind] = idle_shares(rows, known, start, end)
    return result


def idle_shares(
    rows: list[np.ndarray], causes: dict[str, np.ndarray], start: int, end: int
) -> dict[str, float]:
    """Share of [start, end) in which a row is not busy, by cause, mean over the rows.

    `rows` and `causes` are intervals, int64 [n, 2] each, in any order; they may overlap. If several causes
    apply, the first one is charged; if none applies, "other".
    """
    shares = dict.fromkeys([*causes, OTHER], 0.0)
    edges = np.unique(np.concatenate([[start, end], *(part.ravel() for part in (*rows, *causes.values()))]))
    edges = edges[(edges >= start) & (edges <= end)]
    lengths = np.diff(edges) / max(end - start, 1) / len(rows)
    covered = {cause: _covers(intervals, edges) for cause, intervals in causes.items()}
    for row in rows:
        open_ = ~_covers(row, edges)
        for cause, holds in covered.items():
            shares[cause] += float(lengths[open_ & holds].sum())
            open_ &= ~holds
        shares[OTHER] += float(lengths[open_].sum())
    return shares


def _covers(intervals: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """For each piece between neighbouring edges: does an interval cover it? All inner ends must be edges."""
    depth = np.zeros(len(edges) + 1, np.int64)
    first, last = np.searchsorted(edges, intervals[:, 0]), np.searchsorted(edges, intervals[:, 1])
    np.add.at(depth, first, 1)
    np.add.at(depth, last, -1)
    return np.cumsum(depth)[: len(edges) - 1] > 0


def _pairs(times: array) -> np.ndarray:
    return np.array(times, np.int64).reshape(-1, 2)


def _joined(phases: dict[str, np.ndarray], names: Iterable[str]) -> np.ndarray:
    empty = np.empty((0, 2), np.int64)
    return np.concatenate([empty, *(phases[name] for name in names if name in phases)])


def _metadata(what: str, kind: str, thread: int = 0, **values: str) -> dict:
    return {"name": what, "ph": "M", "pid": ROWS.index(kind), "tid": thread, "args": values}
