"""Starts Megatron in this process: global variables, process groups, seeds."""

from __future__ import annotations

import copy
import os
from argparse import Namespace
from unittest.mock import patch

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training import initialize as megatron_initialize
from megatron.training.global_vars import set_global_variables


def initialize(
    args: Namespace, rank: int, local_rank: int, master_address: str, master_port: int
) -> Namespace:
    """This rank's own copy of the arguments; torch.distributed and the model-parallel groups are up."""
    args = copy.deepcopy(args)
    args.rank, args.local_rank = rank, local_rank
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(args.world_size),
        MASTER_ADDR=master_address,
        MASTER_PORT=str(master_port),
    )
    set_global_variables(args, build_tokenizer=False)
    # Megatron's data sets are not used here. It would build their helpers by make, for which its wheel has no
    # Makefile, and end the process.
    with patch.object(megatron_initialize, "_compile_dependencies", lambda: None):
        megatron_initialize.initialize_megatron(allow_no_cuda=not torch.cuda.is_available())
    return args


def process_groups() -> ProcessGroupCollection:
    """The one place that reads Megatron's global parallel state."""
    return ProcessGroupCollection.use_mpu_process_groups()


def device() -> torch.device:
    """Where this rank's tensors live."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
