"""Turns any exception into a one-line ValueError that names the place in the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def located(where: str) -> Iterator[None]:
    """Turn an exception inside into a one-line ValueError that begins with `where`, "a.jsonl line 3".

    Libraries that read files and tokenise text have no common exception: TypeError, OSError, RecursionError
    and bare Exception all mean that the data is wrong. A message that already begins with `where` is kept.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Return the error as one line."""
    match error:
        case json.JSONDecodeError():
            place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}"
            return f"not JSON: {error.msg} at {place}"
        case UnicodeDecodeError():
            return f"byte {error.start + 1} is not UTF-8"
        case UnicodeEncodeError():
            half = error.object[error.start]
            return f"character {error.start + 1}, {half!r}, is half of a surrogate pair, which is no text"
        case RecursionError():
            return "nested too deep to be read"
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
