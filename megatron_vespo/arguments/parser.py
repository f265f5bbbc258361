"""The parser of every command: it accepts no abbreviations, and suggests a flag for a misspelt one."""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from megatron_vespo.arguments.renamed import renamed
from megatron_vespo.system.paths import user_path

_UNKNOWN = "unrecognized arguments: "
_SIMILAR = 0.75  # difflib's ratio; 1 is equal
# prog -> flags: a command may parse its own flags first and leave the others to another parser
_known: dict[str, set[str]] = {}


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that refuses NaN and numbers beyond 64 bits."""

    def __init__(self, **options: Any):
        as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter}  # keeps the text's lines
        super().__init__(**{"allow_abbrev": False, **as_written, **options})

    @staticmethod
    def adopt(parser: argparse.ArgumentParser) -> None:
        """Turns a library's parser into a FlagParser."""
        parser.__class__ = FlagParser

    def parse_known_args(self, args=None, namespace=None):
        known = set(_flags_of(self))
        _known.setdefault(self.prog, set()).update(known)
        if line := renamed(sys.argv[1:] if args is None else args, known):
            self.error(line)
        return super().parse_known_args(args, namespace)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        value = super()._get_value(action, arg_string)
        if isinstance(value, float) and math.isnan(value):
            raise argparse.ArgumentError(action, f"{arg_string!r} is not a number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise argparse.ArgumentError(action, f"{arg_string} is too large")
        return value

    def error(self, message: str) -> NoReturn:
        super().error(message + _guess(self, message))


def recipe_parser(command: str, usage: str, description: str) -> FlagParser:
    """The parser of a command for a recipe: `megatron-vespo COMMAND RECIPE --nodes N`, then `usage`."""
    prog = f"megatron-vespo {command}"
    parser = FlagParser(prog=prog, usage=f"{prog} RECIPE --nodes N {usage}", description=description)
    parser.add_argument(
        "recipe", type=user_path, metavar="RECIPE", help="a file of train's flags; # begins a comment"
    )
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    return parser


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
    """Flags of the parser and its subcommands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _flags_of(command)
