"""Flags of the evaluation during training, their defaults and what they may be."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace

from megatron_vespo.arguments.checks import check_positive
from megatron_vespo.system.paths import user_path


def add_heldout_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("held-out prompts")
    add = group.add_argument
    add("--heldout-data", metavar="FILE", type=user_path, help="prompts to evaluate on; without it none are")
    add("--heldout-prompt-key", metavar="KEY", help="default, as of the next two: training's")
    add("--heldout-answer-key", metavar="KEY")
    add("--heldout-answer-pattern", metavar="REGEX", help=r"'(?s)(.*)': the answer is the whole column")
    add("--heldout-interval", type=int, default=5, help="evaluate every so many rollout batches")
    add("--heldout-prompts", type=int, default=512, help="how many of them, at most")
    add("--heldout-completions", type=int, default=1, metavar="K", help="of each: accuracy is avg@K")
    add("--heldout-pass-reward", type=float, default=1.0, metavar="R",
        help="a completion is correct, for pass@k, if it earns so much")  # fmt: skip
    add("--heldout-temperature", type=float, metavar="T", help="0: greedy; default: --rollout-temperature")


def check_heldout(args: Namespace) -> None:
    check_positive(args, ("heldout_interval", "heldout_prompts", "heldout_completions"))
    check_temperature("--heldout-temperature", args.heldout_temperature, args.heldout_completions)


def check_temperature(flag: str, temperature: float | None, num_completions: int) -> None:
    """Of an evaluation: 0 is greedy, None another flag's."""
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"{flag} {temperature:g}: must be positive, or 0 for greedy")
    if temperature == 0 and num_completions > 1:
        raise ValueError(f"{flag} 0 makes the same completion {num_completions} times: one is enough")
