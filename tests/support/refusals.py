"""What a refusal must say: one line, with the flag and the offending value; not in which words.

A row of a table is `(argv, *words)`: the line names the first flag of `argv`, its values and all `words`.
A first flag that is written FLAG=VALUE is named without its value.
"""

from __future__ import annotations

import itertools


def first_flag(argv: str) -> list[str]:
    """The flag that a row begins with, and its values as one text."""
    flag, *rest = argv.split()
    values = itertools.takewhile(lambda word: not word.startswith("--"), rest)
    return [flag.partition("=")[0], *filter(None, [" ".join(values)])]


def check_refusal(line: str, argv: str, *words: str) -> None:
    text = line.rstrip("\n")
    assert text and "\n" not in text
    assert [word for word in (*first_flag(argv), *words) if word not in text] == [], text
