"""Collects this program's own flags of `train`, one file per concern, and their checks."""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from collections.abc import Sequence

from megatron_vespo.arguments.asynchronous import add_asynchronous_arguments, check_asynchronous
from megatron_vespo.arguments.checkpoint import add_checkpoint_arguments
from megatron_vespo.arguments.checks import check_folder, check_positive
from megatron_vespo.arguments.code_rewards import add_code_reward_arguments, check_code_reward
from megatron_vespo.arguments.data import add_data_arguments
from megatron_vespo.arguments.distillation import add_distillation_arguments, check_distillation
from megatron_vespo.arguments.engines import add_engine_arguments, check_engines
from megatron_vespo.arguments.environment import POSITIVE as POSITIVE_OF_ENVIRONMENTS
from megatron_vespo.arguments.environment import add_environment_arguments, check_environment_flags
from megatron_vespo.arguments.evaluation import add_eval_arguments, check_eval
from megatron_vespo.arguments.loss import add_loss_arguments, check_loss
from megatron_vespo.arguments.placement import add_placement_arguments
from megatron_vespo.arguments.reference import add_reference_arguments, check_reference
from megatron_vespo.arguments.rewards import add_reward_arguments, check_overlong, resolved_reward_function
from megatron_vespo.arguments.rollout import add_rollout_arguments
from megatron_vespo.arguments.run import add_run_arguments
from megatron_vespo.arguments.time_limits import TIME_LIMITS, add_time_limit_arguments
from megatron_vespo.arguments.tracking import add_tracking_arguments, check_tracking
from megatron_vespo.arguments.weight_sync import add_sync_arguments, check_sync

REQUIRED_BY_TRAIN = ("hf_checkpoint", "prompt_data", "output_dir")
DESCRIPTION = """\
Train Qwen3-MoE, GLM-4.5, Qwen3 or Llama with VESPO: Megatron-Core trains, SGLang generates, Ray places both.

Three families of flags:
  the groups below          this program's own; docs/reference/flags.md has all of them
  Megatron's own flags      training, parallelism, precision, checkpoints: --help-megatron lists them all
  --recipe FILE             more flags, of any family, from a file with # comments; the later of two wins
  --sglang-<flag>           handed to every SGLang server as --<flag>, e.g. --sglang-mem-fraction-static 0.7

The model's shape comes from the HF config; a Megatron flag that contradicts it is an error.
Most used of Megatron's: --train-iters (optimizer steps), --lr, --tensor-model-parallel-size,
--pipeline-model-parallel-size, --expert-model-parallel-size, --bf16, --save, --save-interval, --load, --seed.
"""


def add_vespo_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds all of them to `parser`."""
    for add in (
        add_data_arguments, add_rollout_arguments, add_environment_arguments, add_reward_arguments,
        add_code_reward_arguments, add_distillation_arguments,
        add_eval_arguments, add_asynchronous_arguments, add_loss_arguments, add_reference_arguments,
        add_placement_arguments,
        add_engine_arguments, add_sync_arguments, add_checkpoint_arguments, add_time_limit_arguments,
        add_run_arguments, add_tracking_arguments,
    ):  # fmt: skip
        add(parser)
    return parser


def check_flags(args: Namespace, required: Sequence[str] = REQUIRED_BY_TRAIN) -> None:
    """Checks our own flags before anything heavy is imported; those named in `required` must be given."""
    for flag in required:
        if getattr(args, flag) is None and not (flag == "prompt_data" and args.train_from):
            raise ValueError(f"--{flag.replace('_', '-')} is required; see --help")
    positive = (
        "rollout_batch_size group_size steps_per_rollout max_prompt_tokens max_completion_tokens "
        "rollout_engines trainer_ranks max_tokens_per_gpu reward_workers "
        "weight_sync_bucket_mb log_prob_chunk_size rollout_temperature mismatch_truncation "
        "dynamic_sampling_max_batches overlong_penalty old_policy_snapshots reward_memory_gb "
        "teacher_engines teacher_tp_size distillation_clip"
    ).split()
    check_positive(args, [*positive, *POSITIVE_OF_ENVIRONMENTS, *(limit.name for limit in TIME_LIMITS)])
    check_environment_flags(args)
    check_engines(args)
    check_sync(args)
    check_eval(args)
    if not args.hf_checkpoint.is_dir():
        raise ValueError(f"--hf-checkpoint {args.hf_checkpoint}: no such folder")
    check_folder("--output-dir", args.output_dir)
    check_folder("--save-rollouts", args.save_rollouts)
    if args.rollout_batch_size % args.steps_per_rollout:
        raise ValueError(
            f"--rollout-batch-size {args.rollout_batch_size} prompts cannot be cut into --steps-per-rollout "
            f"{args.steps_per_rollout} equal parts"
        )
    if not 0 <= args.setup_seconds < math.inf:
        raise ValueError(f"--setup-seconds is {args.setup_seconds:g}, must be 0 or more, and finite")
    resolved_reward_function(args)
    check_overlong(args)
    check_code_reward(args)
    check_distillation(args)
    check_loss(args)
    check_reference(args)
    check_asynchronous(args)
    check_tracking(args)
