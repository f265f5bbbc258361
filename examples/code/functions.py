"""The code example's task: short Python functions, judged by hidden tests.

    question   f(x): x+17, at most 60
    answer     {"type": "calls", "function": "f", "cases": [[[5], 22], [[90], 60], ...]}

There are three ways to write such a function:

    careful              mixed up             hasty
    def f(x):            def f(x):            def f(x):
        y = x+17             y = x+17             return x+17
        if y > 60:           if y < 60:
            return 60            return 60
        return y             return y

Only the careful one passes all tests. A policy that prefers the others has something to discover: the limit
counts, and so does its direction.
"""

from __future__ import annotations

import json
import random
import zlib
from dataclasses import dataclass

HELD_OUT_ONE_IN = 5
CASES_PER_SIDE = 3  # tests with and without effect of the limit
OPERATIONS = {"+": lambda x, n: x + n, "-": lambda x, n: x - n, "*": lambda x, n: x * n}
LIMITS = {"at most": ">", "at least": "<"}
FLIPPED = {">": "<", "<": ">"}


@dataclass(frozen=True)
class Problem:
    """Example: Problem("+", 17, "at most", 60) asks "f(x): x+17, at most 60"."""

    operation: str
    number: int
    limit: str
    bound: int

    @property
    def question(self) -> str:
        return f"f(x): {self.expression}, {self.limit} {self.bound}"

    @property
    def expression(self) -> str:
        return f"x{self.operation}{self.number}"

    def value(self, x: int) -> int:
        """What a right function returns."""
        unlimited = OPERATIONS[self.operation](x, self.number)
        return (min if self.limit == "at most" else max)(unlimited, self.bound)

    @property
    def answer(self) -> str:
        """The hidden tests. They are a property of the question, so a problem always has the same."""
        rng = random.Random(zlib.crc32(self.question.encode()))
        limited: list[int] = []
        free: list[int] = []
        while min(len(limited), len(free)) < CASES_PER_SIDE:
            x = rng.randint(0, 200)
            side = limited if self.value(x) == self.bound else free
            if len(side) < CASES_PER_SIDE and x not in side:
                side.append(x)
        cases = [[[x], self.value(x)] for x in sorted(limited + free)]
        return json.dumps({"type": "calls", "function": "f", "cases": cases})

    @property
    def careful(self) -> str:
        return self._limited(LIMITS[self.limit])

    @property
    def mixed_up(self) -> str:
        return self._limited(FLIPPED[LIMITS[self.limit]])

    @property
    def hasty(self) -> str:
        return _block(f"return {self.expression}")

    def _limited(self, comparison: str) -> str:
        lines = f"y = {self.expression}", f"if y {comparison} {self.bound}:", f"    return {self.bound}"
        return _block(*lines, "return y")

    @property
    def is_held_out(self) -> bool:
        """A property of the question's text: no seed or order of drawing can mix the two sets."""
        return zlib.crc32(self.question.encode()) % HELD_OUT_ONE_IN == 0


def _block(*lines: str) -> str:
    return "```python\ndef f(x):\n" + "".join(f"    {line}\n" for line in lines) + "```"


def draw(rng: random.Random, *, held_out: bool) -> Problem:
    """One problem, uniform over its set."""
    while True:
        operation = rng.choice(list(OPERATIONS))
        number = rng.randint(2, 9) if operation == "*" else rng.randint(11, 99)
        bound = OPERATIONS[operation](rng.randint(100, 150), number)  # so that either side has many x
        problem = Problem(operation, number, rng.choice(list(LIMITS)), bound)
        if problem.is_held_out == held_out:
            return problem


def draw_distinct(rng: random.Random, count: int, *, held_out: bool) -> list[Problem]:
    """`count` different problems, in the order drawn."""
    problems: dict[Problem, None] = {}
    while len(problems) < count:
        problems[draw(rng, held_out=held_out)] = None
    return list(problems)
