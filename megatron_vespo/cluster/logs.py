"""Redirects the output of worker processes to files, and quotes the end of such a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TAIL_LINES = 15


def redirect_output(path: Path) -> None:
    """Append everything this process prints, its C libraries included, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())


def log_tail(path: Path) -> str:
    """The last lines of a log, introduced by its path."""
    if not path.is_file():
        return f"no log at {path}"
    lines = path.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join([f"end of {path}:", *lines])
