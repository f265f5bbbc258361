"""Flags of the generation of rollout batches."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_vespo.rollout.sampled_distribution import check_truncation, training_sampling
from megatron_vespo.system.settings import Settings
from megatron_vespo.types import SamplingParams


def add_rollout_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("rollout").add_argument
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
    add = parser.add_argument_group(
        "truncated sampling",
        "--rollout-top-p P, --rollout-top-k K, --rollout-min-p P: see docs/guides/truncated-sampling.md",
    ).add_argument
    add("--rollout-top-p", type=float, default=1.0, metavar="P",
        help="draw training's tokens from the likeliest ones of this total probability")  # fmt: skip
    add("--rollout-top-k", type=int, default=-1, metavar="K", help="from K at most; -1: all")
    add("--rollout-min-p", type=float, default=0.0, metavar="P",
        help="from those with P times the largest probability or more")  # fmt: skip


def check_rollout(args: Namespace) -> None:
    """ValueError for truncated sampling that leaves no choice, or that the engines cannot describe."""
    if not 0 < args.rollout_top_p <= 1:
        raise ValueError(f"--rollout-top-p is {args.rollout_top_p:g}, must be above 0, at most 1")
    if not 0 <= args.rollout_min_p < 1:
        raise ValueError(f"--rollout-min-p is {args.rollout_min_p:g}, must be 0 (off) or more, below 1")
    check_truncation(RolloutSettings.sampling_of(args), args.sglang_flags)


@dataclass(frozen=True)
class RolloutSettings(Settings):
    """What is generated and when, for a run, its plan and its simulation."""

    rollout_batch_size: int  # prompts
    group_size: int  # completions per prompt
    steps_per_rollout: int  # optimizer steps per rollout batch
    max_prompt_tokens: int
    max_completion_tokens: int
    rollout_temperature: float
    rollout_top_p: float
    rollout_top_k: int  # -1: all
    rollout_min_p: float
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

    @staticmethod
    def sampling_of(args: Namespace | RolloutSettings, stop_token_ids: Sequence[int] = ()) -> SamplingParams:
        """Return how the flags want tokens to be drawn."""
        return SamplingParams(
            args.rollout_temperature,
            args.max_completion_tokens,
            tuple(stop_token_ids),
            args.rollout_top_p,
            args.rollout_top_k,
            args.rollout_min_p,
        )

    def sampling(self, stop_token_ids: Sequence[int], sglang_flags: Sequence[str]) -> SamplingParams:
        """Return how training draws its tokens from engines with these flags."""
        return training_sampling(self.sampling_of(self, stop_token_ids), sglang_flags)
