"""Loads a model with the weights of a Megatron checkpoint, without optimizer or training state."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel

from megatron_vespo.trainer.initialize import device
from megatron_vespo.trainer.model import model_config, model_provider
from megatron_vespo.trainer.setup import stored_names


def load_model(args: Namespace, folder: Path) -> GPTModel:
    """The whole model of `args` on this one rank. Megatron loads it from `folder`, one iteration's."""
    model = model_provider(args, model_config(args))(pre_process=True, post_process=True).to(device()).eval()
    wanted = model.sharded_state_dict(metadata={"singleton_local_shards": False})
    with stored_names():
        loaded = dist_checkpointing.load(wanted, str(folder))
    missing = model.load_state_dict(loaded, strict=False).missing_keys  # pyright: ignore[reportArgumentType]
    lost = [name for name in missing if not name.endswith("_extra_state")]
    if lost:
        raise RuntimeError(f"{folder} left {lost[0]} unset")
    return model
