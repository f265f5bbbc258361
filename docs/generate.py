"""Writes docs/reference/flags.md from the parsers of all commands: `python docs/generate.py`.

With --check it writes nothing and exits with 1 where the page is not what the parsers say. It runs in the
environment of the package; the page is kept in the repository, so that the site is built without that.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_vespo.commands.main import COMMANDS, run

PAGE = Path(__file__).parent / "reference/flags.md"
HEAD = """\
<!-- Written by docs/generate.py from the parsers of the commands; change the help of a flag instead. -->

# Flags

Every command says the same with `--help`. A flag is required where its help says so. "not set" is the default
of a switch, which takes no value.

Three rules hold for all commands. Flags are never abbreviated. `~` and `$NAME` in paths are replaced, and a
variable that is not set is an error. `train`, `plan` and `submit` read further flags from a recipe: see
[Planning](../guides/planning.md#recipes).
"""
MEGATRON = """\
## Megatron's flags that have other defaults here { #megatron-defaults }

`train` takes all flags of Megatron-Core 0.19.2 as they are. `megatron-vespo train --help-megatron` lists
them. These defaults differ. A flag that you give wins.

| flag | Megatron's default | here, with Transformer Engine | here, with local layers |
| --- | --- | --- | --- |
"""
DERIVED = """
Local layers are those of Megatron itself; a machine without a GPU uses them. Some arguments follow from other
flags, and a flag that contradicts them is refused:

* the shape of the model, from config.json of `--hf-checkpoint`;
* `--global-batch-size`, in completions: `--rollout-batch-size` x `--group-size` / `--steps-per-rollout`;
* `--micro-batch-size`: 1, a pack of at most `--max-tokens-per-gpu` tokens;
* `--seq-length`: `--max-prompt-tokens` + `--max-completion-tokens`.

`--sequence-parallel` is on where `--tensor-model-parallel-size` is above 1. `--distributed-timeout-minutes`
is 60, or longer where the [time limits](../guides/fault-tolerance.md#time-limits) ask for it.
"""


def captured_parsers(argv: list[str]) -> list[argparse.ArgumentParser]:
    """The parsers that print their help for `argv`."""
    found: list[argparse.ArgumentParser] = []

    def catch(parser: argparse.ArgumentParser, file: Any = None) -> None:
        found.append(parser)

    with (
        patch.object(argparse.ArgumentParser, "print_help", catch),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        run(argv)
    return found


def all_parsers() -> dict[str, argparse.ArgumentParser]:
    """Command -> parser, subcommands too."""
    parsers = {}
    for words in COMMANDS:
        [parser] = captured_parsers([*words.split(), "--help"])
        parsers[words] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers |= {f"{words} {name}": choice for name, choice in action.choices.items()}
    return parsers


def flag_table(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table for each group of the parser that has flags or arguments."""
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS
            and not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        ]
        if not actions:
            continue
        title = {"options": "", "positional arguments": "", "optional arguments": ""}.get(
            group.title or "", group.title or ""
        )
        if title:
            yield f"\n**{title[0].upper()}{title[1:]}**\n"
        if group.description:
            yield f"\n{_cell(group.description)}\n"
        yield "\n| flag | value | default | meaning |\n| --- | --- | --- | --- |\n"
        for action in actions:
            cells = [_name(action), _value(action), _default(action), _help(parser, action)]
            yield "| " + " | ".join(cells) + " |\n"


def _name(action: argparse.Action) -> str:
    return ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"


def _value(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        return " ".join(f"`{choice}`" for choice in action.choices)
    metavar = action.metavar
    if metavar is None:
        text = "text" if action.option_strings else ""
        metavar = {int: "integer", float: "number"}.get(action.type, text)
    words = " ".join(metavar) if isinstance(metavar, tuple) else metavar
    return _cell(words + (" ..." if action.nargs in ("+", "*") else ""))


def _default(action: argparse.Action) -> str:
    value = action.default
    if action.nargs == 0:
        return "not set"
    if value is None or value == argparse.SUPPRESS or action.required:
        return ""
    if os.path.isabs(str(value)):
        return ""  # of this machine; the help says what it is
    if isinstance(value, list | tuple):
        return f"`{' '.join(map(str, value))}`" if value else ""
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = action.help or ""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        text = parser._get_formatter()._expand_help(action)
    if default := _default(action).strip("`"):  # which has a column of its own
        text = re.sub(rf"\s*[;,(]?\s*default:? {re.escape(default)}\)?$", "", text)
    if action.required and "required" not in text:
        text = f"{text} (required)".strip()
    return _cell(text)


def _cell(text: str) -> str:
    """As a cell of a table: flags as code, and nothing that Markdown would take for its own."""
    text = " ".join(text.split())
    text = re.sub(r"([\\|*_<>{}\[\]$^])", r"\\\1", text)
    text = re.sub(r"(?<![\w-])(--[a-z][a-z-]*[a-z])", r"`\1`", text)
    return text.replace("\\|", "&#124;").replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\$", "&#36;")


def megatron_table() -> Iterator[str]:
    from megatron_vespo.arguments.parse import _defaults, full_parser

    actions = {action.dest: action for action in full_parser()._actions}
    gpu = _defaults({"transformer_impl": "transformer_engine"}, "nccl")
    cpu = _defaults({"transformer_impl": "local"}, "gloo")
    for name in sorted(gpu, key=lambda name: actions[name].option_strings[0]):
        negated = isinstance(actions[name], argparse._StoreFalseAction)
        before = _shown(actions[name].default, negated)
        after = [_shown(values[name], negated) for values in (gpu, cpu)]
        if {before} != set(after):
            yield f"| `{actions[name].option_strings[0]}` | {before} | {after[0]} | {after[1]} |\n"


def _shown(value: Any, negated: bool) -> str:
    if isinstance(value, list | tuple) and len(value) == 1:
        [value] = value
    if isinstance(value, bool):
        return "not set" if value == negated else "set"
    if value is None:
        return "none"
    return f"`{value}`"


def page() -> str:
    parts = [HEAD]
    for command, parser in all_parsers().items():
        parts.append(f"\n## megatron-vespo {command} {{ #{command.replace(' ', '-')} }}\n")
        if parser.description and command != "train":
            parts.append(f"\n{_cell(parser.description.partition(chr(10) * 2)[0])}\n")
        tables = list(flag_table(parser))
        parts += tables or ["\nNo flags of its own beside `--help`.\n"]
        if command == "train":
            parts += ["\n", MEGATRON.replace("## ", "### "), *megatron_table(), DERIVED]
    return "".join(parts)


def main(argv: list[str]) -> int:
    with warnings.catch_warnings(action="ignore"):
        text = page()
    if argv == ["--check"]:
        current = PAGE.read_text() == text
        if not current:
            print(f"{PAGE} is not what the parsers say: run docs/generate.py", file=sys.stderr)
        return int(not current)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
