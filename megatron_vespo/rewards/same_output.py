"""Compares what a script printed with what it should print."""

from __future__ import annotations

import math

_TOLERANCE = 1e-6  # relative and absolute, of a decimal fraction


def same_output(printed: str, expected: str) -> bool:
    """Whether the lines agree, apart from spacing and the last digits of decimal fractions.

    Words are compared one by one. "1e3" and "1000" are different words, because no fraction is expected.
    """
    ours, theirs = _lines(printed), _lines(expected)
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _lines(text: str) -> list[list[str]]:
    """The words of each line, without empty lines at the ends."""
    return [line.split() for line in text.strip().split("\n")]


def _same_line(ours: list[str], theirs: list[str]) -> bool:
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(ours: str, expected: str) -> bool:
    if ours == expected:
        return True
    if "." not in expected:
        return False
    try:
        value, wanted = float(ours), float(expected)
    except ValueError:
        return False
    return math.isclose(value, wanted, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
