"""What the commands check of their flags alike."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable


def check_positive(args: Namespace, names: Iterable[str]) -> None:
    """ValueError for the first of these numbers that is 0, negative or NaN; one that is not given passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}, must be positive")
