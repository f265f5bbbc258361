"""The parser of every command: no abbreviations, and a guess at what a misspelt flag was meant to be."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from typing import Any, NoReturn

_UNKNOWN = "unrecognized arguments: "
_SIMILAR = 0.75  # of difflib's ratio; 1 is equal
# by `prog`: a command may parse its own flags first and leave the others to another parser
_known: dict[str, set[str]] = {}


class FlagParser(argparse.ArgumentParser):
    """Takes what ArgumentParser takes."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args=None, namespace=None):
        _known.setdefault(self.prog, set()).update(_flags_of(self))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        exit_with_guess(self, message)


def exit_with_guess(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """`ArgumentParser.error`, for any parser: the line of a misspelt flag ends with the nearest one."""
    argparse.ArgumentParser.error(parser, message + _guess(parser, message))


def _guess(parser: argparse.ArgumentParser, message: str) -> str:
    if not message.startswith(_UNKNOWN):
        return ""
    known = {*_flags_of(parser), *_known.get(parser.prog, ())}
    found: dict[str, None] = {}
    for word in message.removeprefix(_UNKNOWN).split():
        if word.startswith("-"):
            near = difflib.get_close_matches(word.partition("=")[0], sorted(known), 1, _SIMILAR)
            found |= dict.fromkeys(near)
    return f"; did you mean {', '.join(found)}?" if found else ""


def _flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Those of its subcommands, too."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _flags_of(command)
