"""The tests of a code problem, as the column `answer` holds them in JSON.

    {"type": "stdin", "cases": [["1 2\\n", "3\\n"], ...]}                   what a script reads and must print
    {"type": "calls", "function": "add", "cases": [[[1, 2], 3], ...]}      arguments and the value to return
    {"type": "asserts", "setup": "import math", "tests": ["assert f(1) == 2", ...], "functions": {"f": "f"}}

`functions` maps names that the tests call to names that the program defines. Tests of functions may have a
"prefix", code that runs before the program: imports that it may rely on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

_RIGHT = 'must be JSON of tests with "type": "stdin", "calls" or "asserts", as prepare-data writes it'


@dataclass(frozen=True)
class Tests:
    """The tests of one row; `len(tests)` is their number."""

    cases: tuple[tuple[str, str], ...] = ()  # of a script: (stdin, expected stdout)
    prefix: str = ""
    functions: dict[str, Any] | None = None  # the JSON object of tests of functions

    def __len__(self) -> int:
        if self.functions is None:
            return len(self.cases)
        return len(self.functions["cases" if self.functions["type"] == "calls" else "tests"])


@lru_cache(maxsize=64)  # a group's responses share their row
def parse_tests(answer: str) -> Tests:
    """ValueError if the answer is not of this form."""
    try:
        data = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer {answer[:60]!r} {_RIGHT} ({error})") from error
    kind = data.get("type") if isinstance(data, dict) else None
    if kind == "stdin" and _is_list(data.get("cases"), _is_text_pair):
        return Tests(cases=tuple((stdin, expected) for stdin, expected in data["cases"]))
    calls = (
        kind == "calls" and isinstance(data.get("function"), str) and _is_list(data.get("cases"), _is_call)
    )
    asserts = kind == "asserts" and _is_list(data.get("tests"), _is_text) and _has_functions(data)
    if (calls or asserts) and all(map(_is_text, (data.get("prefix", ""), data.get("setup", "")))):
        prefix = data.pop("prefix", "")  # of the program: the tests do not need it
        return Tests(prefix=prefix, functions={"setup": "", **data})
    raise ValueError(f"the answer {answer[:60]!r} {_RIGHT}")


def _is_list(cell: Any, is_item: Any) -> bool:
    return isinstance(cell, list) and bool(cell) and all(map(is_item, cell))


def _is_text(item: Any) -> bool:
    return isinstance(item, str)


def _is_text_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(map(_is_text, item))


def _is_call(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and isinstance(item[0], list)


def _has_functions(data: dict[str, Any]) -> bool:
    functions = data.get("functions")
    return isinstance(functions, dict) and bool(functions) and all(map(_is_text, functions.values()))
