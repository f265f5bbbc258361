"""What the commands check of their flags alike."""

from __future__ import annotations

import json
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterable
from typing import Any

from megatron_vespo.data.jsonl import kind
from megatron_vespo.data.located import reason


def check_positive(args: Namespace, names: Iterable[str]) -> None:
    """ValueError for the first of these numbers that is 0, negative or NaN; one that is not given passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}, must be positive")


def json_object(text: str) -> dict[str, Any]:
    """The type of a flag whose value is a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"{text!r}: {reason(error)}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r}: must be a JSON object, it is {kind(value)}")
    return value
