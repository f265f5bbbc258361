"""Writes mean rewards for people: a share as a percentage, any other number as it is.

The accuracy of an evaluation is its mean reward. Where rewards are 0 or 1 that is a share. A reward function
may also return -1 or 5, and "-50.0%" would then be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable


def are_shares(values: Iterable[float]) -> bool:
    """Whether all values are within 0 and 1; NaN is not."""
    return all(0.0 <= value <= 1.0 for value in values)


def mean_reward(value: float, beside: Iterable[float] = (), digits: int = 1) -> str:
    """`value` as a percentage if it and all values `beside` it are shares.

    Example: 0.8125 -> "81.2%"; -0.25 -> "-0.250"; 0.8125 beside -0.25 -> "0.812"
    """
    return f"{value:.{digits}%}" if are_shares([value, *beside]) else f"{value:.{digits + 2}f}"
