"""All time limits of a run that a disk, a compiler or a cluster can reach, with reasons for their lengths.

A limit ends a wait that would never end. A limit that is too short kills what is only slow: 61 GB of weights
(30 billion parameters in bfloat16) take 20 minutes from a shared disk that gives a node 50 MB/s.
"""

from __future__ import annotations

import argparse
import math
from argparse import Namespace
from dataclasses import dataclass

from megatron_vespo.arguments.weight_sync import SyncSettings

SYNC_DEADLINES = 4  # a sync waits for engines several times: the driver gives up after this many limits
CHECK_CALLS = 6  # rank 0's calls to an engine that is compared with an export, besides loading it
LEAST_COLLECTIVE_MINUTES = 60  # Megatron's default of 10 is less than a slow checkpoint takes
MARGIN_MINUTES = 5


@dataclass(frozen=True)
class TimeLimit:
    flag: str
    default: float  # seconds
    until: str
    why: str

    @property
    def name(self) -> str:
        """Name of the argument."""
        return self.flag.removeprefix("--").replace("-", "_")


TIME_LIMITS = (
    TimeLimit(
        "--engine-start-timeout", 1800.0, "an engine serves",
        "61 GB from a shared disk, kernels that are compiled at the first start, CUDA graphs",
    ),
    TimeLimit(
        "--worker-start-timeout", 1800.0, "Megatron has started and loaded the weights",
        "imports, weights or a whole checkpoint from a shared disk",
    ),
    TimeLimit(
        "--generate-timeout", 1800.0, "a completion is there",
        "the longest response at the engine's slowest, so it depends on --max-completion-tokens",
    ),
    TimeLimit(
        "--train-timeout", 7200.0, "a rollout batch is there, a trainer's call has ended",
        "the longest are a batch's log-probs and, in asynchronous runs, the wait for a batch",
    ),
    TimeLimit(
        "--weight-sync-timeout", 300.0, "engines answer one call of a weight sync",
        "a bucket or a checksum takes seconds, the first NCCL connection of many nodes a minute or two",
    ),
    TimeLimit(
        "--weight-check-timeout", 1200.0, "an engine has loaded an export to compare with",
        "61 GB from a shared disk, with requests paused: see --weight-check-interval",
    ),
    TimeLimit(
        "--engine-health-timeout", 300.0, "an engine that serves generates a token",
        "kernels that are compiled for a new shape; then it is taken for dead",
    ),
    TimeLimit("--reward-timeout", 10.0, "a reward is there", "it is code of a user or of a model"),
    TimeLimit(
        "--preemption-deadline", 300.0, "all is saved after SIGTERM or SIGUSR1",
        "clusters kill some minutes later; then the exit code is 76, before that 75 (start again to resume)",
    ),
)  # fmt: skip


def add_time_limit_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "time limits", "--generate-timeout SECONDS and others: see docs/guides/fault-tolerance.md"
    ).add_argument
    for limit in TIME_LIMITS:
        add(limit.flag, type=float, default=limit.default, metavar="SECONDS", help=f"until {limit.until}")


def longest_engine_step_s(engine_start_timeout: float, weight_check_timeout: float) -> float:
    """Longest time that one step of an engine may take, or that its ranks wait for each other."""
    return max(engine_start_timeout, weight_check_timeout)


def sync_timeout_s(settings: SyncSettings) -> float:
    """Limit of a whole weight sync. The ranks' own limits end first: they know which engine they wait for."""
    return SYNC_DEADLINES * settings.weight_sync_timeout


def check_timeout_s(settings: SyncSettings) -> float:
    """Limit of rank 0's comparison of an engine with an export."""
    return settings.weight_check_timeout + CHECK_CALLS * settings.weight_sync_timeout


def collective_timeout_minutes(args: Namespace, given: int | None) -> int:
    """Value of --distributed-timeout-minutes; the default is longer than any wait of a single rank.

    Meanwhile all other ranks wait for that rank in a collective, and NCCL kills them at this timeout.
    ValueError if `given` is too short for that.
    """
    sync = SyncSettings.of(args)
    longest = max(args.worker_start_timeout, sync_timeout_s(sync), check_timeout_s(sync))
    if given is None:
        return max(LEAST_COLLECTIVE_MINUTES, math.ceil(longest / 60) + MARGIN_MINUTES)
    if given * 60 <= longest:
        raise ValueError(
            f"--distributed-timeout-minutes {given}: ranks wait in a collective while one waits for engines "
            f"or a disk, up to {longest:g} s by --worker-start-timeout, --weight-check-timeout and "
            f"--weight-sync-timeout: at least {math.floor(longest / 60) + 1}, or leave it out"
        )
    return given
