"""Keeps one row per recorded response of a run in SQLite, so that pages and filters read no step file.

The index is a cache. It lies in XDG_CACHE_HOME, not in the run's folder. A thread follows the run's files: a
new file is added, a rewritten one replaced, a removed one forgotten. Each file is one transaction. A damaged
file is skipped and listed.

The index `by_facets` holds all that `query.facets` counts, in the order in which it groups.

Tables: `responses` with the numbers, `texts` (FTS5) with the text under the same rowid, `files` with what is
known of each step file. A row's id is step * 2^20 + index, so the rows of a step are one range.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from megatron_vespo.data.step_records import FOLDER_NAME, StepRecord, read_step, step_files

SCHEMA = 1  # an index of another version is built anew
STEP_BITS = 20  # of an id, for the index of the response
FOLLOW_SECONDS = 1.0  # between two looks at the run's folder
BUSY_SECONDS = 20.0
STOP_SECONDS = 30.0

_TABLES = """
CREATE TABLE files (step INTEGER PRIMARY KEY, mtime_ns INTEGER, size INTEGER, error TEXT, responses INTEGER,
                    mini_batch INTEGER, settings TEXT);
CREATE TABLE responses (id INTEGER PRIMARY KEY, step INTEGER, idx INTEGER, grp INTEGER, prompt_id INTEGER,
                        source TEXT, reward REAL, advantage REAL, sign INTEGER, log_w REAL, weight REAL,
                        correction REAL, staleness REAL, mismatch REAL, length INTEGER, given INTEGER,
                        lag INTEGER, finish TEXT, status TEXT, mini_batch INTEGER);
CREATE INDEX by_group ON responses (step, grp);
CREATE INDEX by_facets ON responses (source, finish, status, sign, step, reward, length, lag, log_w);
CREATE VIRTUAL TABLE texts USING fts5(text);
"""
_COLUMNS = 20


class RunIndex:
    """The index of one run. `start` follows the run in a thread; `refresh` does one round of it.

    `path` is the run's output folder. `cache` is the folder for the index; None takes the user's cache.
    """

    def __init__(self, path: Path, cache: Path | None = None):
        self._folder = path / FOLDER_NAME
        self._fallback: tempfile.TemporaryDirectory | None = None
        self.file = self._index_file(path, cache)
        self._stop, self._thread = threading.Event(), None
        self._lock = threading.Lock()  # of `start` and `refresh`
        self.problem = ""  # why the index cannot be written
        self._create()

    def _index_file(self, path: Path, cache: Path | None) -> Path:
        resolved = path.resolve()
        shown = _encodable(resolved.name)[:40]  # names of files have at most 255 bytes
        name = f"{shown}-{hashlib.sha256(os.fsencode(resolved)).hexdigest()[:16]}.sqlite"
        folder = cache or cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder / name
        except OSError:  # a read-only home
            self._fallback = tempfile.TemporaryDirectory(prefix="megatron-vespo-view-")
            return Path(self._fallback.name) / name

    def _create(self) -> None:
        """Make an empty index where there is none, or one of another version, or a damaged one."""
        try:
            with self._writing() as connection:
                if connection.execute("PRAGMA user_version").fetchone()[0] == SCHEMA:
                    connection.execute("SELECT count(*) FROM files").fetchone()
                    return
        except sqlite3.DatabaseError:
            pass
        self._rebuild()

    def _rebuild(self) -> None:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{self.file}{suffix}").unlink(missing_ok=True)
        with self._writing() as connection:
            connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.file, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")  # readers go on while a file is added
            connection.execute("PRAGMA synchronous = NORMAL")
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection for one request, which cannot write."""
        uri = f"{self.file.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA query_only = 1")
            connection.execute("PRAGMA mmap_size = 268435456")
            yield connection

    def start(self) -> None:
        """Follow the run's files in a thread; does nothing if it does already."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="index", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """End the thread after the file at hand."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)
        if self._fallback is not None:
            self._fallback.cleanup()

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self._refresh_or_rebuild()
                self.problem = ""
            except sqlite3.Error as error:  # locked, or the disk is full: the next round may do
                self.problem = f"the index {self.file} cannot be written: {error}"
            except OSError as error:
                self.problem = f"{error.filename or self._folder}: {error.strerror}"
            except Exception as error:  # the page says it, and other files may come
                self.problem = f"the index waits: {type(error).__name__}: {error}"
            self._stop.wait(FOLLOW_SECONDS)

    def _refresh_or_rebuild(self) -> None:
        try:
            self.refresh()
        except sqlite3.DatabaseError as error:
            deleted = "no such table" in str(error)  # SQLite has made an empty file in its place
            if isinstance(error, sqlite3.OperationalError) and not deleted:  # locked, or the disk is full
                raise
            self._rebuild()
            self.refresh()

    def refresh(self) -> int:
        """Bring the index up to date with the run's files; the number of files that had changed."""
        found = {step: path for step, path in step_files(self._folder)}
        changed = 0
        with self._writing() as connection:
            known = dict(
                (step, (mtime, size))
                for step, mtime, size in connection.execute("SELECT step, mtime_ns, size FROM files")
            )
            for step in known.keys() - found.keys():
                with _transaction(connection):
                    _forget(connection, step)
                changed += 1
            for step, path in found.items():
                if self._stop.is_set():
                    break
                try:
                    stat = path.stat()
                except FileNotFoundError:  # a resumed run has just removed it
                    continue
                if known.get(step) != (stat.st_mtime_ns, stat.st_size):
                    self._add(connection, step, path, stat)
                    changed += 1
        return changed

    def _add(self, connection: sqlite3.Connection, step: int, path: Path, stat: os.stat_result) -> None:
        """Put a file's rows in the place of those that are there."""
        rows, texts, error, record = [], [], None, None
        try:
            record = read_step(path)
            rows, texts = rows_of(record, step), texts_of(record, step)
        except ValueError as wrong:
            error = _encodable(str(wrong))
        with _transaction(connection):
            _forget(connection, step)
            marks = ", ".join("?" * _COLUMNS)
            connection.executemany(f"INSERT INTO responses VALUES ({marks})", rows)
            connection.executemany("INSERT INTO texts (rowid, text) VALUES (?, ?)", texts)
            connection.execute(
                "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    step, stat.st_mtime_ns, stat.st_size, error, len(rows),
                    None if record is None else record.mini_batch,
                    None if record is None else json.dumps(dict(record.settings)),
                ),
            )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return how far the index is: files, those indexed, responses, lines on damaged files, a problem."""
        with self.reading() as connection:
            indexed, responses = connection.execute("SELECT count(*), sum(responses) FROM files").fetchone()
            damaged = [
                error for (error,) in connection.execute("SELECT error FROM files WHERE error NOT NULL")
            ]
        return {
            "files": len(step_files(self._folder)),
            "indexed": indexed,
            "responses": responses or 0,
            "damaged": damaged,
            "problem": self.problem,
        }

    def record_file(self, step: int) -> Path | None:
        """Return the file of a step, None if there is none."""
        return dict(step_files(self._folder)).get(step)

    def settings(self, step: int | None = None) -> dict[str, Any]:
        """Return the loss's settings as `step` recorded them; of the last step by default."""
        order = "step DESC" if step is None else f"abs(step - {int(step)})"
        with self.reading() as connection:
            row = connection.execute(
                f"SELECT settings FROM files WHERE settings NOT NULL ORDER BY {order} LIMIT 1"
            ).fetchone()
        return json.loads(row[0]) if row else {}


