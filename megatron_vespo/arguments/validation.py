"""Checks of flags that need no model and no process: what, where, what would be right."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from megatron_vespo.algorithms.corrections import CORRECTIONS, why_forbidden
from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.algorithms.vespo import DECOUPLED
from megatron_vespo.algorithms.vespo_budget import c2_bounds
from megatron_vespo.arguments.async_flags import check_asynchronous
from megatron_vespo.arguments.checks import MOST_SEED, check_folder, check_positive, check_seed
from megatron_vespo.arguments.engine_flags import check_engine_faults
from megatron_vespo.arguments.eval_flags import check_eval
from megatron_vespo.arguments.loss_checks import check_group, check_router_losses
from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.system.time_limits import TIME_LIMITS

MAX_RECORDED_EXPERTS = 256  # routes are uint8
REQUIRED_BY_TRAIN = ("hf_checkpoint", "prompt_data", "output_dir")


def check_flags(args: Namespace, required: Sequence[str] = REQUIRED_BY_TRAIN) -> None:
    """Our own flags, before anything heavy is imported; those named in `required` must be there."""
    for flag in required:
        if getattr(args, flag) is None and not (flag == "prompt_data" and args.train_from):
            raise ValueError(f"--{flag.replace('_', '-')} is required; see --help")
    positive = (
        "rollout_batch_size group_size steps_per_rollout max_prompt_tokens max_completion_tokens "
        "rollout_engines trainer_ranks max_tokens_per_gpu reward_workers "
        "weight_sync_bucket_mb log_prob_chunk_size rollout_temperature mismatch_truncation "
        "dynamic_sampling_max_batches overlong_penalty old_policy_snapshots reward_memory_gb"
    ).split()
    check_positive(args, positive + [limit.name for limit in TIME_LIMITS])
    check_engine_faults(args)
    check_eval(args)
    if not args.hf_checkpoint.is_dir():
        raise ValueError(f"--hf-checkpoint {args.hf_checkpoint}: no such folder")
    check_folder("--output-dir", args.output_dir)
    check_folder("--save-rollouts", args.save_rollouts)
    check_group(args)
    if args.rollout_batch_size % args.steps_per_rollout:
        raise ValueError(
            f"--rollout-batch-size {args.rollout_batch_size} prompts cannot be cut into --steps-per-rollout "
            f"{args.steps_per_rollout} equal parts"
        )
    if not 0 <= args.setup_seconds < math.inf:
        raise ValueError(f"--setup-seconds is {args.setup_seconds:g}, must be 0 or more, and finite")
    _check_overlong(args)
    for name in ("vespo_positive", "vespo_negative"):
        c1, c2 = getattr(args, name)
        if not (0 <= c1 < math.inf and 0 <= c2 < math.inf):
            raise ValueError(
                f"--{name.replace('_', '-')} {c1:g} {c2:g}: exponents must be finite and not negative"
            )
    _check_loss(args)
    _check_correction(args)
    _check_budget(args)
    _check_old_policy(args)
    check_asynchronous(args)
    if args.routing_replay == "R2" and args.ratio_denominator == "rollout":
        raise ValueError(
            "--routing-replay R2 replays the routes of pi_old, which --ratio-denominator rollout does not "
            "compute: use R3, or another denominator"
        )


def _check_overlong(args: Namespace) -> None:
    if not 0 <= args.overlong_buffer <= args.max_completion_tokens:
        raise ValueError(
            f"--overlong-buffer {args.overlong_buffer} must be between 0 (off) and --max-completion-tokens "
            f"{args.max_completion_tokens}"
        )
    if args.overlong_penalty == math.inf:
        raise ValueError("--overlong-penalty inf: must be finite")


def _check_loss(args: Namespace) -> None:
    method = METHODS[args.policy_loss]
    if args.ratio_denominator in DECOUPLED and method.token_ratio:
        raise ValueError(
            f"--policy-loss {args.policy_loss} weighs tokens, --ratio-denominator {args.ratio_denominator} "
            "weighs whole responses: use recomputed or rollout"
        )
    for flag, given, default in (
        ("--clip-range", args.clip_range, method.clip_range),
        ("--sapo-tau", args.sapo_tau, method.tau),
        ("--loss-target", args.loss_target, method.target),
        ("--dual-clip", args.dual_clip, method.dual_clip or None),
    ):
        if given is not None and default is None:
            raise ValueError(f"{flag} has no effect on --policy-loss {args.policy_loss}: leave it out")
        if isinstance(given, list) and not all(0 < value < math.inf for value in given):
            raise ValueError(f"{flag} {given[0]:g} {given[1]:g}: both must be positive and finite")
    if args.loss_target is not None and not 0 < args.loss_target < 1:
        raise ValueError(f"--loss-target {args.loss_target:g}: must be between 0 and 1")
    if args.dual_clip is not None and not 1 < args.dual_clip < math.inf:
        raise ValueError(f"--dual-clip {args.dual_clip:g}: must be above 1 and finite")


def _check_correction(args: Namespace) -> None:
    name, bounds = args.mismatch_correction, args.mismatch_bounds
    loss, denominator = args.policy_loss, args.ratio_denominator
    reason = why_forbidden(name, denominator, METHODS[loss].token_ratio)
    if reason is not None:
        raise ValueError(
            f"--mismatch-correction {name} with --ratio-denominator {denominator} and --policy-loss {loss}: "
            f"{reason}"
        )
    if bounds is None:
        return
    correction = CORRECTIONS[name]
    given = f"--mismatch-bounds {bounds[0]:g} {bounds[1]:g}"
    if correction.bounds is None:
        raise ValueError(f"{given} has no effect on --mismatch-correction {name}: leave it out")
    if not (0 <= bounds[0] <= correction.agreement <= bounds[1] < math.inf and bounds[0] < bounds[1]):
        raise ValueError(
            f"{given}: LOW must be at least 0, HIGH finite and above it, and {correction.agreement:g}, "
            f"which --mismatch-correction {name} compares where engine and trainer agree, between them"
        )


def _check_budget(args: Namespace) -> None:
    if args.vespo_budget is None:
        return
    if args.policy_loss != "vespo":
        raise ValueError(
            f"--vespo-budget bounds the W of --policy-loss vespo, {args.policy_loss} has another weight: "
            "leave it out"
        )
    if not 0 < args.vespo_budget < math.inf:
        raise ValueError(f"--vespo-budget {args.vespo_budget:g} must be positive and finite")
    for name in ("vespo_positive", "vespo_negative"):
        c1, c2 = getattr(args, name)
        where = f"--vespo-budget starts at --{name.replace('_', '-')} {c1:g} {c2:g}"
        if c1 < 1:
            raise ValueError(f"{where}: C1 must be at least 1, else nothing bounds the variance")
        low, high = c2_bounds(c1)
        if not low <= c2 <= high:
            raise ValueError(f"{where}: C2 must be between {low:.2f} and {high:.2f}")


def _check_old_policy(args: Namespace) -> None:
    where = f"--old-policy {args.old_policy}"
    if not 0 < args.ewma_decay < 1:
        raise ValueError(f"--ewma-decay is {args.ewma_decay:g}, must be between 0 and 1")
    if args.old_policy == "current":
        return
    if args.ratio_denominator == "rollout":
        raise ValueError(
            f"{where}: --ratio-denominator rollout computes no pi_old; use another or leave it out"
        )
    if args.old_policy == "snapshot" and args.routing_replay == "R2":
        raise ValueError(
            f"{where}: a response may have tokens of several versions, --routing-replay R2 replays the "
            "routes of one; use R3"
        )
    if args.old_policy == "ewma" and args.max_logprob_difference is not None:
        raise ValueError(
            f"{where}: no engine has served the average, --max-logprob-difference would compare it with one; "
            "leave one out"
        )


def check_layout(args: Namespace) -> None:
    """Megatron's flags with ours and with the model. Megatron refuses much of it too, not in these words."""
    parallel = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor", "context")
    check_positive(args, [f"{size}_parallel_size" for size in parallel])
    _check_training(args)
    _check_lengths(args)
    _check_divisions(args)


