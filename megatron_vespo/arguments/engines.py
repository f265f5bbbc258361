"""Flags of the SGLang engines: how many, where, and what happens when one fails."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_vespo.rollout.api_key import API_KEY_CHOICES
from megatron_vespo.system.settings import Settings


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engines")
    add = group.add_argument
    add("--rollout-engines", type=int, default=1, help="number of SGLang engines")
    add(
        "--rollout-port",
        type=int,
        default=0,
        help="port of the first engine, the others follow; 0: free ports",
    )
    add("--rollout-quantization", choices=("fp8",),
        help="engines hold block-FP8 weights, which the trainer quantises")  # fmt: skip
    add("--ray-address", help="Ray cluster to join, 'auto' for a running one; else a local one starts")
    add("--engine-restarts", type=int, default=3, metavar="N",
        help="restarts per engine, which serves after the next weight sync")  # fmt: skip
    add("--engine-api-key", choices=API_KEY_CHOICES, default="auto",
        help="engines answer this run only, by a key that it draws; auto: where they listen off "
        "loopback")  # fmt: skip
    add("--max-request-retries", type=int, default=2, metavar="N",
        help="how often a request is sent again if its engine is lost")  # fmt: skip
    add("--min-engines", type=int, default=1, metavar="N",
        help="end the run when fewer engines run or may restart")  # fmt: skip


def check_retries(number: int) -> None:
    if number < 0:
        raise ValueError(f"--max-request-retries is {number}, must be positive, or 0: none")


def check_engines(args: Namespace) -> None:
    check_retries(args.max_request_retries)
    if args.engine_restarts < 0:
        raise ValueError(f"--engine-restarts is {args.engine_restarts}, must be positive, or 0: none")
    if not 1 <= args.min_engines <= args.rollout_engines:
        raise ValueError(
            f"--min-engines is {args.min_engines}, must be between 1 and --rollout-engines "
            f"{args.rollout_engines}"
        )


@dataclass(frozen=True)
class EngineSettings(Settings):
    """`rollout_engines` is 0 in a run that trains on recorded batches."""

    hf_checkpoint: Path
    rollout_quantization: Literal["fp8"] | None  # None: as trained
    rollout_engines: int
    rollout_port: int  # of the first engine; 0: free ports
    ray_address: str | None
    sglang_flags: tuple[str, ...]  # in SGLang's own form
    engine_start_timeout: float  # seconds, like the next one
    engine_health_timeout: float
    engine_restarts: int
    min_engines: int
    engine_api_key: Literal["auto", "always", "never"]
