"""Defines what a tracker gets of a run. Each tracker lives in a process of its own, see `child`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

State = Literal["finished", "failed", "interrupted"]
SAMPLE_COLUMNS = (
    "step", "why", "prompt", "response", "answer", "reward", "advantage", "log_w", "weight", "finish_reason",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """How a tracker's run begins. With `run_id` it continues the run that has this id."""

    folder: str  # the output folder of the run, for local files
    project: str
    name: str
    group: str | None = None
    tags: tuple[str, ...] = ()
    offline: bool = False
    run_id: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


class Tracker(Protocol):
    """One tracker's run. Any method may raise or block."""

    run_id: str
    where: str  # a URL or a folder, for people

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        """Records the metrics of an optimizer step; `time` in Unix seconds."""
        ...

    def note(self, step: int, title: str, text: str) -> None:
        """Records an alarm or another event."""
        ...

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records a table of sample responses, with the columns SAMPLE_COLUMNS."""
        ...

    def finish(self, state: State, summary: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Ends the run. `files` are pictures and documents of its end."""
        ...


def sample_table(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The rows as lists in the order of SAMPLE_COLUMNS; None where a row lacks a value."""
    full = [{"response": response_text(row), **row} for row in rows]
    return [[row.get(column) for column in SAMPLE_COLUMNS] for row in full]


def response_text(row: Mapping[str, Any]) -> str:
    """The turns of a response as one text. Of several, each begins with its writer."""
    turns = row.get("turns", ())
    if len(turns) == 1:
        return turns[0]["text"]
    return "\n\n".join(f"[{turn['writer']}]\n{turn['text']}" for turn in turns)


def sample_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, for trackers without tables. Responses are code blocks, never HTML."""
    parts = []
    for row in rows:
        values = ", ".join(
            f"{name} {row[name]:.4g}" if isinstance(row[name], float) else f"{name} {row[name]}"
            for name in ("reward", "advantage", "log_w", "weight", "finish_reason")
            if row.get(name) is not None
        )
        blocks = "\n\n".join(map(_block, (str(row.get("prompt", "")), response_text(row))))
        parts.append(f"**{row.get('why', '')}**: {values}\n\n{blocks}")
    return "\n\n".join(parts)


def _block(text: str) -> str:
    """A code block of Markdown; its fence is longer than every fence in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings with their keys joined by "/": {"a": {"b": 1}} -> {"a/b": 1}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}/")
        else:
            found[f"{prefix}{key}"] = value
    return found