def _check_optimizer(args: Namespace) -> None:
    """Numbers that Megatron takes as they are."""
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name):g}, must be 0 or more, below 1"
            )
    for name in (
        "lr",
        "min_lr",
        "adam_eps",
        "clip_grad",
        "weight_decay",
        "lr_warmup_iters",
        "lr_decay_iters",
    ):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}, must be 0 or more, and finite")


def _check_training(args: Namespace) -> None:
    if args.train_iters is None or args.train_iters <= 0:
        raise ValueError("--train-iters (optimizer steps) is required and must be positive")
    if args.lr is None:
        raise ValueError("--lr is required")
    _check_optimizer(args)
    if args.train_iters % args.steps_per_rollout:
        raise ValueError(
            f"--train-iters {args.train_iters} optimizer steps must be a multiple of --steps-per-rollout "
            f"{args.steps_per_rollout}"
        )
    if args.fp16:
        raise ValueError("--fp16: policy and engines share fp32 or, with --bf16, bfloat16")
    if args.optimizer_cpu_offload and (args.distributed_backend == "gloo" or not args.bf16):
        raise ValueError(
            "--optimizer-cpu-offload moves the optimizer of a --bf16 model out of GPU memory: it needs both"
        )
    if args.num_distributed_optimizer_instances > 1:
        instances = args.num_distributed_optimizer_instances
        raise ValueError(
            f"--num-distributed-optimizer-instances {instances}: gradient norms by part of the model are "
            "those of one instance: leave it out"
        )
    if args.on_alarm == "checkpoint-and-stop" and args.save is None:
        raise ValueError("--on-alarm checkpoint-and-stop needs --save, the folder of the checkpoint")
    if args.routing_replay and args.moe_router_fusion:
        raise ValueError(
            "--routing-replay does not reach --moe-router-fusion, which chooses by itself: leave one out"
        )
    check_router_losses(args)
    if args.num_experts is None:
        _check_dense(args)
    elif args.moe_router_topk == 1:
        raise ValueError(
            "num_experts_per_tok is 1: with norm_topk_prob the one expert has weight 1 whatever the router "
            "says, which then cannot be trained, and Megatron refuses it: at least 2"
        )
    elif args.routing_replay and args.num_experts > MAX_RECORDED_EXPERTS:
        raise ValueError(
            f"--routing-replay: routes are one byte, the model has {args.num_experts} experts, more than "
            f"{MAX_RECORDED_EXPERTS}"
        )


