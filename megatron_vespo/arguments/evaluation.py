"""Flags of the evaluation during training, their defaults and checks."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.arguments.checks import check_positive
from megatron_vespo.system.paths import user_path
from megatron_vespo.system.settings import Settings


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    # Megatron has its own --eval-interval, which counts optimizer steps and is not used here
    group = parser.add_argument_group("evaluation on held-out prompts", conflict_handler="resolve")
    add = group.add_argument
    add("--eval-data", metavar="FILE", type=user_path, help="held-out prompts; default: no evaluation")
    add("--eval-prompt-key", metavar="KEY", help="column of the prompt; default: --prompt-key")
    add("--eval-answer-key", metavar="KEY", help="column of the reference answer; default: --answer-key")
    add(
        "--eval-answer-pattern",
        metavar="REGEX",
        help=r"as --answer-pattern, its default; '(?s)(.*)': the whole column",
    )
    add("--eval-interval", type=int, default=5, help="rollout batches between evaluations")
    add("--eval-prompts", type=int, default=512, help="use the first N prompts")
    add(
        "--eval-completions",
        type=int,
        default=1,
        metavar="K",
        help="completions per prompt; accuracy is avg@K",
    )
    add("--eval-pass-reward", type=float, default=1.0, metavar="R",
        help="a completion counts as correct for pass@k from this reward on")  # fmt: skip
    add("--eval-temperature", type=float, metavar="T", help="0: greedy; default: --rollout-temperature")


def check_eval(args: Namespace) -> None:
    check_positive(args, ("eval_interval", "eval_prompts", "eval_completions"))
    check_temperature("--eval-temperature", args.eval_temperature, args.eval_completions)


def check_temperature(flag: str, temperature: float | None, num_completions: int) -> None:
    """Checks an evaluation's temperature: 0 is greedy, None takes another flag's value."""
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"{flag} {temperature:g}: must be positive, or 0 for greedy")
    if temperature == 0 and num_completions > 1:
        raise ValueError(f"{flag} 0 makes the same completion {num_completions} times: one is enough")


@dataclass(frozen=True)
class EvalSettings(Settings):
    """A key or pattern of None means training's."""

    _prefix = "eval_"

    data: Path | None  # None: no evaluation
    prompt_key: str | None
    answer_key: str | None
    answer_pattern: str | None
    interval: int  # rollout batches
    prompts: int
    completions: int  # per prompt
    pass_reward: float
    temperature: float | None  # None: the rollout's
