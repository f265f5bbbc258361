"""An append-only file of finished work, with which a killed job resumes where it stopped.

The first line has the settings of the work, every other line one finished piece. A line is on the disk when
`append` returns. A kill during a write leaves a torn last line, which is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_vespo.data.jsonl import jsonl_rows
from megatron_vespo.system.disk import sync

_SETTINGS = "settings"


def made_with(path: Path) -> dict[str, Any]:
    """The settings in a file of finished work; {} if the file or its first line is missing or torn."""
    if not path.is_file():
        return {}
    try:
        _, header = next(jsonl_rows(path), ("", {}))
    except ValueError:
        return {}
    settings = header.get(_SETTINGS)
    return settings if isinstance(settings, dict) else {}


class ResultFile:
    """Creates or continues `path`; `records` are the records already in it. One process at a time.

    `settings` of the work are JSON values; their keys are the words that messages use.

    Raises:
        ValueError: the file was made with other settings, is damaged, or another process uses it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            self._reserve()
            self._drop_torn_line()
            self.records = self._read(json.loads(json.dumps(settings)))
        except BaseException:
            self.close()
            raise

    def append(self, record: dict[str, Any]) -> None:
        """Returns when `record` is on disk. Any thread may call it; RuntimeError if the file is closed."""
        with self._lock:
            if self._descriptor < 0:
                raise RuntimeError(f"{self.path} is closed")
            self._write(record)
            self.records.append(record)

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _reserve(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.path}: another process is writing it; wait for that, or give another folder"
            ) from error

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._descriptor, whole)
            sync(self._descriptor)

    def _read(self, settings: dict[str, Any]) -> list[dict]:
        rows = list(jsonl_rows(self.path))
        if rows:
            where, header = rows[0]
            if not isinstance(header.get(_SETTINGS), dict):
                raise ValueError(f"{where}: no settings, it is no file of finished work; give another folder")
        if len(rows) > 1:
            self._check_same(header[_SETTINGS], settings)
            return [row for _, row in rows[1:]]
        os.ftruncate(self._descriptor, 0)  # nothing has finished: the settings may change
        self._write({_SETTINGS: settings})
        sync(self.path.parent)
        return []

    def _check_same(self, made_with: dict[str, Any], settings: dict[str, Any]) -> None:
        names = [*settings, *(name for name in made_with if name not in settings)]
        for name in names:
            if made_with.get(name) != settings.get(name):
                raise ValueError(
                    f"{self.path} was made with {name} {_plain(made_with.get(name))}, now it is "
                    f"{_plain(settings.get(name))}: give the same again, or another folder"
                )

    def _write(self, record: dict[str, Any]) -> None:
        line = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        while line:  # a write may be short
            line = line[os.write(self._descriptor, line) :]
        sync(self._descriptor)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
