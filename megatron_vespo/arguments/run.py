"""Flags of a run's output files and of its end."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vespo.system.paths import user_path
from megatron_vespo.system.settings import Settings


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output-dir", type=user_path, metavar="DIR", help="metrics, logs, summary, HF export (required)")
    add("--no-hf-export", dest="hf_export", action="store_false", help="do not export the final policy")
    add("--on-alarm", choices=("warn", "stop", "checkpoint-and-stop"), default="warn",
        help="what happens at an alarm, see docs/reference/alarms.md; the last one needs --save")  # fmt: skip
    add("--save-rollouts", type=user_path, metavar="DIR",
        help="record every rollout batch: a .npz for --train-from, a .jsonl for people")  # fmt: skip
    add("--record-responses", action="store_true",
        help="keep all responses with log pi per token, for `view`")  # fmt: skip
    add("--train-from", type=user_path, metavar="DIR",
        help="train on the batches of --save-rollouts; no engines")  # fmt: skip
    add("--rollout-only", action="store_true",
        help="generate and score with the initial weights; no trainer")  # fmt: skip
    add("--setup-seconds", type=float, default=0.0, help="set-up time before this program, for the summary")


@dataclass(frozen=True)
class RunSettings(Settings):
    """`hf_export` is off in a run without a trainer."""

    output_dir: Path
    train_iters: int  # optimizer steps
    seed: int
    hf_export: bool
    on_alarm: Literal["warn", "stop", "checkpoint-and-stop"]
    max_logprob_difference: float | None
    save_rollouts: Path | None
    record_responses: bool
    train_from: Path | None
    rollout_only: bool
    setup_seconds: float
    preemption_deadline: float  # seconds, like the next two
    train_timeout: float
    worker_start_timeout: float
