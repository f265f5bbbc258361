r"""Finds the final answer in a response and normalises its spelling."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_BRACE_TOKENS = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_MATH_DELIMITERS = re.compile(r"\s*(\$\$|\$|\\\(|\\\[)(.*?)(\$\$|\$|\\\)|\\\])\s*", re.DOTALL)
_ANSWER_TAGS = "<answer>", "</answer>"
_EMPHASIS = re.compile(r"(?<![\w\\$])(`+|_+)(?=\S)([^`_\n]+)(?<=\S)\1(?!\w)")

_SIGNS = str.maketrans(
    {
        "−": "-", "∞": r"\infty ", "±": r"\pm ", "·": r"\cdot ", "⋅": r"\cdot ", "×": r"\times ",
        "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ", "∅": r"\emptyset ", "≡": r"\equiv ",
        "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    }
)  # fmt: skip
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
_SUBSCRIPTS = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞]")
_ROOT = re.compile(r"(?:√|\\sqrt(?=\())\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")
# separators of digit groups of three; a plain space is one only in an answer, not in running text
_THIN_SPACE = r"(?:\\[,;: ]|\\thinspace|[\u2009\u202f\u00a0])\s*"
_THIN_GROUPED = re.compile(rf"(?<![\d.])\d{{1,3}}(?:{_THIN_SPACE}\d{{3}})+(?!\d)")
_SPACE_GROUPED = re.compile(r"-?\d{1,3}(?: \d{3})+(?:\.\d+)?")
_MIXED_NUMBER = re.compile(r"(-?\d+)\s+(\d+)/(\d+)")
_REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\{\s*(\d+)\s*\}")

_SPACING = re.compile(r"\\[,;:! ]|~|\\(?:left|right|displaystyle)(?![A-Za-z])")
_FREE_SPACE = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
_TEXT_COMMAND = re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}")
_DIGITS_WITH_BASE = (
    (re.compile(r"(?<=\w)\(?base-?(\d+)\)?"), r"_\1"),
    (re.compile(r"_\{(\w+)\}"), r"_\1"),
    (re.compile(r"(?<!\w)[({](\w+)[)}]_(?=\w)"), r"\1_"),
)
_OTHER_BASE = re.compile(r"(?<!\^)(?<!\^\d)\d_\w")
_DATE = re.compile(r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}")


def final_answer(response: str) -> str | None:
    r"""Return what is in the last \boxed{...}, or in <answer>...</answer> after it; None without either."""
    box = _last_box(response)
    opening, closing = _ANSWER_TAGS
    end = response.rfind(closing)
    start = response.rfind(opening, 0, end) if end >= 0 else -1
    if start >= 0 and (box is None or box[0] < start):
        return response[start + len(opening) : end]
    return None if box is None else box[1]


def last_boxed(text: str) -> str | None:
    r"""Return the contents of the last \boxed{...} with balanced braces, in one pass; None without one."""
    box = _last_box(text)
    return None if box is None else box[1]


def bare(expression: str) -> str:
    """Return the expression without surrounding space, $ signs and box."""
    match = _MATH_DELIMITERS.fullmatch(expression)
    if match and "$" not in match.group(2):
        expression = match.group(2)
    expression = expression.strip()
    inner = last_boxed(expression)
    return inner.strip() if inner is not None and expression == f"\\boxed{{{inner}}}" else expression


def plain_latex(expression: str) -> str:
    """Return LaTeX that math-verify can parse: no Unicode signs, no digit groups of three."""
    expression = _THIN_GROUPED.sub(lambda match: re.sub(r"\D", "", match.group()), expression)
    expression = _SUPERSCRIPTS.sub(lambda match: f"^{{{_normal(match.group())}}}", expression)
    expression = _SUBSCRIPTS.sub(lambda match: f"_{{{_normal(match.group())}}}", expression)
    expression = _VULGAR_FRACTION.sub(_fraction, expression)
    expression = _ROOT.sub(lambda match: rf"\sqrt{{{next(filter(None, match.groups()), '')}}}", expression)
    expression = _normal(expression.translate(_SIGNS)).strip()
    if _SPACE_GROUPED.fullmatch(expression):
        expression = expression.replace(" ", "")
    expression = _MIXED_NUMBER.sub(r"\1\\frac{\2}{\3}", expression) if " " in expression else expression
    return _REPEATING.sub(_repeating_decimal, expression)


def plain_prose(text: str) -> str:
    """Return running text with ASCII numbers and without the `...` and _..._ of Markdown."""
    text = _THIN_GROUPED.sub(lambda match: re.sub(r"\D", "", match.group()), text.replace("−", "-"))
    return _EMPHASIS.sub(r"\2", text)


def letters(expression: str) -> str:
    """Return the expression without spacing that has no meaning; expressions with equal letters are equal."""
    text = _TEXT_COMMAND.sub(r"\1", _SPACING.sub("", expression))
    text = _FREE_SPACE.sub("", text.strip())  # a space between digits has a meaning
    for pattern, spelling in _DIGITS_WITH_BASE:
        text = pattern.sub(spelling, text)
    return text


def is_taken_literally(written: str) -> bool:
    """Return whether `letters` of an expression look like a decimal number but are none.

    Examples: digits with a base (101_2), dates. math-verify drops the base and reads a date as a difference.
    """
    return _OTHER_BASE.search(written) is not None or _DATE.fullmatch(written) is not None


def is_balanced(latex: str) -> bool:
    return latex.count("{") == latex.count("}")


def _last_box(text: str) -> tuple[int, str] | None:
    """Return (start, contents) of the last box."""
    open_braces: list[int | None] = []  # start of the contents for a box, None for any other brace
    last: tuple[int, str] | None = None
    for token in _BRACE_TOKENS.finditer(text):
        if token.group().startswith("\\boxed"):
            open_braces.append(token.end())
        elif token.group() == "{":
            open_braces.append(None)
        elif token.group() == "}" and open_braces:
            start = open_braces.pop()
            if start is not None and (last is None or start > last[0]):
                last = start, text[start : token.start()]
    return last


def _normal(text: str) -> str:
    # NFKC turns other forms of digits into ASCII; its minus is U+2212 and its fraction bar U+2044
    return unicodedata.normalize("NFKC", text).replace("−", "-").replace("⁄", "/")


def _fraction(match: re.Match[str]) -> str:
    numerator, _, denominator = _normal(match.group()).partition("/")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, fixed, period = match.groups()
    start, cycle = Fraction(int((whole + fixed) or "0")), Fraction(int(period), 10 ** len(period) - 1)
    value = (start + cycle) / 10 ** len(fixed)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
