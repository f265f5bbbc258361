"""Filters, order and pages of the responses of a run's index, and what to choose from.

Everything that a user typed reaches SQLite as a bound value. Search text is also quoted for FTS5, so that no
character of it is syntax there.
"""

from __future__ import annotations

import math
import re
import sqlite3
from collections import Counter
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
CONTEXT = 16  # characters before a match
LARGEST = 2**62
FACETS = ("source", "finish", "status", "sign")  # with RANGES, the columns of the index by_facets
RANGES = ("step", "reward", "length", "lag", "log_w")
MOST_VALUES = 50
_WORDS = re.compile(r'"([^"]*)"|(\S+)')  # words in quotes, or a word


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
    for phrase, word in _WORDS.findall(text):
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
    """Return one page of rows, from page 0, each with the text around the first match, or its beginning."""
    where, values = filters.where()
    # ids alone are sorted, whole rows would be slow on the last pages
    chosen = f"SELECT id FROM responses WHERE {where} ORDER BY {order(sort)} LIMIT ? OFFSET ?"
    rows = connection.execute(
        f"SELECT id, {', '.join(COLUMNS)} FROM responses WHERE id IN ({chosen}) ORDER BY {order(sort)}",
        [*values, PAGE_SIZE, number * PAGE_SIZE],
    ).fetchall()
    ids = [row[0] for row in rows]
    found = pattern(filters.text)
    if found is None:
        texts = _texts(connection, ids, PREVIEW)
    else:
        texts = {id_: around(text, found) for id_, text in _texts(connection, ids).items()}
    return [_named(row[1:]) | {"text": texts.get(row[0], "")} for row in rows]


def pattern(text: str) -> re.Pattern | None:
    """Return what finds the words and phrases of a search in a text; None without any."""
    phrases = [re.findall(r"\w+", phrase or word) for phrase, word in _WORDS.findall(text)]
    parts = [r"\W+".join(words) for words in phrases if words]
    return re.compile("|".join(rf"\b{part}" for part in parts), re.IGNORECASE) if parts else None


def around(text: str, found: re.Pattern) -> str:
    """Return the part of `text` around the first match; its beginning if there is none."""
    match = found.search(text)
    start = max(0, match.start() - CONTEXT) if match else 0
    return ("…" if start else "") + text[start : start + PREVIEW]


def group_rows(connection: sqlite3.Connection, step: int, group: int) -> list[dict[str, Any]]:
    """Return the rows of all responses to one prompt in an optimizer step, with the beginnings of texts."""
    rows = connection.execute(
        f"SELECT id, {', '.join(COLUMNS)} FROM responses WHERE step = ? AND grp = ? ORDER BY id",
        [step, group],
    ).fetchall()
    previews = _texts(connection, [row[0] for row in rows], GROUP_PREVIEW)
    return [_named(row[1:]) | {"text": previews.get(row[0], "")} for row in rows]


def _named(row: tuple) -> dict[str, Any]:
    return {API_NAMES.get(name, name): value for name, value in zip(COLUMNS, row, strict=True)}


def _texts(connection: sqlite3.Connection, ids: list[int], length: int | None = None) -> dict[int, str]:
    """Return id -> the text, or its first `length` characters."""
    column, marks = "text" if length is None else f"substr(text, 1, {length})", ", ".join("?" * len(ids))
    return dict(connection.execute(f"SELECT rowid, {column} FROM texts WHERE rowid IN ({marks})", ids))


def total(connection: sqlite3.Connection, filters: Filters) -> int:
    where, values = filters.where()
    return connection.execute(f"SELECT count(*) FROM responses WHERE {where}", values).fetchone()[0]


def facets(connection: sqlite3.Connection, filters: Filters) -> dict[str, Any]:
    """Return what the chosen rows hold: "total", counts per value of FACETS, and the ranges of RANGES.

    Of a column with many values, those of most rows. One pass over the rows answers all of it.
    """
    where, values = filters.where()
    ranges = ", ".join(f"min({name}), max({name})" for name in RANGES)
    names = ", ".join(FACETS)
    parts = connection.execute(
        f"SELECT {names}, count(*), {ranges} FROM responses WHERE {where} GROUP BY {names}", values
    ).fetchall()
    counts: dict[str, Counter] = {name: Counter() for name in FACETS}
    for part in parts:
        for name, value in zip(FACETS, part, strict=False):
            counts[name][value] += part[len(FACETS)]
    found: dict[str, Any] = {
        name: {value: count for value, count in counter.most_common(MOST_VALUES) if value is not None}
        for name, counter in counts.items()
    }
    found["sign"] = {name: found["sign"][number] for name, number in SIGNS.items() if number in found["sign"]}
    for i, name in enumerate(RANGES):
        columns = (column for part in parts for column in part[len(FACETS) + 1 + 2 * i :][:2])
        known = [value for value in columns if value is not None]
        found[name] = [min(known), max(known)] if known else [None, None]
    return found | {"total": sum(part[len(FACETS)] for part in parts)}
