"""Flags of the weight sync from the trainer to the engines."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

from megatron_vespo.system.settings import Settings


def add_sync_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("weight sync")
    add = group.add_argument
    add("--weight-sync-bucket-mb", type=int, default=512, metavar="MiB", help="size of a bucket of weights")
    add(
        "--weight-sync-staging",
        action="store_true",
        help="send weights while engines generate, into memory beside those in use; engines pause for a copy",
    )
    add("--weight-check-interval", type=int, default=50, metavar="SYNCS",
        help="compare an engine with an export every N syncs; 0: on resumes only")  # fmt: skip


def check_sync(args: Namespace) -> None:
    if args.weight_sync_staging and not args.max_staleness:
        raise ValueError("--weight-sync-staging: engines of a synchronous run are idle during a weight sync")
    if args.weight_check_interval < 0:
        raise ValueError(
            f"--weight-check-interval {args.weight_check_interval}: must be positive, or 0 (on resumes only)"
        )


@dataclass(frozen=True)
class SyncSettings(Settings):
    weight_sync_bucket_mb: int  # MiB
    weight_sync_staging: bool
    weight_sync_timeout: float  # seconds, for one call to the engines
    weight_check_interval: int  # syncs; 0: on resumes only
    weight_check_timeout: float  # seconds
    colocate: bool
    colocate_offload: bool
    on_weight_update: Literal["retract", "in-place", "abort"]
    max_staleness: int  # 0: engines generate nothing during a sync
