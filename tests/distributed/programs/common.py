"""What the programs share: starting Megatron on this rank, reading samples, handing results back."""

from __future__ import annotations

import os
import pickle
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_vespo.types import TrainingSample

# 2 mini-batches of 24 samples a rollout; the longest sample has 20 + 30 tokens
FLAGS = (
    "--prompt-data unused.jsonl --output-dir unused --train-iters 8 --lr 1e-3 --clip-grad 1.0 "
    "--steps-per-rollout 2 --rollout-batch-size 12 --group-size 4 "
    "--max-prompt-tokens 20 --max-completion-tokens 30"
).split()


def start_megatron(flags: list[str]) -> Namespace:
    """This rank's arguments; process groups are up after it."""
    from megatron_vespo.arguments.parse import parse_args
    from megatron_vespo.trainer.initialize import initialize

    rank = int(os.environ["RANK"])
    args = parse_args([*FLAGS, "--trainer-ranks", os.environ["WORLD_SIZE"], *flags])
    return initialize(args, rank, rank, "127.0.0.1", int(os.environ["MASTER_PORT"]))


def start_policy(*more_flags: str):
    """The policy of the command line's flags and `more_flags`, and the samples of one mini-batch."""
    _, policy, samples = start_program(*more_flags)
    return policy, samples[: policy.args.global_batch_size]


def start_program(*more_flags: str, **options: Callable[[str], Any]):
    """Options of the program's own, the policy of all other flags, and all samples.

    Example: options, policy, samples = start_program(save_after=int), for --save-after 2; bool: no value
    """
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("--samples", type=Path, required=True)
    for name, kind in options.items():
        how = {"action": "store_true"} if kind is bool else {"type": kind}
        parser.add_argument("--" + name.replace("_", "-"), **how)
    own, flags = parser.parse_known_args()
    policy = make_policy(start_megatron([*flags, *more_flags]))
    return own, policy, read_samples(own.samples)


def join_ranks() -> int:
    """This rank, in a job of Gloo, for programs without Megatron's groups."""
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = f"tcp://127.0.0.1:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", address, timedelta(seconds=60), world_size=num_ranks, rank=rank)
    return rank


def make_policy(args: Namespace):
    """The policy that the command line's flags describe."""
    from megatron_vespo.algorithms.losses.settings import LossSettings
    from megatron_vespo.trainer.policy import MegatronPolicy

    return MegatronPolicy(args, LossSettings.of(args))


def read_samples(path: Path) -> list[TrainingSample]:
    return pickle.loads(path.read_bytes())


def hand_back(**arrays: Any) -> None:
    np.savez(os.environ["RESULT_FILE"], **arrays)
