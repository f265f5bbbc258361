"""Provides the reference policy: the weights of an HF folder, or the policy of some optimizer steps ago.

Each rank keeps a copy of its part of the weights in host memory. A checkpoint has no copy of an HF folder, so
a resumed run reads the folder again. A moved reference is saved with the model, under names of its own.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.utils import unwrap_model
from megatron.training import checkpointing
from torch import Tensor

from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.checkpoints.torch_dist_names import REFERENCE
from megatron_vespo.trainer.setup import stored_names
from megatron_vespo.trainer.weight_copies import copies, restored, swapped, weights_of

VERSION = "reference_version"  # key in the stored state: which policy a moved reference is


class Reference:
    """The reference policy. `version` is the policy version that it has become; None: an HF folder's."""

    def __init__(
        self,
        model: list,
        tensors: list[Tensor],
        interval: int | None,
        version: int | None,
        complete: Callable[[], None],
    ):
        """`tensors` are this rank's, see `weight_copies`. `interval` is in optimizer steps; None: frozen."""
        self._model, self._tensors, self._interval, self._complete = model, tensors, interval, complete
        self.version = version

    def weights(self) -> AbstractContextManager:
        """A pass inside computes the reference."""
        self._complete()
        return swapped(self._model, self._tensors)

    def advance(self, version: int) -> None:
        """Called after every optimizer step, with the policy version that it produced."""
        if self._interval is not None and version % self._interval == 0:
            self._complete()
            self._tensors, self.version = copies(self._model), version

    def state(self) -> dict[str, int]:
        """What a checkpoint stores beside `saved`."""
        return {} if self.version is None else {VERSION: self.version}

    @contextmanager
    def saved(self) -> Iterator[None]:
        """Inside, Megatron saves a moved reference with the model."""
        save = dist_checkpointing.save

        def save_both(state: dict, *args: Any, **kwargs: Any) -> Any:
            return save(state | self._sharded(), *args, **kwargs)

        if self.version is None:
            yield
            return
        with patch.object(dist_checkpointing, "save", save_both):
            yield

    def _sharded(self) -> dict[str, Any]:
        """The state of the model's chunks with the reference's tensors in the place of the model's."""
        places = {
            weight.data_ptr(): tensor
            for weight, tensor in zip(weights_of(self._model), self._tensors, strict=True)
        }

        def of_reference(part: Any) -> Any:
            if isinstance(part, ShardedTensor | ShardedTensorFactory):
                assert part.data is not None
                part.data = places[part.data.data_ptr()].view(part.data.shape)
            return part

        state = _own_state(self._model)
        dict_list_map_inplace(of_reference, state)
        return state


def reference_policy(
    settings: LossSettings,
    args: Namespace,
    model: list,
    loaded: Path | None,
    load_hf: Callable[[Path], None],
    version: int | None,
    complete: Callable[[], None],
) -> Reference | None:
    """The reference policy of a run that has just loaded its weights; None if no flag asks for one.

    `loaded` is the HF folder that the model's weights are of; None: they are a checkpoint's. `load_hf` fills
    the model from such a folder. `version` is what `Reference.state` has stored: then the
    checkpoint in `args.load` has the reference. ValueError if the folder does not fit the model.
    """
    if not settings.uses_reference:
        return None
    folder = settings.reference_checkpoint or args.hf_checkpoint
    if settings.reference_update_interval is None:
        version = None
    complete()
    with restored(model) if folder != loaded else nullcontext():
        if version is not None:
            _load(model, _checkpoint_folder(args))
        elif folder != loaded:
            load_hf(folder)
        tensors = copies(model)
    if dist.get_rank() == 0:
        print(f"reference policy: {folder if version is None else f'policy version {version}'}")
    return Reference(model, tensors, settings.reference_update_interval, version, complete)


def _checkpoint_folder(args: Namespace) -> str:
    iteration = args.ckpt_step
    if iteration is None:
        iteration, _ = checkpointing.read_metadata(checkpointing.get_checkpoint_tracker_filename(args.load))
    return checkpointing.get_checkpoint_name(args.load, iteration, return_base_dir=True)


def _load(model: list, folder: str) -> None:
    """Fill the model with the reference that a checkpoint holds, saved at any layout."""
    with stored_names():
        state = cast(dict, dist_checkpointing.load(_own_state(model), folder))
    for i, chunk in enumerate(unwrap_model(model)):
        loaded = {name: value for name, value in state[f"{REFERENCE}{i}"].items() if value is not None}
        missing, _ = chunk.load_state_dict(loaded, strict=False)
        assert all(name.endswith("_extra_state") for name in missing), missing


def _own_state(model: list) -> dict[str, Any]:
    """What a checkpoint holds of the reference: the state of each model chunk under names of its own."""

    def renamed(part: Any) -> Any:
        if isinstance(part, ShardedTensor | ShardedTensorFactory):
            part.key = REFERENCE + part.key
            return part
        return LocalNonpersistentObject(None)

    chunks = enumerate(unwrap_model(model))
    state = {f"{REFERENCE}{i}": chunk.sharded_state_dict() for i, chunk in chunks}
    dict_list_map_inplace(renamed, state)
    return state
