"""What trainer and engines waited for: from summary.json of a finished run, else from its timeline."""

from __future__ import annotations

import json
import threading
from array import array
from collections import defaultdict
from typing import Any

import numpy as np

from megatron_vespo.commands.view.growing_file import GrowingFile
from megatron_vespo.commands.view.runs import SUMMARY, Run
from megatron_vespo.observability.tracing import ENGINES, ROWS, TRAINER, TRAINING_CALLS, idle_by_cause

TRACE = "trace.json"
PARTS = 24  # of the time, each with its own shares
FIRST = ("evaluate", "generate", "train")  # the phases of a run that has begun


class IdleTime:
    """Reads the timeline as it grows. May be used by several threads."""

    def __init__(self, run: Run):
        self._run, self._file = run, GrowingFile(run.path / TRACE)
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        # alternating starts and ends, microseconds since the timeline began
        self._phases: dict[str, array] = defaultdict(lambda: array("q"))
        self._busy: dict[str, dict[int, array]] = {
            kind: defaultdict(lambda: array("q")) for kind in (TRAINER, ENGINES)
        }
        self._first: int | None = None
        self._end = 0

    def read(self) -> dict[str, Any]:
        """See metrics_api; a part has "start" and "end", in seconds, and "idle"."""
        with self._lock:
            parts = self._from_trace()
        summary = self._from_summary()
        if summary:
            return {"source": SUMMARY, "idle": summary, "parts": parts[1:]}
        if parts:
            return {"source": TRACE, "idle": parts[0]["idle"], "parts": parts[1:]}
        return {"source": None, "idle": {}, "parts": []}

    def _from_summary(self) -> dict[str, Any]:
        if not self._run.finished:
            return {}
        try:
            idle = json.loads((self._run.path / SUMMARY).read_bytes()).get("idle")
        except (OSError, ValueError, AttributeError, RecursionError):
            return {}
        return idle if isinstance(idle, dict) else {}

    def _from_trace(self) -> list[dict[str, Any]]:
        """The whole time first, then its parts."""
        try:
            changed, lines = self._file.read()
        except FileNotFoundError:
            changed, lines = True, []
        if changed:
            self._clear()
        for line in lines:
            self._add(line)
        if self._first is None or self._end <= self._first:
            return []
        edges = np.linspace(self._first, self._end, PARTS + 1).astype(np.int64).tolist()
        spans = [(self._first, self._end), *zip(edges, edges[1:], strict=False)]
        return [self._share(start, end) for start, end in spans]

    def _add(self, line: bytes) -> None:
        try:
            event = json.loads(line.strip().rstrip(b","))
            if event["ph"] != "X":
                return
            kind, start = ROWS[event["pid"]], round(event["ts"])
            name, row, end = event["name"], event["tid"], start + round(event["dur"])
            interval = array("q", (start, end))
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError):
            return  # the brackets, and what a kill left
        if kind not in self._busy:
            self._phases[name].extend(interval)
            if name in FIRST and (self._first is None or start < self._first):
                self._first = start
            if name in FIRST:
                self._end = max(self._end, end)
        elif kind == ENGINES or name in TRAINING_CALLS:
            self._busy[kind][row].extend(interval)

    def _share(self, start: int, end: int) -> dict[str, Any]:
        phases = {name: _within(times, start, end) for name, times in self._phases.items()}
        busy = {
            kind: [_within(times, start, end) for times in rows.values()] for kind, rows in self._busy.items()
        }
        seconds = {"start": start / 1e6, "end": end / 1e6}
        return seconds | {"idle": idle_by_cause(phases, busy, start, end)}


def _within(times: array, start: int, end: int) -> np.ndarray:
    """The intervals that overlap [start, end), int64 [n, 2], cut to it."""
    pairs = np.array(times, np.int64).reshape(-1, 2)
    kept = pairs[(pairs[:, 1] > start) & (pairs[:, 0] < end)]
    return np.clip(kept, start, end)
