"""Filters, order and pages of the responses of a run's index, and what to choose from.

Everything that a user typed reaches SQLite as a bound value. Search text is also quoted for FTS5, so that no
character of it is syntax there.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

PAGE_SIZE = 50
# columns of a row of the table, all of them sortable but `text`
COLUMNS = (
    "step", "idx", "grp", "prompt_id", "source", "reward", "advantage", "sign", "log_w", "weight",
    "staleness", "mismatch", "length", "given", "lag", "finish", "status", "mini_batch",
)  # fmt: skip
# what the API calls columns whose names are words of SQL or too short to read
SQL_NAMES = {"index": "idx", "group": "grp"}
API_NAMES = {sql: api for api, sql in SQL_NAMES.items()}
PREVIEW, GROUP_PREVIEW = 240, 4000  # characters of a response in the table, and side by side
SIGNS = {"positive": 1, "zero": 0, "negative": -1}
LARGEST = 2**62
FACETS = ("source", "finish", "status", "sign")
MOST_FACET_VALUES = 50


@dataclass(frozen=True)
class Filters:
    """What the rows must be; None and "" ask nothing. Lengths in sampled tokens, staleness in steps."""

    step_min: int | None = None
    step_max: int | None = None
    reward_min: float | None = None
    reward_max: float | None = None
    length_min: int | None = None
    length_max: int | None = None
    staleness_min: int | None = None
    staleness_max: int | None = None
    log_w_min: float | None = None
    log_w_max: float | None = None
    sign: str = ""  # a name in SIGNS
    finish: str = ""
    status: str = ""
    source: str = ""
    group: int | None = None
    text: str = ""

    @classmethod
    def of(cls, params: Mapping[str, str]) -> Filters:
        """From the parameters of a request. ValueError says which one is wrong."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            if text := params.get(field.name, "").strip():
                values[field.name] = _parsed(field.name, text, str(field.type))
        filters = cls(**values)
        if filters.sign and filters.sign not in SIGNS:
            raise ValueError(f"sign is {filters.sign!r}; it must be one of {', '.join(SIGNS)}")
        return filters

    def where(self) -> tuple[str, list[Any]]:
        """Return the condition and its values."""
        bounds = {
            "step >= ?": self.step_min, "step <= ?": self.step_max,
            "reward >= ?": self.reward_min, "reward <= ?": self.reward_max,
            "length >= ?": self.length_min, "length <= ?": self.length_max,
            "lag >= ?": self.staleness_min, "lag <= ?": self.staleness_max,
            "log_w >= ?": self.log_w_min, "log_w <= ?": self.log_w_max,
            "sign = ?": SIGNS.get(self.sign), "grp = ?": self.group,
            "finish = ?": self.finish or None, "status = ?": self.status or None,
            "source = ?": self.source or None,
        }  # fmt: skip
        chosen = {condition: value for condition, value in bounds.items() if value is not None}
        if self.text.strip():
            match = match_expression(self.text)
            chosen["id IN (SELECT rowid FROM texts WHERE texts MATCH ?)" if match else "? = 1"] = match or 0
        return " AND ".join(chosen) or "1", list(chosen.values())


def _parsed(name: str, text: str, kind: str) -> Any:
    if kind == "str":
        return text
    whole = kind.startswith("int")
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = math.nan
    if not abs(value) < LARGEST:  # NaN, too; SQLite's integers end there
        raise ValueError(f"{name} is {text!r}; it must be {'an integer' if whole else 'a number'}")
    return value


def match_expression(text: str) -> str:
    """Return an FTS5 expression for a user's words: all must occur, "words in quotes" side by side.

    A word matches longer ones that begin with it; words in quotes match whole. "" if no letter or digit is
    in `text`: punctuation alone is not indexed.
    """
    parts = []
    for phrase, word in re.findall(r'"([^"]*)"|(\S+)', text):
        wanted = (phrase or word).replace("\0", " ")
        if any(character.isalnum() for character in wanted):
            quoted = wanted.replace('"', '""')
            parts.append(f'"{quoted}"' + ("" if phrase else " *"))
    return " AND ".join(parts)


