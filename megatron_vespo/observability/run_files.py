"""Reads the files of a run's output folder, also of a killed, a running or an old run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_vespo.observability.metrics import NON_FINITE, batch_records


@dataclass(frozen=True)
class RunFiles:
    """What an output folder holds. A file that is missing or cannot be read is as if empty."""

    folder: Path
    metrics: list[dict]  # records of metrics.jsonl whose values are numbers
    starts: list[dict]  # run-001.json and the records of resumes, oldest first
    summary: dict  # summary.json, if it is that of the last start
    samples: list[dict]  # rows of sample-responses.jsonl, oldest first

    @classmethod
    def read(cls, folder: Path) -> RunFiles:
        metrics = _metrics(folder / "metrics.jsonl")
        starts = [found for path in _records(folder) if (found := _object(path))]
        how = outcome_of(starts[-1]).get("how") if starts else None
        summary = _object(folder / "summary.json")
        # an earlier run in the same folder, or the part before a resume, may have left one
        if how not in (None, "finished") or summary.get("steps") != _last_step(metrics):
            summary = {}
        return cls(folder, metrics, starts, summary, list(_rows(folder / "sample-responses.jsonl")))

    @cached_property
    def batches(self) -> list[dict]:
        return batch_records(self.metrics)

    @property
    def evaluations(self) -> list[dict]:
        return [record for record in self.metrics if "eval/accuracy" in record]

    @property
    def last_start(self) -> dict:
        return self.starts[-1] if self.starts else {}

    @property
    def last_step(self) -> int:
        return _last_step(self.metrics)

    def argument(self, name: str) -> Any:
        """A flag's value in the last start; None if it is not known."""
        return self.last_start.get("arguments", {}).get(name)


def outcome_of(start: dict) -> dict:
    """How a start ended; empty if its record does not say it."""
    outcome = start.get("outcome")
    return outcome if isinstance(outcome, dict) else {}


def _last_step(metrics: list[dict]) -> int:
    return max((record["step"] for record in metrics), default=0)


def _metrics(path: Path) -> list[dict]:
    """Records up to the first bad line. A run has millions of values: each is looked at once."""
    records = []
    for row in _rows(path):
        for name in [name for name, value in row.items() if type(value) is not float]:
            value = row[name]
            if isinstance(value, str) and value in NON_FINITE:
                row[name] = NON_FINITE[value]
            elif not isinstance(value, int):
                del row[name]
        if isinstance(row.get("step"), int):
            records.append(row)
    if any("heldout/accuracy" in record for record in records):  # version 0.1 wrote heldout/ for eval/
        return [{name.replace("heldout/", "eval/"): v for name, v in record.items()} for record in records]
    return records


def _records(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("run-*.json") if path.stem.removeprefix("run-").isdecimal()]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("run-")))


def _object(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _rows(path: Path) -> Iterator[dict]:
    """The objects of a JSONL file up to the first line that is none: a killed run's last one."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            return
        if not isinstance(row, dict):
            return
        yield row
