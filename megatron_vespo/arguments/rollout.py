"""Flags of the generation of rollout batches."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

from megatron_vespo.system.settings import Settings


def add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rollout")
    add = group.add_argument
    add("--rollout-batch-size", type=int, default=32, help="prompts per rollout batch")
    add("--group-size", type=int, default=8, help="completions per prompt")
    add("--max-completion-tokens", type=int, default=1024, help="longest completion; longer ones are cut")
    add(
        "--rollout-temperature",
        type=float,
        default=1.0,
        help="sampling temperature, also of the trainer's log-probs",
    )
    add("--dynamic-sampling", action="store_true",
        help="skip groups with equal rewards and generate further prompts")  # fmt: skip
    add("--dynamic-sampling-max-batches", type=int, default=10,
        help="at most N batches of prompts; skipped groups then fill up")  # fmt: skip


@dataclass(frozen=True)
class RolloutSettings(Settings):
    """What is generated and when, for a run, its plan and its simulation."""

    rollout_batch_size: int  # prompts
    group_size: int  # completions per prompt
    steps_per_rollout: int  # optimizer steps per rollout batch
    max_prompt_tokens: int
    max_completion_tokens: int
    rollout_temperature: float
    generate_timeout: float  # seconds
    max_request_retries: int
    dynamic_sampling: bool
    dynamic_sampling_max_batches: int
    routing_replay: Literal["R2", "R3"] | None
    max_staleness: int  # optimizer steps; 0: synchronous
    sync_interval: int | None  # optimizer steps; None: steps_per_rollout
    on_weight_update: Literal["retract", "in-place", "abort"]
    over_subscription: float | None  # rollout batches
    stop_generation: bool
    stale_groups: Literal["requeue", "drop"]
    max_attempts: int
    seed: int
