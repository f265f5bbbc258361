"""The calculator example's task and its environment: two steps of arithmetic on numbers of two digits.

    question   (17*23)+45
    answer     436

The policy may call `multiply` and `add`. The second call needs the result of the first, so a right answer
takes three turns:

    <tool_call> {"name": "multiply", "arguments": {"a": 17, "b": 23}} </tool_call>      the tool says 391
    <tool_call> {"name": "add", "arguments": {"a": 391, "b": 45}} </tool_call>          the tool says 436
    \\boxed{436}

A model of this size cannot work out such numbers by itself. A policy that prefers to guess has something to
discover: both calls pay, and one of them alone does not.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from megatron_vespo.rollout.tool_environment import ToolEnvironment

HELD_OUT_ONE_IN = 5


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: a number
        b: a number
    """
    return a + b


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: a number
        b: a number
    """
    return a * b


class Calculator(ToolEnvironment):
    """What `--environment calculator:Calculator` names."""

    functions = (add, multiply)
    replayable = True  # the same call always has the same result


TOOLS = {"+": add, "*": multiply}
FORMS = (("*", "+"), ("+", "*"), ("*", "*"))  # two sums would be easy to guess


@dataclass(frozen=True)
class Problem:
    """Example: Problem(17, "*", 23, "+", 45) asks "(17*23)+45" and its answer is "436"."""

    a: int  # each of the three 11..99
    first: str  # "+" or "*"
    b: int
    second: str
    c: int

    @property
    def question(self) -> str:
        return f"({self.a}{self.first}{self.b}){self.second}{self.c}"

    @property
    def partial_result(self) -> int:
        return TOOLS[self.first](self.a, self.b)

    @property
    def answer(self) -> str:
        return str(TOOLS[self.second](self.partial_result, self.c))

    @property
    def is_held_out(self) -> bool:
        """A property of the question's text: no seed or order of drawing can mix the two sets."""
        return zlib.crc32(self.question.encode()) % HELD_OUT_ONE_IN == 0


def draw(rng: random.Random, *, held_out: bool) -> Problem:
    """One problem, uniform over its set."""
    while True:
        a, b, c = (rng.randint(11, 99) for _ in range(3))
        first, second = rng.choice(FORMS)
        problem = Problem(a, first, b, second, c)
        if problem.is_held_out == held_out:
            return problem


def draw_distinct(rng: random.Random, count: int, *, held_out: bool) -> list[Problem]:
    """`count` different problems, in the order drawn."""
    problems: dict[Problem, None] = {}
    while len(problems) < count:
        problems[draw(rng, held_out=held_out)] = None
    return list(problems)
