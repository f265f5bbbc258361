"""Megatron's own torch_dist checkpoints, with the rollout state (data cursor, policy version) inside."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.training import checkpointing
from megatron.training.global_vars import get_args


def exists(folder: str | None) -> bool:
    return folder is not None and checkpointing.checkpoint_exists(folder)


def save(args: Namespace, iteration: int, model, optimizer, scheduler, rollout_state: dict) -> None:
    """One atomic unit: the state travels with the arguments, and the tracker file names the folder last."""
    args.rollout_state = rollout_state
    args.iteration = iteration
    assert get_args() is args, "Megatron saves its global arguments"
    checkpointing.save_checkpoint(
        iteration, model, optimizer, scheduler, num_floating_point_operations_so_far=0
    )


def rollout_state(args: Namespace) -> dict:
    """The state stored with the checkpoint that `args.load` points at."""
    tracker = checkpointing.get_checkpoint_tracker_filename(args.load)
    iteration, release = checkpointing.read_metadata(tracker)
    folder = checkpointing.get_checkpoint_name(args.load, iteration, release, return_base_dir=True)
    stored = dist_checkpointing.load_common_state_dict(Path(folder))["args"]
    if not hasattr(stored, "rollout_state"):
        raise ValueError(f"--load {folder} was not written by this program: it has no rollout state")
    return stored.rollout_state
