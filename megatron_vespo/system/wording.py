"""Writes numbers in sentences."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """Example: 1, "node" -> "1 node"; 2, "node" -> "2 nodes"."""
    return f"{number} {what}{'s' * (number != 1)}"
