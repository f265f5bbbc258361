"""Parameters and checkpoint keys of some ranks of a recipe under Transformer Engine, without memory or peers.

real_shape.py RANK FLAGS...
"""

from __future__ import annotations

import sys
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_vespo.arguments.parse import parse_args
from megatron_vespo.trainer import meta_model
from megatron_vespo.trainer.initialize import process_groups
from megatron_vespo.trainer.model import model_config, model_provider
from megatron_vespo.trainer.weights import global_parameters
from tests.distributed.programs.common import hand_back

META = torch.device("meta")


def main() -> None:
    rank, *flags = sys.argv[1:]
    args = parse_args([*flags, "--load", ""], "plan", ("hf_checkpoint",))
    args.perform_initialization = False  # random numbers would need memory
    dist.init_process_group("fake", world_size=args.world_size, rank=int(rank), store=FakeStore())
    meta_model.initialize_groups(args)
    groups = process_groups()
    with patch.object(torch.cuda, "current_device", lambda: META), META:
        model = model_provider(args, model_config(args))(
            pre_process=groups.pp.rank() == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1,
            pg_collection=groups,
        )
    parameters = {name: tuple(parameter.shape) for name, parameter in global_parameters(model, groups)}
    state = model.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    apply_factories(state)
    parts = list(nested_values(state))
    tensors = {address(part) for part in parts if isinstance(part, ShardedTensor)}
    hand_back(
        names=np.array(list(parameters)),
        shapes=np.array([repr(shape) for shape in parameters.values()]),
        addresses=np.array(sorted(map(repr, tensors))),
        objects=np.array([part.unique_key for part in parts if isinstance(part, ShardedObject)]),
        transformer_impl=args.transformer_impl,
    )


def address(tensor: ShardedTensor) -> tuple:
    """Name, place and numbers of what is stacked, as conversion.torch_dist_names.Address has them."""
    stacked = tensor.prepend_axis_num
    return tensor.key, tuple(tensor.global_offset[:stacked]), tuple(tensor.global_shape[:stacked])


if __name__ == "__main__":
    main()
