"""Makes frozen dataclasses of settings from the parsed command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class Settings:
    """Base of the dataclasses whose fields are named like flags."""

    _prefix: ClassVar[str] = ""  # of the flags' names; the fields' names omit it

    @classmethod
    def of(cls, args: Any, **others: Any) -> Self:
        """Takes each field's value from `others`, or else from the attribute of `args`. Lists become tuples.

        `args` is a parser's result or another settings object. AttributeError if it lacks an attribute.
        """
        values = {
            field.name: getattr(args, cls._prefix + field.name)
            for field in fields(cls)
            if field.name not in others
        }
        frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**frozen | others)
