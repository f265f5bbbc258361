"""Flags of asynchronous rollouts, their defaults and allowed combinations."""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron_vespo.arguments.checks import check_positive


def add_asynchronous_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("asynchronous rollout")
    add = group.add_argument
    add("--max-staleness", type=int, default=0, metavar="S",
        help="engines generate while training runs; the oldest token of a sample is at most S optimizer "
        "steps old; 0: generate and train in turn")  # fmt: skip
    add("--sync-interval", type=int, metavar="K",
        help="optimizer steps between weight syncs; default: --steps-per-rollout")  # fmt: skip
    add("--on-weight-update", choices=("retract", "in-place", "abort"),
        help="requests that run at a weight sync go on: with keys and values computed anew by the new "
        "weights; with those they have, then without prefix cache; or as new requests; default: retract, "
        "and abort with --routing-replay R3")  # fmt: skip
    add("--over-subscription", type=float, metavar="FACTOR",
        help="rollout batches in flight or waiting, at most; default: by --max-staleness")  # fmt: skip
    add("--stop-generation-while-training", dest="stop_generation", action="store_true",
        help="pause all requests when a batch is complete, until it is trained")  # fmt: skip
    add("--stale-groups", choices=("requeue", "drop"), default="requeue",
        help="what happens to finished groups that are too old")  # fmt: skip
    add("--max-attempts", type=int, default=3,
        help="generate a group that fails or gets too old at most N times")  # fmt: skip


def check_asynchronous(args: Namespace) -> None:
    check_positive(args, ("sync_interval", "max_attempts"))
    check_staleness(
        args.max_staleness,
        args.steps_per_rollout,
        args.sync_interval,
        args.over_subscription,
        args.stop_generation,
    )
    if args.max_staleness:
        _check_combinations(args)


def default_on_weight_update(args: Namespace) -> str:
    """The value of --on-weight-update if it is not given: the way that keeps what the run needs."""
    return "abort" if args.max_staleness and args.routing_replay == "R3" else "retract"


def check_staleness(
    staleness: int,
    steps: int,
    interval: int | None,
    over_subscription: float | None,
    stop_generation: bool = False,
) -> None:
    """ValueError if --max-staleness, --steps-per-rollout and these flags are incompatible."""
    where = f"--max-staleness {staleness}"
    if staleness < 0:
        raise ValueError(f"{where}: must not be negative")
    if over_subscription is not None and over_subscription < 1:
        raise ValueError(f"--over-subscription is {over_subscription:g}, a batch alone needs 1")
    interval = interval or steps
    if staleness == 0:
        for flag, given in {
            "--over-subscription": over_subscription,
            "--stop-generation-while-training": stop_generation,
        }.items():
            if given:
                raise ValueError(
                    f"{flag} leaves responses for a later batch, whose policy is another one: it needs "
                    f"--max-staleness {max(interval, steps)} at least"
                )
        if interval != steps:
            raise ValueError(
                f"--sync-interval {interval}: without --max-staleness weights are synced after every rollout "
                f"batch, --steps-per-rollout {steps} optimizer steps: leave it out"
            )
        return
    if interval % steps and steps % interval:
        raise ValueError(
            f"--sync-interval {interval} must be a divisor or a multiple of --steps-per-rollout {steps}"
        )
    # a batch of the newest weights reaches lag max(steps, interval) - 1; one more lets generation run ahead
    least = max(steps, interval)
    if staleness < least:
        raise ValueError(
            f"{where}: --steps-per-rollout {steps} and --sync-interval {interval} alone make samples "
            f"{least - 1} optimizer steps old; at least {least}, or 0 for synchronous training"
        )


def _check_combinations(args: Namespace) -> None:
    where = f"--max-staleness {args.max_staleness}"
    for flag, given in {"--train-from": args.train_from, "--rollout-only": args.rollout_only}.items():
        if given:
            raise ValueError(f"{where} trains while engines generate, {flag} does one of them: leave one out")
    if args.routing_replay == "R2":
        raise ValueError(
            f"{where}: a response may have tokens of several policies, --routing-replay R2 replays the "
            "routes of one: use R3"
        )
    if args.routing_replay == "R3" and args.on_weight_update == "retract":
        raise ValueError(
            "--on-weight-update retract: every weight sync would lose the routes of all running responses, "
            "which --routing-replay R3 replays: use abort, the default with R3, or in-place"
        )
    if args.old_policy == "snapshot" and args.old_policy_snapshots <= args.max_staleness:
        raise ValueError(
            f"{where} with --old-policy snapshot needs --old-policy-snapshots {args.max_staleness + 1} "
            f"at least, not {args.old_policy_snapshots}"
        )
