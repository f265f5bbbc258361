r"""Exact-answer reward for mathematics, decided by math-verify.

Only the final answer counts: the last complete \boxed{...}, or what math-verify finds in the response's end.
"""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from functools import lru_cache

from math_verify import parse, verify

# math-verify warns that its own time limit is off. That limit is a signal, which only a main thread may set;
# the reward pool's deadline replaces it.
for _module in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_module).setLevel(logging.ERROR)

_MAX_ANSWER_CHARS = 1000
_BRACE_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.\d*)?([eE][+-]?\d{1,3})?")
_TIMES_POWER_OF_TEN = re.compile(r"\s*\\(?:times|cdot)\s*10\^\{?\s*([+-]?\d+)\s*\}?$")
_E_NOTATION = re.compile(r"(?<![\w.\\])(\d+\.?\d*)[eE]([+-]?\d+)(?!\w)")
_MATH_DELIMITERS = re.compile(r"\s*(\$\$|\$|\\\(|\\\[)(.*?)(\$\$|\$|\\\)|\\\])\s*", re.DOTALL)


def math_reward(response: str, answer: str, metadata: dict | None = None) -> float:
    r"""1.0 when the response's final answer equals the reference in value or form, else 0.0.

    Args:
        answer: the reference as data sets write it: "42", "1,234", "\frac{1}{2}", "70\%", "$x^2$".
        metadata: unused; every reward function is called with it.
    """
    reference = _bare(answer)
    boxed = last_boxed(response)
    if boxed is None:
        return _grade(_tail(response), reference, False)
    final_answer = _bare(boxed)
    if not final_answer or len(final_answer) > _MAX_ANSWER_CHARS:
        return 0.0
    if final_answer == reference:
        return 1.0
    found, gold = _plain_number(final_answer), _plain_number(reference)
    if found is not None and gold is not None:
        # The common case by far, hundreds of times faster than two LaTeX parses; and math-verify compares
        # with an absolute tolerance, to which 2.9e-19 and 4.3e-19 are the same.
        return float(found == gold)
    return _grade(final_answer, reference, True)


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} with balanced braces holds; None without one. One pass over the text."""
    open_braces: list[int | None] = []  # start of the contents for a box, None for any other brace
    last_start, contents = -1, None
    for token in _BRACE_TOKENS.finditer(text):
        if token.group().startswith("\\boxed"):
            open_braces.append(token.end())
        elif token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and start > last_start:
                last_start, contents = start, text[start : token.start()]
    return contents


def _plain_number(expression: str) -> Decimal | None:
    expression = _TIMES_POWER_OF_TEN.sub(r"e\1", expression)
    return Decimal(expression.replace(",", "")) if _NUMBER.fullmatch(expression) else None


@lru_cache(maxsize=16384)
def _grade(final_answer: str, reference: str, boxed: bool) -> float:
    gold = _parse_reference(reference)
    found = parse(_as_box(final_answer) if boxed else final_answer, parsing_timeout=None)
    # math-verify is not symmetric: the reference goes first.
    return float(verify(gold, found, timeout_seconds=None))


@lru_cache(maxsize=16384)
def _parse_reference(reference: str) -> list:
    return parse(_as_box(reference), parsing_timeout=None)


def _as_box(expression: str) -> str:
    # math-verify would read 3e8 as 3 * e * 8.
    return "\\boxed{" + _E_NOTATION.sub(r"\1 \\times 10^{\2}", expression) + "}"


def _bare(expression: str) -> str:
    """The expression without surrounding space, $ signs and box."""
    match = _MATH_DELIMITERS.fullmatch(expression)
    if match and "$" not in match.group(2):
        expression = match.group(2)
    expression = expression.strip()
    inner = last_boxed(expression)
    return inner.strip() if inner is not None and expression == f"\\boxed{{{inner}}}" else expression


def _tail(response: str) -> str:
    response = response.rstrip()
    if len(response) <= _MAX_ANSWER_CHARS:
        return response
    # The cut may split a number, so the first, perhaps partial, word goes too.
    return response[-_MAX_ANSWER_CHARS:].split(maxsplit=1)[-1]
