"""Reads rows of JSONL and parquet files and checks their cells; errors name the file and the line."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vespo.data.jsonl import jsonl_rows, kind
from megatron_vespo.data.located import located

if TYPE_CHECKING:
    import pyarrow


class Absent(ValueError):
    """The row does not have this cell."""


def file_rows(path: Path, flag: str) -> Iterator[tuple[str, dict]]:
    """Yield (where, row); `where` starts error messages, e.g. "train.jsonl line 3". `flag` names the file."""
    readers = {".jsonl": jsonl_rows, ".parquet": _parquet_rows}
    if not path.exists():
        raise ValueError(f"{flag} {path}: no such file")
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder; name one .jsonl or .parquet file in it")
    if path.suffix not in readers:
        raise ValueError(f"{flag} {path}: must be a .jsonl or .parquet file")
    return _read(path, readers[path.suffix])


def _read(path: Path, reader: Callable[[Path], Iterator[tuple[str, dict]]]) -> Iterator[tuple[str, dict]]:
    with located(str(path)):  # for errors of the reader without a row, e.g. missing read permission
        yield from reader(path)


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    with located(f"{path}: not a parquet file"):
        file = pyarrow.parquet.ParquetFile(path)
    with file:
        batches, number = file.iter_batches(), 0
        while True:
            with located(f"{path}: cannot be read after row {number}"):
                batch = next(batches, None)
                rows = None if batch is None else _as_written(batch).to_pylist()
            if rows is None:
                return
            for row in rows:
                number += 1
                yield f"{path} row {number}", row


def _as_written(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Convert columns of 32-bit floats to the decimals that were written: 0.1, not 0.10000000149011612."""
    import pyarrow

    for number, field in enumerate(batch.schema):
        if pyarrow.types.is_float32(field.type):
            cells = batch[number].to_pylist()
            decimals = [cell if cell is None else float(str(np.float32(cell))) for cell in cells]
            batch = batch.set_column(number, field.name, pyarrow.array(decimals, pyarrow.float64()))
    return batch


def lookup(row: dict, key: str, flag: str, where: str) -> Any:
    """Return the cell `key`: a column name, which may contain dots, or a path through nested objects."""
    if key in row:
        return row[key]
    cell: Any = row
    for depth, part in enumerate(parts := key.split(".")):
        if not isinstance(cell, dict):
            parent = ".".join(parts[:depth])
            raise Absent(f"{where}: {flag} {key}: {parent} is {kind(cell)}, not an object")
        if part not in cell:
            near = difflib.get_close_matches(part, cell, n=1)
            raise Absent(
                f"{where}: no key {part!r} ({flag} {key}); the keys are {', '.join(map(str, cell)) or 'none'}"
                + (f"; did you mean {near[0]!r}?" if near else "")
            )
        cell = cell[part]
    return cell


def messages_of(cell: Any, key: str, where: str) -> list[dict]:
    if isinstance(cell, str):
        cell = [{"role": "user", "content": cell}]
    if not isinstance(cell, list):
        raise ValueError(f"{where}: {key} must be a string or a list of chat messages, it is {kind(cell)}")
    for message in cell:
        fields = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise ValueError(
                f"{where}: each message of {key} must be an object of strings 'role' and 'content'"
            )
    if not cell or not cell[-1]["content"].strip():
        raise ValueError(f"{where}: {key} is an empty prompt")
    with located(f"{where}: {key}"):
        for message in cell:
            message["content"].encode()  # JSON can hold lone surrogates, which tokenizers cannot read
    # Parquet fills absent fields with None, which chat templates treat as present.
    return [{name: value for name, value in message.items() if value is not None} for message in cell]


def answer_text(
    cell: Any, key: str, pattern: re.Pattern[str] | None, where: str, flag: str = "--answer-pattern"
) -> str:
    """Return the reference answer as text; `flag` is the flag that set the pattern."""
    if isinstance(cell, float) and math.isfinite(cell) and cell.is_integer():
        cell = int(cell)  # data sets saved with pandas have 14.0 instead of 14
    if isinstance(cell, bool) or not isinstance(cell, str | int | float) or cell != cell:
        raise ValueError(f"{where}: {key} must be a string or a number, it is {kind(cell)}")
    answer = str(cell)
    if pattern is not None:
        match = pattern.search(answer)
        if match is None or match.group(1) is None:
            raise ValueError(f"{where}: {flag} {pattern.pattern!r} finds nothing in {key} {answer[-60:]!r}")
        answer = match.group(1)
    if not answer.strip():
        raise ValueError(f"{where}: {key} is an empty answer")
    return answer.strip()


def user_text(messages: list[dict]) -> str:
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), messages[-1]["content"])
