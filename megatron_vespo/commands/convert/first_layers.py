"""Makes a torch_dist checkpoint of a model's first layers, with links instead of copies."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_vespo.checkpoints.names import METADATA_NAME
from megatron_vespo.checkpoints.torch_dist_file import read_metadata

_LAYERS = "decoder.layers."
_NUMBERED = re.compile(r"decoder\.layers\.(\d+)\.")
_OBJECT = re.compile(r"(decoder\.layers\..+/shard_)(\d+)(.*_)(\d+)(.*)")  # a ShardedObject's unique key


def link_first_layers(folder: Path, target: Path, num_layers: int) -> None:
    """Fills the new folder `target` with links to the data of `folder`, and metadata of `num_layers` layers.

    `folder` stacks its layers or names each by its number, as `torch_dist_names` says.
    """
    target.mkdir()
    stored = read_metadata(folder)
    kept = Metadata({}, storage_data={}, version=stored.version)
    names = {key: _renamed(key, num_layers) for key in stored.state_dict_metadata}
    for key, entry in stored.state_dict_metadata.items():
        name = names[key]
        if name is None:
            continue
        if isinstance(entry, TensorStorageMetadata) and _is_stacked(key):
            chunks = [chunk for chunk in entry.chunks if chunk.offsets[0] < num_layers]
            entry = replace(entry, size=torch.Size((num_layers, *entry.size[1:])), chunks=chunks)
        kept.state_dict_metadata[name] = entry
    for index, place in stored.storage_data.items():
        stacked = index.offset is not None and _is_stacked(index.fqn)
        if names.get(index.fqn) and not (stacked and index.offset[0] >= num_layers):  # pyright: ignore[reportOptionalSubscript]
            kept.storage_data[replace(index, fqn=names[index.fqn])] = place
    for path in folder.glob("*.distcp"):
        os.symlink(path.absolute(), target / path.name)
    shutil.copyfile(folder / "metadata.json", target / "metadata.json")
    with (target / METADATA_NAME).open("wb") as file:
        pickle.dump(kept, file)


def _is_stacked(key: str) -> bool:
    return key.startswith(_LAYERS) and _NUMBERED.match(key) is None


def _renamed(key: str, num_layers: int) -> str | None:
    """The key in the smaller model; None for a key of a later layer."""
    numbered = _NUMBERED.match(key)
    if numbered:
        return key if int(numbered[1]) < num_layers else None
    match = _OBJECT.fullmatch(key)
    if not match:
        return key
    before, layer, between, _, after = match.groups()
    return f"{before}{layer}{between}{num_layers}{after}" if int(layer) < num_layers else None
