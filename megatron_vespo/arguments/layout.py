"""Checks Megatron's flags of layout, precision and training against ours and the model."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path

from megatron_vespo.arguments.checks import MOST_SEED, check_folder, check_positive, check_seed
from megatron_vespo.arguments.loss import check_router_losses
from megatron_vespo.data.context_parallel import TokenLayout

MAX_RECORDED_EXPERTS = 256  # routes are uint8


def check_layout(args: Namespace) -> None:
    """Checks Megatron's flags against ours and the model. Megatron refuses much of this too, less clearly."""
    parallel = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor", "context")
    check_positive(args, [f"{size}_parallel_size" for size in parallel])
    _check_training(args)
    _check_lengths(args)
    _check_divisions(args)


def _check_optimizer(args: Namespace) -> None:
    """Checks numbers that Megatron does not check."""
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
    if args.rotary_interleaved:
        raise ValueError(
            "--rotary-interleaved: models of these families rotate the halves of a head: leave it out"
        )
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
        if shared := args.moe_shared_expert_intermediate_size:
            divisions.append(("shared experts' width", shared, "--tensor-model-parallel-size", tensor))
        if isinstance(args.moe_layer_freq, list):  # some layers have no experts
            divisions.append(("MLP width", args.ffn_hidden_size, "--tensor-model-parallel-size", tensor))
    if _even_stages(args):
        divisions.append(("layers", args.num_layers, "--pipeline-model-parallel-size", pipeline))
    for what, number, flag, divisor in divisions:
        if number % divisor:
            raise ValueError(f"{flag} is {divisor}, which does not divide {what} {number}")
    _check_share(args, args.trainer_ranks // (tensor * pipeline * context), "data-parallel ranks")


def check_ranks_start(args: Namespace) -> None:
    """Refuses what Megatron refuses only in a rank, minutes later and without the flag's name."""
    # Megatron derives numpy's seed from it for every pipeline stage and data-parallel rank (initialize.py)
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
            f"--wandb-project {args.wandb_project}: Megatron's own writer gets nothing of a run: give "
            f"--tracker wandb --tracker-project {args.wandb_project} instead"
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
