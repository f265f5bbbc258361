"""How a frozen dataclass of settings is made from the parsed command line."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast


def of_namespace[T](cls: type[T], args: Any, prefix: str = "", **others: Any) -> T:
    """One value per field: the attribute `prefix` + the field's name of `args`, or that of `others`.

    A list becomes a tuple: settings do not change.
    """
    values = {
        field.name: getattr(args, prefix + field.name)
        for field in fields(cast(Any, cls))
        if field.name not in others
    }
    frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return cls(**frozen | others)
