"""`megatron-vespo args SRC`: the Megatron flags that describe the model of an HF checkpoint."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from megatron_vespo.arguments.parser import FlagParser
from megatron_vespo.models.hf_config import megatron_arguments, read_hf_config
from megatron_vespo.system.paths import user_path
from megatron_vespo.system.plugins import prepare_for_megatron


def main(argv: list[str]) -> int:
    """Prints them, one per line, ready for a script."""
    parser = FlagParser(
        prog="megatron-vespo args",
        description="Print the Megatron flags that describe the model of an HF checkpoint, one a line. "
        "`megatron-vespo train` derives them itself.",
    )
    parser.add_argument("source", type=user_path, metavar="SRC", help="HF checkpoint folder")
    args = parser.parse_args(argv)
    print("\n".join(flags_of(megatron_arguments(read_hf_config(args.source)))))
    return 0


def flags_of(arguments: Mapping[str, Any]) -> Iterator[str]:
    """`arguments` (argparse destinations) as Megatron spells them; Megatron's defaults are left out."""
    with warnings.catch_warnings(action="ignore"):
        prepare_for_megatron()
        from megatron.training.arguments import add_megatron_arguments

        parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    actions = {action.dest: action for action in parser._actions}
    for name, value in arguments.items():
        action = actions[name]
        if value == action.default:
            continue
        flag = action.option_strings[0]
        yield flag if action.nargs == 0 else f"{flag} {value}"
