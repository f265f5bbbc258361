"""Flags of where trainer ranks and engines run: on separate GPUs, or colocated."""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron_vespo.rollout.server_arguments import MEMORY_FRACTION, engine_size, flag_value
from megatron_vespo.system.hardware import runs_on_gpus
from megatron_vespo.system.wording import counted


def add_placement_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("placement")
    add = group.add_argument
    add("--trainer-ranks", type=int, default=1, help="Megatron processes; one GPU each where there are GPUs")
    add("--colocate", action="store_true",
        help="engines and trainer share the GPUs and take turns")  # fmt: skip
    add(
        "--no-colocate-offload",
        dest="colocate_offload",
        action="store_false",
        help="keep weights and optimizer on the GPU during generation",
    )
    add("--max-tokens-per-gpu", type=int, default=8192,
        help="tokens of a packed micro-batch per context-parallel rank")  # fmt: skip
    add("--log-prob-chunk-size", type=int, default=1024, metavar="TOKENS",
        help="compute logits for this many tokens at a time")  # fmt: skip


def check_colocation(args: Namespace) -> None:
    """Checks colocation against Megatron's and SGLang's flags, but not whether engines fit into nodes."""
    if not args.colocate:
        if not args.colocate_offload:
            raise ValueError("--no-colocate-offload is about --colocate: leave it out, or add --colocate")
        return
    if args.max_staleness:
        raise ValueError(
            f"--colocate: generation and training take turns on a GPU, --max-staleness {args.max_staleness} "
            "lets both work: leave one out"
        )
    for flag, given in {"--train-from": args.train_from, "--rollout-only": args.rollout_only}.items():
        if given:
            raise ValueError(f"--colocate is for trainer and engines, {flag} has one of them: leave one out")
    moved = {"--fp8-param-gather": args.fp8_param_gather, "--use-nccl-ub": args.nccl_ub}
    for flag, given in moved.items():
        if given and args.colocate_offload:
            raise ValueError(f"{flag}: --colocate moves the trainer's weights, which it forbids: "
                             "leave it out, or add --no-colocate-offload")  # fmt: skip
    size = engine_size(args.sglang_flags)
    if args.rollout_engines * size > args.trainer_ranks:
        most = args.trainer_ranks // size
        fix = f"at most --rollout-engines {most}" if most else "a smaller --sglang-tp-size"
        raise ValueError(
            f"--colocate: --rollout-engines {args.rollout_engines} of {counted(size, 'GPU')} lie on those of "
            f"--trainer-ranks {args.trainer_ranks}: {fix}"
        )
    fraction = flag_value(args.sglang_flags, MEMORY_FRACTION)
    if runs_on_gpus(args.distributed_backend) and fraction is None:
        raise ValueError(
            "--colocate needs --sglang-mem-fraction-static: by itself SGLang takes most of a GPU, where a "
            "part of the trainer's memory stays; megatron-vespo plan says how much is left"
        )
