r"""Exact-answer reward for mathematics, graded by math-verify.

Only the final answer counts: the last complete \boxed{...} or <answer>...</answer>. Without these, it is what
math-verify finds at the end of the response. `same_number` compares two numbers exactly.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache

from math_verify import LatexExtractionConfig, parse, verify

from megatron_vespo.rewards.answer_text import (
    bare,
    final_answer,
    is_balanced,
    is_taken_literally,
    letters,
    plain_latex,
    plain_prose,
)
from megatron_vespo.rewards.same_number import agrees, same_decimal

# Silence math-verify's warning that its own time limit is off. That limit needs a signal, which only a main
# thread may set; the reward pool's deadline replaces it.
for _module in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_module).setLevel(logging.ERROR)

_MAX_ANSWER_CHARS = 1000
# Parse the whole box or nothing: by default, math-verify takes a number from a box that it cannot parse.
_BOX = [LatexExtractionConfig(boxed_match_priority=0)]
_NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(,\d{3})+)(\.\d*)?([eE][+-]?\d{1,3})?|[+-]?\.\d+")
_TIMES_POWER_OF_TEN = re.compile(r"\s*\\(?:times|cdot)\s*10\^\{?\s*([+-]?\d{1,3})\s*\}?$")
_E_NOTATION = re.compile(r"(?<![\w.\\])(\d+\.?\d*)[eE]([+-]?\d+)(?!\w)")
_SENTENCE = re.compile(r"\b(?:is|are|answer)\b", re.IGNORECASE)
# a formula contains a command or an index: `$5 and $` is not a formula
_FORMULA = re.compile(
    r"\$\$[^$]*[\\_][^$]*\$\$|\$[^$\n]*[\\_][^$\n]*\$|\\\([^\n]*?\\\)|\\\[.*?\\\]", re.DOTALL
)


def math_reward(response: str, answer: str, metadata: dict | None = None) -> float:
    r"""Return 1.0 if the response's final answer equals the reference in value or form, else 0.0.

    Args:
        answer: the reference as data sets write it: "42", "1,234", "\frac{1}{2}", "70\%", "$x^2$".
        metadata: unused; every reward function gets it.
    """
    reference = plain_latex(bare(answer))
    given = final_answer(response)
    if given is None or _SENTENCE.search(given) and "\\" not in given:
        return _grade_prose(_tail(response if given is None else given), reference)
    answered = plain_latex(bare(given))
    return _grade_answer(answered, reference) if answered else 0.0


@lru_cache(maxsize=16384)
def _grade_answer(answered: str, reference: str) -> float:
    r"""Grade the contents of a box; both arguments are `plain_latex`."""
    ours, theirs = letters(answered), letters(reference)
    if ours == theirs:
        return 1.0
    if len(answered) > _MAX_ANSWER_CHARS or is_taken_literally(ours) or is_taken_literally(theirs):
        return 0.0
    found, gold = _plain_number(answered), _plain_number(reference)
    if found is not None and gold is not None:
        # By far the most common case, and hundreds of times faster than two LaTeX parses.
        both_integers = found.denominator == gold.denominator == 1
        return float(found == gold if both_integers else same_decimal(found, gold))
    return _grade(_parse_answer(answered), _parse_answer(reference))


@lru_cache(maxsize=16384)
def _grade_prose(text: str, reference: str) -> float:
    """Grade what math-verify finds in `text`, which has no marked answer."""
    formulas = [plain_latex(bare(match.group())) for match in _FORMULA.finditer(text)]
    unread = {formula for formula in formulas if _is_unread(formula)}
    if formulas and formulas[-1] in unread and letters(formulas[-1]) == letters(reference):
        return 1.0
    if is_taken_literally(letters(reference)):
        return 0.0
    # math-verify would take a number from a formula that it cannot parse
    text = _FORMULA.sub(lambda m: "..." if plain_latex(bare(m.group())) in unread else m.group(), text)
    return _grade(tuple(parse(text, parsing_timeout=None)), _parse_answer(reference))  # pyright: ignore[reportArgumentType]


def _grade(found: tuple, gold: tuple) -> float:
    # math-verify is not symmetric: the reference comes first.
    return float(
        any(
            verify(theirs, ours, timeout_seconds=None) and (isinstance(theirs, str) or agrees(theirs, ours))
            for theirs in gold
            for ours in found
        )
    )


def _is_unread(formula: str) -> bool:
    return is_taken_literally(letters(formula)) or all(isinstance(p, str) for p in _parse_answer(formula))


@lru_cache(maxsize=16384)
def _parse_answer(expression: str) -> tuple:
    """Return the expression as a sympy object, if it can be parsed, and as math-verify's string."""
    # math-verify would read 3e8 as 3 * e * 8.
    box = "\\boxed{" + _E_NOTATION.sub(r"\1 \\times 10^{\2}", expression) + "}"
    parsed = parse(box, _BOX, extraction_mode="first_match", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    # math-verify drops units and text after an unbalanced brace; the string left over would match too much
    return tuple(p for p in parsed if not isinstance(p, str) or is_balanced(p))


def _plain_number(expression: str) -> Fraction | None:
    expression = _TIMES_POWER_OF_TEN.sub(r"e\1", expression)
    return Fraction(expression.replace(",", "")) if _NUMBER.fullmatch(expression) else None


def _tail(response: str) -> str:
    response = plain_prose(response.rstrip())
    if len(response) <= _MAX_ANSWER_CHARS:
        return response
    # The cut may split a number, so drop the first, perhaps partial, word as well.
    return response[-_MAX_ANSWER_CHARS:].split(maxsplit=1)[-1]
