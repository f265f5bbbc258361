"""Starts Megatron in this process: global variables, process groups, seeds."""

from __future__ import annotations

import copy
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import initialize as megatron_initialize
from megatron.training.global_vars import get_args, set_args, set_global_variables


def initialize(
    args: Namespace, rank: int, local_rank: int, master_address: str, master_port: int
) -> Namespace:
    """Start torch.distributed and the model-parallel groups; returns this rank's copy of the arguments."""
    args = _changed(args, rank=rank, local_rank=local_rank)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(args.world_size),
        MASTER_ADDR=master_address,
        MASTER_PORT=str(master_port),
    )
    set_global_variables(args, build_tokenizer=False)
    # Megatron's data sets are not used here. Megatron would build their helpers with make and end the
    # process, as its wheel has no Makefile.
    with patch.object(megatron_initialize, "_compile_dependencies", lambda: None):
        megatron_initialize.initialize_megatron(allow_no_cuda=not torch.cuda.is_available())
    if torch.cuda.is_available():
        _repeat_unpermutation(args)
    return args


def give_to_megatron(args: Namespace, **changes: Any) -> Namespace:
    """A copy of `args` with `changes`. From now on Megatron reads it, and only Megatron writes to it."""
    args = _changed(args, **changes)
    set_args(args)
    return args


@contextmanager
def megatron_arguments(**changes: Any) -> Iterator[None]:
    """Inside, Megatron reads a copy of its arguments with `changes`; afterwards the original ones."""
    before = cast(Namespace, get_args())
    give_to_megatron(before, **changes)
    try:
        yield
    finally:
        set_args(before)


def _changed(args: Namespace, **changes: Any) -> Namespace:
    return Namespace(**copy.deepcopy(vars(args)) | changes)


def _repeat_unpermutation(args: Namespace) -> None:
    """Makes every pass add the outputs of a token's experts in the same order, where torch adds them.

    By default torch adds them by atomics, in another order each time. Then log W of an unchanged policy is
    not 0. With deterministic algorithms switched on, Megatron uses `index_add`. Operations without a
    deterministic version only warn. Transformer Engine's attention reads this switch, too. Its fused
    permutation, the default there, does not need it.
    """
    if args.num_experts and args.transformer_impl == "local" and not args.moe_permute_fusion:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, decides nothing here  # pyright: ignore[reportAttributeAccessIssue]


def process_groups() -> ProcessGroupCollection:
    """The one place that reads Megatron's global parallel state."""
    return ProcessGroupCollection.use_mpu_process_groups()


def device() -> torch.device:
    """The device of this rank's tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
