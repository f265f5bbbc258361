"""Shows the stages of a smoke run: one live line each, and a table at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import TextIO

from rich.console import Console
from rich.table import Table

from megatron_vespo.observability.display_rows import clock
from megatron_vespo.rollout.sglang_server import EngineError

OK, FAIL, NOT_RUN = "ok", "FAIL", "not run"
TABLE_WIDTH = 110  # if the output is no terminal
MAX_LINE = 300  # characters of a problem's first line, and of its last one
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class CheckFailed(RuntimeError):
    """A computation ran with a wrong result; later stages can still run."""


class Stopped(RuntimeError):
    """A stage broke, so later stages cannot run."""


@dataclass
class Stage:
    """One row. The stage may set `seconds` itself if only a part of it is measured."""

    name: str
    hint: str  # what to try when it fails
    result: str = NOT_RUN
    seconds: float | None = None
    bytes: int | None = None
    detail: str = ""
    problem: str = ""

    @property
    def bytes_per_second(self) -> float | None:
        return self.bytes / self.seconds if self.bytes is not None and self.seconds else None


@dataclass
class Stages:
    """`rows` are all stages in order. Engines and trainer also report to this display."""

    rows: list[Stage]
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    started: float = field(default_factory=monotonic)
    _open: Stage | None = None

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Runs one stage. Records a CheckFailed and continues; turns every other error into Stopped."""
        row = self._row(name)
        self.log(f"{name} ...")
        self._open, began = row, monotonic()
        try:
            yield row
            row.result = OK
        except CheckFailed as failure:
            row.result, row.problem = FAIL, one_line(failure)
        except Exception as error:  # any error is a finding
            row.result, row.problem = FAIL, one_line(error)
            if isinstance(error, EngineError):  # in any stage
                row.hint = self._row("start SGLang").hint
            raise Stopped(row.problem) from error
        finally:
            self._open = None
            if row.seconds is None:
                row.seconds = monotonic() - began
            self.log(f"{name}: {', '.join(_details(row))}")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A stage of that name; inside another stage it is part of that stage."""
        if self._open is not None:
            yield
            return
        with self.stage(name):
            yield

    def message(self, text: str) -> None:
        self._print(f"          {text}")

    def progress(self, done: int, total: int) -> None:
        """Nothing, like the next two: a stage is so short that they need not be shown."""

    def background(self, ready: int, wanted: int) -> None:
        pass

    def saved(self, step: int) -> None:
        pass

    def phase_seconds(self) -> dict[str, float]:
        """Empty: no caller needs the seconds of a step."""
        return {}

    def log(self, text: str) -> None:
        self._print(f"[{clock(monotonic() - self.started)}] {text}")

    def _row(self, name: str) -> Stage:
        [row] = [row for row in self.rows if row.name == name]
        return row

    def _print(self, text: str) -> None:
        print(text + "\n", end="", file=self.stream, flush=True)  # in one piece: threads also write

    @property
    def failed(self) -> list[Stage]:
        return [row for row in self.rows if row.result == FAIL]

    @property
    def ok(self) -> bool:
        return all(row.result == OK for row in self.rows)

    def print_table(self) -> None:
        """Prints the stages, then each problem with a hint."""
        table = Table("stage", "result")
        for heading in ("seconds", "bytes", "bytes/s"):
            table.add_column(heading, justify="right")
        table.add_column("found")
        for row in self.rows:
            rate = row.bytes_per_second
            seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
            moved = "" if row.bytes is None else size(row.bytes)
            table.add_row(
                row.name, row.result, seconds, moved, "" if rate is None else f"{size(rate)}/s", row.detail
            )
        console = Console(file=self.stream)
        (console if console.is_terminal else Console(file=self.stream, width=TABLE_WIDTH)).print(table)
        for row in self.failed:
            self._print(f"FAIL {row.name}: {row.problem}")
            self._print(f"     try: {row.hint}")

    def write(self, path: Path, facts: dict) -> None:
        """Writes all stages as JSON, with `facts` about the run."""
        rows = [asdict(row) | {"bytes_per_second": row.bytes_per_second} for row in self.rows]
        path.write_text(json.dumps({"ok": self.ok, **facts, "stages": rows}, indent=2) + "\n")


def _details(row: Stage) -> list[str]:
    moved = "" if row.bytes is None else size(row.bytes)
    return [text for text in (row.result, f"{row.seconds:.1f} s", moved, row.detail, row.problem) if text]


def size(number: float) -> str:
    """Example: 2.5e9 -> "2.5 GB"."""
    for unit, name in UNITS:
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f} B"


def one_line(error: BaseException) -> str:
    """The error's first line; for a dead process also the last line, which is the last one of its log."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    known = isinstance(error, RuntimeError | ValueError)
    text = shorten(lines[0] if known else f"{type(error).__name__}: {lines[0]}", MAX_LINE)
    died = " died " in lines[0] and len(lines) > 1
    return f"{text} ... {shorten(lines[-1], MAX_LINE)}" if died else text


def shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
