"""Flags of saving, of being preempted and of going on after a failure, and what goes together."""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron_vespo.arguments.checks import check_positive


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints and failures, beside Megatron's --save, --async-save ...")
    add = group.add_argument
    add("--trainer-restarts", type=int, default=3, metavar="N",
        help="where a trainer rank dies all start again, from the newest checkpoint of --save; so often at "
        "most without a new one in between")  # fmt: skip


def check_checkpoints(args: Namespace) -> None:
    if args.trainer_restarts < 0:
        raise ValueError(f"--trainer-restarts is {args.trainer_restarts}, must not be negative")


def check_megatron_saving(args: Namespace) -> None:
    """Megatron's own flags, which are known only later."""
    check_positive(args, ("save_interval",))
    if args.use_persistent_ckpt_worker:
        raise ValueError(
            "--use-persistent-ckpt-worker: with --async-save a thread of each rank writes: leave it out"
        )
    if args.save is not None and args.ckpt_format != "torch_dist":
        raise ValueError(f"--ckpt-format {args.ckpt_format}: only torch_dist is saved here, leave it out")
