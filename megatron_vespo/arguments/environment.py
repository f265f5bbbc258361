"""Flags of responses that are more than one request: environments, and functions of the user's own."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import dataclass

from megatron_vespo.system.settings import Settings

# without an environment, another value would be ignored
DEFAULTS = {"max_turns": 16, "max_turn_tokens": None, "environment_timeout": 60.0}


def add_environment_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("multi-turn responses")
    add = group.add_argument
    group.set_defaults(**DEFAULTS)
    add("--environment", metavar="PATH",
        help="package.module:Class that answers the turns; default: a single turn")  # fmt: skip
    add("--max-turns", type=int, metavar="N", help="longest episode, in turns of the policy")
    add("--max-turn-tokens", type=int, metavar="N",
        help="longest turn; default: only --max-completion-tokens, of an episode")  # fmt: skip
    add("--environment-timeout", type=float, metavar="SECONDS",
        help="until the environment answers, else the episode fails")  # fmt: skip
    add("--generate-function", metavar="PATH",
        help="package.module:function that makes a completion of several requests")  # fmt: skip


@dataclass(frozen=True)
class EnvironmentSettings(Settings):
    environment: str | None
    max_turns: int
    max_turn_tokens: int | None  # None: only the whole episode is bounded
    environment_timeout: float  # seconds
    generate_function: str | None


POSITIVE = tuple(DEFAULTS)


def check_environment_flags(args: Namespace | EnvironmentSettings) -> None:
    """ValueError for flags that exclude each other."""
    if args.environment and args.generate_function:
        raise ValueError(
            f"--environment {args.environment} and --generate-function {args.generate_function} both make "
            "responses: leave one out"
        )
    if args.environment is None:
        for name, default in DEFAULTS.items():
            if (value := getattr(args, name)) != default:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {value}: there are no turns without --environment")
