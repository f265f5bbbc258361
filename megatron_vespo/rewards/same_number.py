r"""Decides with exact arithmetic whether two numbers are the same, for the math reward.

* Numbers without a decimal point (integers, fractions, powers, roots) are the same if they are equal.
* A decimal has the exact value that was written. It is the same as another number if they differ by at most
  float noise: 2^-23 (float32's epsilon) of the larger one, and at most 5e-7, math-verify's six decimals.
* A decimal of at least six places and four significant digits is also the same as every number that rounds
  or truncates to it: 0.333333 is 1/3, and 3.1415927 is 3.14159265.

math-verify's own tolerance is absolute, 5e-7 or 1e-15: it treats all tiny numbers as the same.
"""

from __future__ import annotations

from fractions import Fraction

from math_verify import verify
from sympy import Basic, Expr, FiniteSet, Float, Interval, MatrixBase, N, Rational, Tuple, UnevaluatedExpr

FLOAT_NOISE = Fraction(1, 2**23)
SIX_DECIMALS = Fraction(5, 10**7)
_MIN_PLACES, _MIN_DIGITS = 6, 4
_DIGITS = 40  # precision of irrational numbers
_EQUAL_DIGITS = Fraction(1, 10**30)  # relative; two expressions that agree to this are one number
_SYMBOLIC_DIGITS = 60  # precision of the comparison of coefficients; math-verify's default is 15


def same_decimal(a: Fraction, b: Fraction) -> bool:
    """Return whether two numbers, at least one of them written as a decimal, are the same."""
    if abs(a - b) <= min(FLOAT_NOISE * max(abs(a), abs(b)), SIX_DECIMALS):
        return True
    return _is_written_as(a, b) or _is_written_as(b, a)


def agrees(gold: Basic | MatrixBase, found: Basic | MatrixBase) -> bool:
    """Return whether two expressions that math-verify calls equal are equal by the rule above.

    True if the rule cannot decide.
    """
    if _is_number(gold) and _is_number(found):
        return _same_value(gold, found)  # pyright: ignore[reportArgumentType]
    if not (_has_float(gold) or _has_float(found)):
        return verify(gold, found, numeric_precision=_SYMBOLIC_DIGITS, timeout_seconds=None)
    theirs, ours = _elements(gold), _elements(found)
    if len(theirs) != len(ours):
        return True  # a set and an interval, or an equation and its solution
    numbers = [element for element in ours if _is_number(element)]
    return all(
        not _is_number(element) or any(_same_value(element, number) for number in numbers)  # pyright: ignore[reportArgumentType]
        for element in theirs
    )


def _is_written_as(value: Fraction, decimal: Fraction) -> bool:
    places = _places(decimal)
    if places is None or places < _MIN_PLACES or (value < 0) != (decimal < 0):
        return False
    digits = int(abs(decimal) * 10**places)
    scaled = abs(value) * 10**places
    return digits >= 10 ** (_MIN_DIGITS - 1) and digits in (int(scaled), int(scaled + Fraction(1, 2)))


def _places(decimal: Fraction) -> int | None:
    """Return the number of decimal places; None if the decimal expansion does not end."""
    rest, counts = decimal.denominator, []
    for factor in (2, 5):
        count = 0
        while rest % factor == 0:
            rest, count = rest // factor, count + 1
        counts.append(count)
    return max(counts) if rest == 1 else None


def _same_value(gold: Expr, found: Expr) -> bool:
    with_decimal = _has_float(gold) or _has_float(found)
    return any(_same(a, b, with_decimal) for a in _readings(gold) for b in _readings(found))


def _same(a: Expr, b: Expr, with_decimal: bool) -> bool:
    if a.is_Rational and b.is_Rational and not with_decimal:
        return bool(a == b)
    x, y = (number if number.is_Rational else N(number, _DIGITS) for number in (a, b))
    if not (x.is_real and y.is_real and x.is_finite and y.is_finite):
        return True  # keep math-verify's result
    left, right = (Fraction(number.p, number.q) for number in (Rational(x), Rational(y)))  # pyright: ignore[reportAttributeAccessIssue]
    if with_decimal:
        return same_decimal(left, right)
    if abs(left - right) <= _EQUAL_DIGITS * max(abs(left), abs(right)):
        return True
    return a.equals(b) is not False  # for expressions that cancel to 0, whose digits are noise


def _readings(number: Expr) -> list[Expr]:
    """Return the exact number; for a percentage, also the number before the sign: math-verify accepts it."""
    as_written = number.xreplace({f: Rational(repr(float(f))) for f in number.atoms(Float)})
    value = as_written.doit()
    return [value, 100 * value] if number.has(UnevaluatedExpr) else [value]  # pyright: ignore[reportOperatorIssue, reportReturnType]


def _is_number(expression: Basic | MatrixBase) -> bool:
    return isinstance(expression, Expr) and not expression.free_symbols


def _has_float(expression: Basic | MatrixBase) -> bool:
    return bool(expression.atoms(Float))


def _elements(expression: Basic | MatrixBase) -> list[Basic]:
    if isinstance(expression, MatrixBase):
        return list(expression.flat())
    if isinstance(expression, Interval):
        return [expression.start, expression.end]
    return list(expression.args) if isinstance(expression, FiniteSet | Tuple) else []
