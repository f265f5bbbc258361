"""A reward for tests of evaluations, by its name."""

from __future__ import annotations

import time


def by_the_letter(response: str, answer: str, metadata: dict) -> float:
    """1 if the answer begins the response; a response can make the grader fail, or hang."""
    if "!" in response:
        raise ArithmeticError("unreadable")
    if "?" in response:
        time.sleep(60)
    return float(response.startswith(answer))


def fails(response: str, answer: str, metadata: dict) -> float:
    raise KeyError("score")
