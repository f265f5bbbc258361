"""The metrics of a run by name, read from metrics.jsonl as it grows."""

from __future__ import annotations

import functools
import json
import math
import threading
from array import array
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_vespo.commands.view.growing_file import GrowingFile
from megatron_vespo.commands.view.runs import METRICS, Run
from megatron_vespo.observability.metrics import NON_FINITE

_BATCH = "policy/version"  # only records of rollout batches have it
_ALARM = "alarm/"
_RESTARTS = "engines/restarts"


class Column:
    """A metric: its values, and the indices of the records that have it."""

    def __init__(self) -> None:
        self.at, self.value = array("q"), array("d")

    def since(self, first: int) -> tuple[list[int], list[float]]:
        """Indices from `first` on, and their values."""
        start = len(self.at)
        while start and self.at[start - 1] >= first:
            start -= 1
        return self.at[start:].tolist(), self.value[start:].tolist()

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(self.at, self.value, strict=True)


class MetricsLog:
    """All records so far. `generation` grows when the file was replaced: then all records are new ones.

    `step`, `time` (Unix seconds) and `tokens` (trained on so far) have a value for each record, oldest first;
    `bad_lines` are complete lines that are no record. Hold `lock` while using it.
    """

    def __init__(self, run: Run):
        self.lock = threading.Lock()
        self.generation = 0
        self._run = run
        self._file = GrowingFile(run.path / METRICS)
        self._clear()

    def _clear(self) -> None:
        self.step, self.time, self.tokens = array("q"), array("d"), array("d")
        self.columns: dict[str, Column] = {}
        self.bad_lines = 0

    def __len__(self) -> int:
        return len(self.step)

    def refresh(self) -> None:
        """Reads what has been written since. No file yet is no record."""
        try:
            changed, lines = self._file.read()
        except FileNotFoundError:
            changed, lines = len(self) > 0, []
        if changed:
            self.generation += 1
            self._clear()
        for line in lines:
            try:
                self._add(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                self.bad_lines += 1

    def _add(self, record: dict[str, Any]) -> None:
        step, time = int(record["step"]), float(record["time"])
        values = {
            name.replace("heldout/", "eval/"): _float(value)  # so called by version 0.1
            for name, value in record.items()
            if name not in ("step", "time")
        }
        trained = values.get("train/tokens", 0.0)
        before = self.tokens[-1] if self.tokens else 0.0
        index = len(self)
        self.step.append(step)
        self.time.append(time)
        self.tokens.append(before + trained if math.isfinite(trained) else before)
        for name, value in values.items():
            column = self.columns.setdefault(name, Column())
            column.at.append(index)
            column.value.append(value)

    def events(self) -> list[dict[str, Any]]:
        """Alarms that went on, restarts of the run, and restarts of engines, each with its place.

        "kind" is alarm, restart or engine; "step", "time" and "tokens" are its place on the three axes.
        """
        found = [*self._alarms(), *self._engine_restarts(), *self._starts()]
        return sorted(found, key=lambda event: event["time"])

    def _alarms(self) -> Iterator[dict[str, Any]]:
        """Where an alarm went on; batches in which it stayed on are none."""
        batches = self.columns[_BATCH].at if _BATCH in self.columns else array("q")
        before = dict(zip(batches[1:], batches, strict=False))  # batch -> the one before
        for name, column in self.columns.items():
            if name.startswith(_ALARM):
                on = {index for index, value in column if value}
                for index in batches:
                    if index in on and before.get(index) not in on:
                        yield self._event("alarm", name.removeprefix(_ALARM), index)

    def _engine_restarts(self) -> Iterator[dict[str, Any]]:
        """The counter starts at 0 again when the run restarts."""
        counted = 0.0
        for index, value in self.columns.get(_RESTARTS, ()):
            if not math.isfinite(value):
                continue
            if value > counted:
                number = int(value - counted)
                name = "an engine was restarted" if number == 1 else f"{number} engines were restarted"
                yield self._event("engine", name, index)
            counted = value

    def _starts(self) -> Iterator[dict[str, Any]]:
        for number, record in start_records(self._run):
            started = started_at(record)
            if number == 1 or started is None:
                continue
            index = next((i for i, time in enumerate(self.time) if time >= started), len(self))
            step, tokens = (self.step[index - 1], self.tokens[index - 1]) if index else (0, 0.0)
            name = f"start {number}"
            source = record.get("resumed_from") or record.get("went_back_to")
            if source:
                verb = "went back to" if record.get("went_back_to") else "resumed from"
                name += f": {verb} {Path(str(source)).name}"
            yield {"kind": "restart", "name": name, "step": step, "time": started, "tokens": tokens}

    def _event(self, kind: str, name: str, index: int) -> dict[str, Any]:
        place = {"step": self.step[index], "time": self.time[index], "tokens": self.tokens[index]}
        return {"kind": kind, "name": name.replace("_", " "), **place}

    def started(self) -> float | None:
        """When the run began, Unix seconds: its first start, or else the first record."""
        first = self.time[0] if self.time else None
        for _, record in start_records(self._run):
            started = started_at(record)
            if started is not None and (first is None or started <= first):
                return started
        return first


def _float(value: Any) -> float:
    return NON_FINITE[value] if isinstance(value, str) else float(value)


def start_records(run: Run) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, content) of run-001.json, run-002.json ...; files that cannot be read are left out."""
    for path in run.records():
        try:
            state = path.stat()
        except OSError:
            continue
        content = _content(path, state.st_mtime_ns, state.st_size)
        if isinstance(content, dict):
            yield int(path.stem[4:]), content


@functools.lru_cache(maxsize=256)  # they are read every two seconds
def _content(path: Path, modified_ns: int, size: int) -> Any:
    """A JSON file as of then; None if it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def started_at(record: dict[str, Any]) -> float | None:
    """Unix seconds; None if the record does not say."""
    try:
        return datetime.fromisoformat(record["started"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return None
