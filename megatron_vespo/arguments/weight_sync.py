"""Flags of the weight sync from the trainer to the engines."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vespo.arguments.checks import check_folder
from megatron_vespo.system.paths import user_path
from megatron_vespo.system.settings import Settings


def add_sync_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("weight sync")
    add = group.add_argument
    add("--weight-sync", choices=("auto", "broadcast", "disk"), default="auto",
        help="shard to shard, else by broadcast; always by broadcast; through files, for engines that only "
        "HTTP and files reach")  # fmt: skip
    add("--weight-sync-folder", type=user_path, metavar="DIR",
        help="folder of --weight-sync disk, which trainer and engines see")  # fmt: skip
    add("--weight-sync-bucket-mb", type=int, default=512, metavar="MiB", help="size of a bucket of weights")
    add(
        "--weight-sync-staging",
        action="store_true",
        help="send weights while engines generate, which pause for a copy only",
    )
    add("--weight-check-interval", type=int, default=50, metavar="SYNCS",
        help="compare an engine with an export every N syncs; 0: on resumes")  # fmt: skip


def check_sync(args: Namespace) -> None:
    _check_way(args)
    if args.weight_sync_staging and not args.max_staleness:
        raise ValueError("--weight-sync-staging: engines of a synchronous run are idle during a weight sync")
    if args.weight_check_interval < 0:
        raise ValueError(
            f"--weight-check-interval {args.weight_check_interval}: must be positive, or 0 (on resumes only)"
        )


def _check_way(args: Namespace) -> None:
    where = f"--weight-sync {args.weight_sync}"
    if args.weight_sync_staging and args.weight_sync != "auto":
        why = "sends when engines pause" if args.weight_sync == "broadcast" else "needs no staging"
        raise ValueError(f"--weight-sync-staging: {where} {why}: leave one of them out")
    if args.weight_sync != "disk":
        if args.weight_sync_folder is not None:
            raise ValueError(
                f"--weight-sync-folder {args.weight_sync_folder}: {where} writes no files: leave it out, or "
                "add --weight-sync disk"
            )
        return
    if args.weight_sync_folder is None:
        raise ValueError(f"{where} needs --weight-sync-folder, a folder that trainer and engines see")
    if args.colocate:
        raise ValueError(f"{where}: engines of --colocate share the trainer's memory: leave one of them out")
    check_folder("--weight-sync-folder", args.weight_sync_folder, writable=True)


@dataclass(frozen=True)
class SyncSettings(Settings):
    weight_sync: Literal["auto", "broadcast", "disk"]
    weight_sync_folder: Path | None  # of disk alone
    weight_sync_bucket_mb: int  # MiB
    weight_sync_staging: bool
    weight_sync_timeout: float  # seconds, for one call to the engines
    weight_check_interval: int  # syncs; 0: on resumes only
    weight_check_timeout: float  # seconds
    colocate: bool
    colocate_offload: bool
    on_weight_update: Literal["retract", "in-place", "abort"]
    max_staleness: int  # 0: engines generate nothing during a sync
