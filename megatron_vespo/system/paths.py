"""Expands ~ and variables in the user's paths, as no shell does it in a recipe or after --flag=."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)
# endings of the Megatron and SGLang flags that take a path, except for `_OTHERS`
_ENDINGS = ("-dir", "-path", "-paths", "-file", "-filename")
_OTHERS = {"--save", "--load", "--pretrained-checkpoint", "--ckpt-convert-save", "--bert-load", "--ict-load"}


def expanded(text: str) -> str:
    """`text` with ~, $NAME and ${NAME} replaced. ValueError names a variable or user that does not exist."""

    def value(match: re.Match) -> str:
        name = match[1] or match[2]
        if not os.environ.get(name):
            raise ValueError(f"{text}: the variable {name} is not set")
        return os.environ[name]

    plain = os.path.expanduser(_VARIABLE.sub(value, text))
    if plain.startswith("~"):
        user = plain.partition("/")[0]
        raise ValueError(f"{text}: there is no user {user[1:]}; a file of that name is ./{user}")
    return plain


def path_word(text: str) -> str:
    """`expanded` as an argparse type."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def user_path(text: str) -> Path:
    """The argparse type of all our flags and arguments that are paths."""
    return Path(path_word(text))


def names_a_path(flag: str) -> bool:
    """Whether this Megatron or SGLang flag takes paths, by its name."""
    return flag.endswith(_ENDINGS) or flag in _OTHERS


def expanded_flags(
    argv: Sequence[str],
    is_path: Callable[[str], bool],
    others: Mapping[str, Callable[[str], str]] | None = None,
) -> list[str]:
    """`argv` with the values of path flags expanded, for both `--flag value` and `--flag=value`.

    `others` are flags whose values contain a path, each with the argparse type that expands it. Raises
    ValueError like `expanded`, with the flag's name.
    """
    words: list[str] = []
    flag = ""
    for word in argv:
        value, before = word, ""
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            before = flag + equals
        try:
            expand = expanded if is_path(flag) else (others or {}).get(flag)
            words.append(before + expand(value) if expand else word)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{flag} {error}") from error
    return words
