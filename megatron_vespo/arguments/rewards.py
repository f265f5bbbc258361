"""Flags of rewards and of their shaping, before they become advantages."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron_vespo.rewards.loading import ENVIRONMENT
from megatron_vespo.rollout.scoring import TURN_REWARDS, TurnRewards
from megatron_vespo.system.settings import Settings


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rewards")
    add = group.add_argument
    add("--reward-function", metavar="NAME",
        help="'math', 'code', package.module:function, an endpoint's URL, or 'environment', the default with "
        "--environment; else 'math'")  # fmt: skip
    add("--turn-rewards", choices=TURN_REWARDS, default="sum",
        help="how the rewards of an episode's turns become one")  # fmt: skip
    add("--reward-workers", type=int, default=1, help="processes that compute rewards")
    add("--reward-memory-gb", type=float, default=4.0, metavar="GiB",
        help="memory limit per process of a worker; inf: no limit")  # fmt: skip
    add("--overlong-buffer", type=int, default=0, metavar="TOKENS",
        help="reduce the reward near the limit, over TOKENS; 0: off")  # fmt: skip
    add(
        "--overlong-penalty",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="largest reduction by --overlong-buffer",
    )


def resolved_reward_function(args: Any) -> str:
    """Return the reward function's name from parsed flags; ValueError if they contradict each other."""
    name = args.reward_function or (ENVIRONMENT if args.environment else "math")
    if name == ENVIRONMENT and not (args.environment or args.generate_function):
        raise ValueError(
            "--reward-function environment: no environment gives rewards, --environment names one"
        )
    if args.turn_rewards != "sum" and not (args.environment or args.generate_function):
        raise ValueError(
            f"--turn-rewards {args.turn_rewards}: no environment gives rewards, --environment names one"
        )
    return name


def check_overlong(args: Namespace) -> None:
    if not 0 <= args.overlong_buffer <= args.max_completion_tokens:
        raise ValueError(
            f"--overlong-buffer {args.overlong_buffer} must be between 0 (off) and --max-completion-tokens "
            f"{args.max_completion_tokens}"
        )
    if args.overlong_penalty == math.inf:
        raise ValueError("--overlong-penalty inf: must be finite")


@dataclass(frozen=True)
class RewardSettings(Settings):
    reward_function: str
    turn_rewards: TurnRewards
    reward_workers: int
    reward_timeout: float  # seconds
    reward_memory_gb: float  # GiB; inf: no limit
    overlong_buffer: int  # tokens
    overlong_penalty: float
    max_completion_tokens: int
