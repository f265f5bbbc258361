"""Replacing a function of someone else's module."""

from __future__ import annotations

from typing import Any


def replace(owner: Any, name: str, replacement: Any) -> Any:
    """Set `owner.name` and return what it was; AttributeError if there was none (the owner has changed)."""
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    return original
