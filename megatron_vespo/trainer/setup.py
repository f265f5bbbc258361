"""Builds the model and the optimizer, and loads a checkpoint of either layer implementation into them.

Megatron's local layers and Transformer Engine's store the same tensors under the same names, except the norm
before an MoE layer's experts. Each also asks for the extra state of its own modules, which is non-empty only
in fp8 training, and for the settings of its own Adam.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Set
from functools import partial
from typing import Any, cast
from unittest.mock import patch

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.enums import ModelType
from megatron.core.optimizer import MegatronOptimizer
from megatron.training.global_vars import get_args
from megatron.training.training import setup_model_and_optimizer
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_vespo.checkpoints.resumable import take_flags
from megatron_vespo.trainer.model import model_config, model_provider
from megatron_vespo.trainer.stand_ins import stand_ins

_NORM_NAMES = (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")


def set_up(args: Namespace) -> tuple:
    """Megatron's model chunks, optimizer and scheduler, and the number of optimizer steps done.

    They come from the checkpoint in `args.load`, if there is one. A collective of all ranks.
    """
    provider = model_provider(args, model_config(args))
    with stored_names(partial(take_flags, flags=vars(args))):
        model, optimizer, scheduler = setup_model_and_optimizer(ModelType.encoder_or_decoder, provider)
    assert optimizer is not None
    _add_missing_settings(optimizer)
    return model, optimizer, scheduler, cast(Namespace, get_args()).iteration


def _add_missing_settings(optimizer: MegatronOptimizer) -> None:
    """Adds settings that loading drops: it replaces the parameter groups by those of the Adam that saved."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(part, "is_stub_optimizer", False):  # the rank has no parameters of its kind
            continue
        for group in part.optimizer.param_groups:
            for name, value in part.optimizer.defaults.items():
                group.setdefault(name, value)


@contextlib.contextmanager
def stored_names(then: Callable[[dict], None] | None = None) -> Iterator[None]:
    """Inside, `dist_checkpointing.load` asks for everything by the name under which it was stored.

    `then` may change the loaded state. Stored objects of this package become stand-ins.
    """
    load = dist_checkpointing.load

    def load_as_stored(sharded_state_dict: dict, checkpoint_dir: str, *args: Any, **kwargs: Any) -> Any:
        stored = FileSystemReader(checkpoint_dir).read_metadata().state_dict_metadata.keys()
        dict_list_map_inplace(lambda part: _as_stored(part, stored), sharded_state_dict)
        state = load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        if then is not None:
            then(state)  # pyright: ignore[reportArgumentType]
        return state

    with stand_ins(), patch.object(dist_checkpointing, "load", load_as_stored):
        yield


def _as_stored(part: Any, stored: Set[str]) -> Any:
    """The same part of the state under its name in the checkpoint; unchanged if it has no other."""
    if isinstance(part, ShardedObject) and part.key.endswith("._extra_state"):
        return part if part.unique_key in stored else LocalNonpersistentObject(part.data)
    if isinstance(part, ShardedTensor | ShardedTensorFactory) and part.key not in stored:
        for ours, theirs in (_NORM_NAMES, _NORM_NAMES[::-1]):
            other = part.key.replace(ours, theirs)
            if other != part.key and other in stored:
                part.key = other
                break
    return part
