"""How a frozen dataclass of settings is made from the parsed command line."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True)
class Settings:
    """Base of the dataclasses whose fields have the names of flags."""

    _prefix: ClassVar[str] = ""  # of the flags' names, which the fields do without

    @classmethod
    def of(cls, args: Any, **others: Any) -> Self:
        """One value per field: that of `others`, or else the attribute of `args`; lists become tuples.

        `args` is what a parser returned or another object of settings. AttributeError if it lacks one.
        """
        values = {
            field.name: getattr(args, cls._prefix + field.name)
            for field in fields(cls)
            if field.name not in others
        }
        frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**frozen | others)