def cache_folder() -> Path:
    """Return where indexes lie: megatron-vespo/view in XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "megatron-vespo" / "view"


def rows_of(record: StepRecord, step: int) -> list[tuple]:
    """Return the rows of `responses` for a record."""
    columns = (
        record.advantages, record.log_w, record.weight, record.correction, record.log_mismatch_in_w,
        record.group_ids,
    )  # fmt: skip
    rows = []
    for i, (completion, advantage, log_w, weight, correction, mismatch, group) in enumerate(
        zip(record.completions, *(column.tolist() for column in columns), strict=True)
    ):
        length = completion.num_sampled
        lag = step - 1 - completion.policy_versions.oldest if len(completion.policy_versions) else None
        rows.append(
            (
                step << STEP_BITS | i, step, i, group, completion.prompt.prompt_id, source_of(completion),
                _number(completion.reward), _number(advantage), (advantage > 0) - (advantage < 0),
                _number(log_w), _number(weight), _number(correction), _number(log_w - mismatch),
                _number(mismatch), length, len(completion.token_ids) - length, lag, completion.finish_reason,
                completion.reward_status, record.mini_batch,
            )
        )  # fmt: skip
    return rows


def source_of(completion: Any) -> str | None:
    """Return the data source of a completion's prompt, None if its row names none."""
    source = completion.prompt.metadata.get("data_source")
    return _encodable(str(source)) if source else None


def texts_of(record: StepRecord, step: int) -> list[tuple[int, str]]:
    """Return rowid and text of each response, the tokens of tools included."""
    return [
        (step << STEP_BITS | i, record.text(completion.token_ids).replace("\0", "�"))
        for i, completion in enumerate(record.completions)
    ]


def _encodable(text: str) -> str:
    """`text` without halves of characters, which SQLite does not take: paths and JSON may have some."""
    return text.encode(errors="replace").decode()


def _number(value: float | None) -> float | None:
    """NULL stands for unknown. SQLite would make it of NaN, too, but not in every version."""
    return None if value is None or math.isnan(value) else value


def _forget(connection: sqlite3.Connection, step: int) -> None:
    first, after = step << STEP_BITS, (step + 1) << STEP_BITS
    connection.execute("DELETE FROM texts WHERE rowid >= ? AND rowid < ?", (first, after))
    connection.execute("DELETE FROM responses WHERE id >= ? AND id < ?", (first, after))
    connection.execute("DELETE FROM files WHERE step = ?", (step,))


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
