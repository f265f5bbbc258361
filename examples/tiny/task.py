"""The tiny example's task: the sum of five digits modulo seven, answered directly or with the work shown.

    question  (3+8+5+9+2)%7
    worked    3;4;2;4;6;\\boxed{6}      the remainder after each digit, then the answer
    direct    \\boxed{6}

A small model learns the worked form easily and can only guess at the direct one, so a policy that
prefers direct answers has something to discover: showing the work pays.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from itertools import accumulate

NUM_DIGITS = 5
MODULUS = 7
HELD_OUT_ONE_IN = 5
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


@dataclass(frozen=True)
class Problem:
    """Example: Problem((3, 8, 5, 9, 2)) asks "(3+8+5+9+2)%7" and its answer is "6"."""

    digits: tuple[int, ...]  # each 1..9

    @property
    def question(self) -> str:
        return f"({'+'.join(map(str, self.digits))})%{MODULUS}"

    @property
    def answer(self) -> str:
        return str(sum(self.digits) % MODULUS)

    @property
    def direct(self) -> str:
        return f"\\boxed{{{self.answer}}}"

    @property
    def worked(self) -> str:
        return "".join(f"{partial_sum % MODULUS};" for partial_sum in accumulate(self.digits)) + self.direct

    @property
    def is_held_out(self) -> bool:
        """A property of the question's text: no seed or order of drawing can mix the two sets."""
        return zlib.crc32(self.question.encode()) % HELD_OUT_ONE_IN == 0


def draw(rng: random.Random, *, held_out: bool) -> Problem:
    """One problem, uniform over its set."""
    while True:
        problem = Problem(tuple(rng.randint(1, 9) for _ in range(NUM_DIGITS)))
        if problem.is_held_out == held_out:
            return problem


def draw_distinct(rng: random.Random, count: int, *, held_out: bool) -> list[Problem]:
    """`count` different problems, in the order drawn."""
    problems: dict[Problem, None] = {}
    while len(problems) < count:
        problems[draw(rng, held_out=held_out)] = None
    return list(problems)


def is_correct(completion: str, answer: str) -> bool:
    """Whether the last box holds exactly the answer."""
    boxes = BOXED.findall(completion)
    return bool(boxes) and boxes[-1] == answer
