"""Reads JSON-lines files, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vespo.data.located import located


def jsonl_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yield (where, row) for every non-blank line; `where` starts error messages: "a.jsonl line 3".

    ValueError for a line that is not a JSON object in UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path} line {number}"
            with located(where):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                row = json.loads(text)
            if not isinstance(row, dict):
                raise ValueError(f"{where}: a row must be a JSON object, this one is {kind(row)}")
            yield where, row


def kind(value: Any) -> str:
    """Describe a JSON value in words: "the number 3", "a list"."""
    if value is None:
        return "null"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"the number {value}"
    return {dict: "an object", list: "a list", str: "a string"}.get(type(value), f"a {type(value).__name__}")
