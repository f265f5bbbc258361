"""Finds the run folders that the viewer shows."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

METRICS, SUMMARY, RESPONSES = "metrics.jsonl", "summary.json", "responses"
MAX_DEPTH = 3  # of a run below a folder of runs
MAX_FOLDERS = 10_000  # looked at below one
_RECORD = re.compile(r"run-\d+\.json")


@dataclass(frozen=True)
class Run:
    id: str  # letters, digits and ._- only; the same as long as the server runs
    path: Path  # absolute

    @property
    def gone(self) -> bool:
        return not self.path.is_dir()

    @property
    def modified(self) -> float | None:
        """When metrics were last written, Unix seconds; None if there are none yet."""
        try:
            return (self.path / METRICS).stat().st_mtime
        except OSError:
            return None

    @property
    def finished(self) -> bool:
        """Whether the summary is that of these metrics: a run that goes on after its end has an old one."""
        try:
            return (self.path / SUMMARY).stat().st_mtime >= (self.modified or 0.0)
        except OSError:
            return False

    def records(self) -> list[Path]:
        """run-001.json, run-002.json ...: one for each start."""
        found = [path for path in self.path.glob("run-*.json") if _RECORD.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.stem[4:]))


class Runs:
    """The runs that `paths` name: run folders, or folders of such. May be used by several threads.

    Raises:
        ValueError: a path is no folder, or there is no run in it.
    """

    def __init__(self, paths: Sequence[Path]):
        self._paths = [path.absolute() for path in paths]
        self._lock = threading.Lock()
        self._runs: dict[Path, Run] = {}
        for path in self._paths:
            if not path.exists():
                raise ValueError(f"{path}: there is no such folder; RUN is the --output-dir of a run")
            if not path.is_dir():
                raise ValueError(f"{path} is a file; RUN is the --output-dir of a run, or a folder of runs")
            if next(_run_folders(path), None) is None:
                raise ValueError(
                    f"{path} is no run folder: neither it nor a folder in it has {METRICS} or run-001.json"
                )
        self.refresh()

    def refresh(self) -> list[Run]:
        """All runs, those that have come since included. One whose folder has gone stays."""
        with self._lock:
            for path in self._paths:
                for folder in sorted(_run_folders(path)):
                    if folder not in self._runs:
                        self._runs[folder] = Run(self._new_id(folder), folder)
            return list(self._runs.values())

    def __getitem__(self, id_: str) -> Run:
        """KeyError if there is no such run."""
        with self._lock:
            for run in self._runs.values():
                if run.id == id_:
                    return run
        raise KeyError(id_)

    def _new_id(self, folder: Path) -> str:
        taken = {run.id for run in self._runs.values()}
        # "run" alone says nothing: many runs are WORK/run
        names = [_plain(folder.name), _plain(f"{folder.parent.name}-{folder.name}")]
        names += [f"{names[-1]}-{number}" for number in range(2, len(taken) + 3)]
        return next(name for name in names if name not in taken)


def is_run(folder: Path) -> bool:
    if (folder / METRICS).is_file() or (folder / RESPONSES).is_dir():
        return True
    return any(_RECORD.fullmatch(path.name) for path in folder.glob("run-*.json"))


def _run_folders(path: Path) -> Iterator[Path]:
    """`path` itself, or the runs below it. What lies inside a run belongs to it."""
    looked_at = 0
    level = [path]
    for _ in range(MAX_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            looked_at += 1
            if looked_at > MAX_FOLDERS:
                return
            try:
                if is_run(folder):
                    yield folder
                else:
                    below += [
                        entry
                        for entry in folder.iterdir()
                        if not entry.name.startswith(".") and entry.is_dir() and not entry.is_symlink()
                    ]
            except OSError:  # it may have gone, or be another user's
                continue
        level = below


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".") or "run"
