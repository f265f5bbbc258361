"""Recipes: files of flags, so that a run is something that can be named, checked and queued."""

from __future__ import annotations

import shlex
from pathlib import Path

FLAG = "--recipe"


def read_recipe(path: Path) -> list[str]:
    """The flags of a recipe: words as a shell splits them, on any number of lines; # begins a comment.

    Example: "--lr 1e-6  # the paper's\\n--bf16\\n" -> ["--lr", "1e-6", "--bf16"]
    """
    try:
        argv = shlex.split(path.read_text(), comments=True)
    except OSError as error:
        raise ValueError(f"recipe {path}: {error.strerror}") from error
    except ValueError as error:  # an open quote, or no text
        raise ValueError(f"recipe {path}: {error}") from error
    if not argv or not argv[0].startswith("--"):
        raise ValueError(f"recipe {path}: must begin with a flag, has {argv[:1] or 'none'}")
    if any(word == FLAG or word.startswith(FLAG + "=") for word in argv):
        raise ValueError(f"recipe {path}: {FLAG} inside a recipe")
    return argv


def with_recipes(argv: list[str]) -> list[str]:
    """`argv` with the flags of each `--recipe FILE` in its place; of two the later one counts."""
    expanded: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != FLAG:
            expanded.append(word)
            continue
        path = value if equals else next(words, "")
        if not path:
            raise ValueError(f"{FLAG}: the file is missing")
        expanded += read_recipe(Path(path))
    return expanded
