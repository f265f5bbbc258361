"""Flags of engines that fail and of the check of their weights, their defaults and what goes together."""

from __future__ import annotations

import argparse
from argparse import Namespace

from megatron_vespo.rollout.api_key import API_KEY_CHOICES


def add_engine_fault_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engines that fail")
    add = group.add_argument
    add("--engine-restarts", type=int, default=3, metavar="N",
        help="how often each is started again; it serves when it has the current weights")  # fmt: skip
    add("--engine-api-key", choices=API_KEY_CHOICES, default="auto",
        help="engines answer this run only, by a key that it draws; auto: where they listen off "
        "loopback")  # fmt: skip
    add("--max-request-retries", type=int, default=2, metavar="N",
        help="how often a request whose engine is lost is sent again; then its group has failed")  # fmt: skip
    add("--min-engines", type=int, default=1, metavar="N",
        help="the run ends when fewer are left that run or may be started again")  # fmt: skip


def check_retries(args: Namespace) -> None:
    if args.max_request_retries < 0:
        raise ValueError(f"--max-request-retries is {args.max_request_retries}, must be positive, or 0: none")


def check_engine_faults(args: Namespace) -> None:
    if args.weight_check_interval < 0:
        raise ValueError(
            f"--weight-check-interval {args.weight_check_interval}: must be positive, or 0 (on resumes only)"
        )
    check_retries(args)
    if args.engine_restarts < 0:
        raise ValueError(f"--engine-restarts is {args.engine_restarts}, must be positive, or 0: none")
    if not 1 <= args.min_engines <= args.rollout_engines:
        raise ValueError(
            f"--min-engines is {args.min_engines}, must be between 1 and --rollout-engines "
            f"{args.rollout_engines}"
        )
