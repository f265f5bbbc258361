"""Megatron's own torch_dist checkpoints, with the rollout state (data cursor, policy version) inside."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.training import checkpointing
from megatron.training.global_vars import get_args

from megatron_vespo.conversion.hf_shards import copy_companions
from megatron_vespo.conversion.sources import HF_FOLDER


def exists(folder: str | None) -> bool:
    return folder is not None and checkpointing.checkpoint_exists(folder)


def save(args: Namespace, iteration: int, model, optimizer, scheduler, rollout_state: dict) -> None:
    """One atomic unit: the state travels with the arguments, and the tracker file names the folder last.

    The HF configuration and tokenizer follow, so that the checkpoint can be converted by itself.
    """
    args.rollout_state = rollout_state
    args.iteration = iteration
    assert get_args() is args, "Megatron saves its global arguments"
    checkpointing.save_checkpoint(
        iteration, model, optimizer, scheduler, num_floating_point_operations_so_far=0
    )
    if dist.get_rank() == 0:
        folder = Path(checkpointing.get_checkpoint_name(args.save, iteration, return_base_dir=True))
        (folder / HF_FOLDER).mkdir(exist_ok=True)
        copy_companions(args.hf_checkpoint, folder / HF_FOLDER)


def rollout_state(args: Namespace) -> dict | None:
    """The state stored with the checkpoint that `args.load` points at; ValueError if it cannot be resumed.

    None for converted weights (Megatron calls them a release): there is nothing to resume, training starts.
    """
    tracker = checkpointing.get_checkpoint_tracker_filename(args.load)
    iteration, release = checkpointing.read_metadata(tracker)
    if release:
        return None
    folder = checkpointing.get_checkpoint_name(args.load, iteration, release, return_base_dir=True)
    stored = dist_checkpointing.load_common_state_dict(Path(folder))["args"]
    if not hasattr(stored, "rollout_state"):
        raise ValueError(f"--load {folder} was not written by this program: it has no rollout state")
    if not args.no_load_optim and _separate_experts(stored) != _separate_experts(args):
        raise ValueError(
            f"--load {folder} was saved with --expert-model-parallel-size "
            f"{stored.expert_model_parallel_size}, now it is {args.expert_model_parallel_size}: Megatron's "
            "optimizer state only fits if both or none are above 1; --no-load-optim takes the weights alone "
            "and starts the optimizer afresh"
        )
    # it files the state of a parameter group under these, and finds nothing under other numbers
    for name in ("lr", "min_lr"):
        before, now = getattr(stored, name), getattr(args, name)
        if not args.no_load_optim and before != now:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"--load {folder} was saved with {flag} {before}, now it is {now}: "
                "Megatron's optimizer state only fits the same; --no-load-optim takes the weights alone and "
                "starts the optimizer afresh"
            )
    return stored.rollout_state


def _separate_experts(args: Namespace) -> bool:
    """Whether Megatron keeps an optimizer for the experts apart, which changes the structure it saves."""
    tensor = args.tensor_model_parallel_size
    apart = args.expert_model_parallel_size > 1 or (args.expert_tensor_parallel_size or tensor) != tensor
    return apart and args.num_experts is not None