def _check_dense(args: Namespace) -> None:
    size = args.expert_model_parallel_size
    flags = {
        "--routing-replay": args.routing_replay,
        "--expert-model-parallel-size": size if size > 1 else None,
    }
    for flag, given in flags.items():
        if given is not None:
            raise ValueError(f"{flag} {given}: the model has no experts, leave it out")


def _check_lengths(args: Namespace) -> None:
    context = args.context_parallel_size
    longest = TokenLayout(context).padded_length(args.seq_length)
    if longest > args.max_tokens_per_gpu * context:
        raise ValueError(
            f"--max-tokens-per-gpu {args.max_tokens_per_gpu} x --context-parallel-size {context} is less "
            f"than the longest sequence, --max-prompt-tokens {args.max_prompt_tokens} + "
            f"--max-completion-tokens {args.max_completion_tokens} = {longest}"
            + (" with its padding" if context > 1 else "")
        )
    if args.max_position_embeddings < args.seq_length:
        raise ValueError(
            f"--max-prompt-tokens + --max-completion-tokens = {args.seq_length}, but the model has "
            f"{args.max_position_embeddings} positions (max_position_embeddings in its config)"
        )


def _check_divisions(args: Namespace) -> None:
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    context = args.context_parallel_size
    expert, expert_tensor = args.expert_model_parallel_size, args.expert_tensor_parallel_size or tensor
    dense = "--tensor-model-parallel-size x --pipeline-model-parallel-size x --context-parallel-size"
    divisions = [
        ("--trainer-ranks", args.trainer_ranks, dense, tensor * pipeline * context),
        (
            "--trainer-ranks",
            args.trainer_ranks,
            "expert tensor x expert x pipeline parallel size",
            expert_tensor * expert * pipeline,
        ),
        ("attention heads", args.num_attention_heads, "--tensor-model-parallel-size", tensor),
        ("key-value heads", args.num_query_groups, "--tensor-model-parallel-size", tensor),
    ]
    if args.num_experts is None:
        divisions.append(("MLP width", args.ffn_hidden_size, "--tensor-model-parallel-size", tensor))
    else:
        divisions += [
            ("experts", args.num_experts, "--expert-model-parallel-size", expert),
            ("expert width", args.moe_ffn_hidden_size, "--expert-tensor-parallel-size", expert_tensor),
        ]
    if _even_stages(args):
        divisions.append(("layers", args.num_layers, "--pipeline-model-parallel-size", pipeline))
    for what, number, flag, divisor in divisions:
        if number % divisor:
            raise ValueError(f"{flag} is {divisor}, which does not divide {what} {number}")
    _check_share(args, args.trainer_ranks // (tensor * pipeline * context), "data-parallel ranks")


def check_ranks_start(args: Namespace) -> None:
    """What Megatron itself refuses in a rank only, minutes later and without the flag's name."""
    # numpy's seed, which Megatron makes of it for every pipeline stage and data-parallel rank (initialize.py)
    most = MOST_SEED - 100 * (args.pipeline_model_parallel_size - 1)
    if args.data_parallel_random_init:
        most -= 10 * (args.trainer_ranks - 1)
    check_seed(args.seed, 1, most)
    check_folder("--save", args.save)
    for name in ("nccl_communicator_config_path", "te_precision_config_file"):
        given = getattr(args, name)
        if given and not Path(given).is_file():
            raise ValueError(f"--{name.replace('_', '-')} {given}: no such file")
    if args.wandb_project:
        raise ValueError(
            f"--wandb-project {args.wandb_project}: nothing of a run would get there, metrics are in "
            "--output-dir, for TensorBoard too: leave it out"
        )


def check_virtual_pipeline(args: Namespace) -> None:
    """Megatron derives the virtual stages from several flags, so this comes after its own checks."""
    virtual = args.virtual_pipeline_model_parallel_size
    if virtual is not None:
        stages = args.pipeline_model_parallel_size
        if _even_stages(args) and args.num_layers % (stages * virtual):
            raise ValueError(
                f"{stages} pipeline stages of {virtual} virtual ones do not divide layers {args.num_layers}"
            )
        what = f"data-parallel ranks in {stages} micro-batches each (virtual pipeline stages need them)"
        _check_share(args, args.data_parallel_size, what, stages)


def _even_stages(args: Namespace) -> bool:
    uneven = (
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.pipeline_model_parallel_layout,
    )
    return uneven == (None, None, None)


def _check_share(args: Namespace, ranks: int, what: str, micro_batches: int = 1) -> None:
    if args.global_batch_size % (ranks * micro_batches):
        raise ValueError(
            f"a mini-batch of {args.global_batch_size} completions cannot be shared by {ranks} {what} "
            "equally: change --rollout-batch-size, --group-size or --steps-per-rollout"
        )
