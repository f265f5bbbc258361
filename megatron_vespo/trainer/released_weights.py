"""The first layers of a Megatron checkpoint in a model that has no more, by Megatron's own loading."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from megatron_vespo.trainer.initialize import device
from megatron_vespo.trainer.model import model_config, model_provider


def load_first_layers(args: Namespace, folder: Path, stored_layers: int) -> GPTModel:
    """The model of `args` (one rank) with weights from `folder`, which holds `stored_layers` layers."""
    model = model_provider(args, model_config(args))(pre_process=True, post_process=True).to(device()).eval()
    wanted = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    wanted = dict_list_map_inplace(lambda entry: _of_deeper_model(entry, stored_layers), wanted)
    missing, unexpected = model.load_state_dict(dist_checkpointing.load(wanted, str(folder)), strict=False)
    lost = [name for name in missing if not name.endswith("_extra_state")]
    if lost:
        raise RuntimeError(f"{folder} left {lost[0]} unset")
    return model


def _of_deeper_model(entry: Any, num_layers: int) -> Any:
    """The same shard as a part of tensors that stack `num_layers` layers."""
    if isinstance(entry, ShardedTensorFactory):
        build = entry.build_fn
        return replace(
            entry,
            build_fn=lambda *arguments: dict_list_map_inplace(
                lambda made: _of_deeper_model(made, num_layers), build(*arguments)
            ),
        )
    if not isinstance(entry, (ShardedTensor, ShardedObject)) or not entry.key.startswith("decoder.layers."):
        return entry
    deeper = {"global_shape": (num_layers, *entry.global_shape[1:])}
    if isinstance(entry, ShardedTensor) and entry.axis_fragmentations is not None:
        deeper["axis_fragmentations"] = (num_layers, *entry.axis_fragmentations[1:])
    return replace(entry, **deeper)