def order(sort: str) -> str:
    """Return the ORDER BY of `sort`: a column, with a minus before it for the largest first.

    Unknown values come last in both directions. ValueError for a name that is no column.
    """
    name = sort.removeprefix("-")
    column = SQL_NAMES.get(name, name)
    if column not in COLUMNS:
        known = ", ".join(API_NAMES.get(one, one) for one in COLUMNS)
        raise ValueError(f"sort is {sort!r}; it must be one of {known}, with - before it for descending")
    return f"{column} {'DESC' if sort.startswith('-') else 'ASC'} NULLS LAST, id"


def page(connection: sqlite3.Connection, filters: Filters, sort: str, number: int) -> list[dict[str, Any]]:
    """Return one page of rows, from page 0, each with the beginning of its text."""
    where, values = filters.where()
    # the text is read for the rows of the page alone
    rows = connection.execute(
        f"SELECT id, {', '.join(COLUMNS)} FROM responses WHERE {where} ORDER BY {order(sort)}"
        " LIMIT ? OFFSET ?",
        [*values, PAGE_SIZE, number * PAGE_SIZE],
    ).fetchall()
    previews = _previews(connection, [row[0] for row in rows], filters.text)
    return [_named(row[1:]) | {"text": previews.get(row[0], "")} for row in rows]


def group_rows(connection: sqlite3.Connection, step: int, group: int) -> list[dict[str, Any]]:
    """Return the rows of all responses to one prompt in an optimizer step, with the beginnings of texts."""
    rows = connection.execute(
        f"SELECT id, {', '.join(COLUMNS)} FROM responses WHERE step = ? AND grp = ? ORDER BY id",
        [step, group],
    ).fetchall()
    previews = _previews(connection, [row[0] for row in rows], "", GROUP_PREVIEW)
    return [_named(row[1:]) | {"text": previews.get(row[0], "")} for row in rows]


def _named(row: tuple) -> dict[str, Any]:
    return {API_NAMES.get(name, name): value for name, value in zip(COLUMNS, row, strict=True)}


def _previews(
    connection: sqlite3.Connection, ids: list[int], text: str, length: int = PREVIEW
) -> dict[int, str]:
    """Return id -> the part of the text around the first match, or its beginning."""
    if not ids:
        return {}
    marks = ", ".join("?" * len(ids))
    if match := match_expression(text):
        return dict(
            connection.execute(
                f"SELECT rowid, snippet(texts, 0, '', '', '…', 40) FROM texts WHERE texts MATCH ?"
                f" AND rowid IN ({marks})",
                [match, *ids],
            )
        )
    return dict(
        connection.execute(
            f"SELECT rowid, substr(text, 1, {length}) FROM texts WHERE rowid IN ({marks})", ids
        )
    )


def total(connection: sqlite3.Connection, filters: Filters) -> int:
    where, values = filters.where()
    return connection.execute(f"SELECT count(*) FROM responses WHERE {where}", values).fetchone()[0]


def facets(connection: sqlite3.Connection, filters: Filters) -> dict[str, Any]:
    """Return what the chosen rows hold: counts per value of FACETS, and the ranges of the numbers.

    Of a column with many values, those of most rows.
    """
    where, values = filters.where()
    counts = {
        name: dict(
            connection.execute(
                f"SELECT {name}, count(*) FROM responses WHERE {where} AND {name} IS NOT NULL"
                f" GROUP BY {name} ORDER BY count(*) DESC LIMIT {MOST_FACET_VALUES}",
                values,
            ).fetchall()
        )
        for name in FACETS
    }
    names = {number: name for name, number in SIGNS.items()}
    counts["sign"] = {names[sign]: count for sign, count in counts["sign"].items()}
    numbers = ("step", "reward", "length", "lag", "log_w")
    ranges = connection.execute(
        f"SELECT {', '.join(f'min({name}), max({name})' for name in numbers)} FROM responses WHERE {where}",
        values,
    ).fetchone()
    return counts | {name: list(ranges[2 * i : 2 * i + 2]) for i, name in enumerate(numbers)}
