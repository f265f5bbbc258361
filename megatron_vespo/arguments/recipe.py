"""Reads recipes: files of flags, with which a run can be named, checked and queued."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_vespo.system.paths import expanded

FLAG = "--recipe"


def read_recipe(path: Path) -> list[str]:
    """The flags of a recipe: words split as by a shell, on any number of lines; # begins a comment.

    Example: "--lr 1e-6  # the paper's\\n--bf16\\n" -> ["--lr", "1e-6", "--bf16"]
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ValueError(f"recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path}: not a text file of flags") from error
    if "\0" in text:
        raise ValueError(f"recipe {path}: not a text file of flags")
    try:
        argv = _words(text)
    except ValueError as error:  # an unclosed quote
        raise ValueError(f"recipe {path}: line {_wrong_line(text)}: {error}") from error
    if not argv or not argv[0].startswith("--"):
        raise ValueError(f"recipe {path}: must begin with a flag, has {argv[:1] or 'none'}")
    if any(word == FLAG or word.startswith(FLAG + "=") for word in argv):
        raise ValueError(f"recipe {path}: {FLAG} inside a recipe")
    return argv


def _words(text: str) -> list[str]:
    return shlex.split(text, comments=True)


def _wrong_line(text: str) -> int:
    """The line of the unclosed quote: from it on, no quote is closed, or only by another quote's start."""
    lines = text.splitlines(keepends=True)
    for before in range(len(lines) - 1, 0, -1):
        with contextlib.suppress(ValueError):
            _words("".join(lines[:before]))
            return before + 1
    return 1


def with_recipes(argv: list[str]) -> list[str]:
    """`argv` with each `--recipe FILE` replaced by its flags; of equal flags the later one counts."""
    replaced: list[str] = []
    for word in _recipes_apart(argv):
        replaced += read_recipe(word) if isinstance(word, Path) else [word]
    return replaced


def recipe_files(argv: Sequence[str]) -> list[Path]:
    """The files that a command line names with `--recipe`."""
    return [word for word in _recipes_apart(argv) if isinstance(word, Path)]


def _recipes_apart(argv: Sequence[str]) -> Iterator[str | Path]:
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != FLAG:
            yield word
            continue
        path = value if equals else next(words, "")
        if not path:
            raise ValueError(f"{FLAG}: the file is missing")
        yield Path(expanded(path))
