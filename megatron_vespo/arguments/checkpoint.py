"""Flags of saving, preemption and resuming after a failure, and their allowed combinations."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_vespo.arguments.checks import check_positive
from megatron_vespo.system.settings import Settings


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints and failures, beside Megatron's --save, --async-save ...")
    add = group.add_argument
    add("--trainer-restarts", type=int, default=3, metavar="N",
        help="restarts of all trainer ranks between two checkpoints")  # fmt: skip


def check_checkpoints(args: Namespace) -> None:
    if args.trainer_restarts < 0:
        raise ValueError(f"--trainer-restarts is {args.trainer_restarts}, must not be negative")


def check_megatron_saving(args: Namespace) -> None:
    """Checks Megatron's own flags, which are known only later."""
    check_positive(args, ("save_interval",))
    if args.use_persistent_ckpt_worker:
        raise ValueError(
            "--use-persistent-ckpt-worker: with --async-save a thread of each rank writes: leave it out"
        )
    if args.save is not None and args.ckpt_format != "torch_dist":
        raise ValueError(f"--ckpt-format {args.ckpt_format}: only torch_dist is saved here, leave it out")


@dataclass(frozen=True)
class SaveSettings(Settings):
    """Absolute folders; see `resume.resolve_load`."""

    save: str | None
    load: str | None
    ckpt_step: int | None  # None: the newest
    gone_back: Mapping[str, Any] | None
    save_interval: int  # optimizer steps
    trainer_restarts: int
    use_checkpoint_opt_param_scheduler: bool
