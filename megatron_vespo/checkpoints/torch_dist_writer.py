"""Writes a torch_dist checkpoint chunk by chunk, as Megatron's --load expects it."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_vespo.checkpoints.names import COMMON_STATE, COMPLETE_NAME, METADATA_NAME
from megatron_vespo.checkpoints.row_map import row_runs
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.spans import Span, row_ranges
from megatron_vespo.checkpoints.torch_archive import around
from megatron_vespo.checkpoints.torch_dist_names import Address, addresses, extra_states
from megatron_vespo.models.family import Family, ModelShape
from megatron_vespo.system.disk import sync

# how Megatron 0.19 builds the state dicts that it asks a checkpoint for
_CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_CHECKPOINT_VERSION = 3.0  # from which on query, key and value are interleaved by group


@dataclass(frozen=True)
class Destination:
    """The destination of a span of rows: from `row` on, in the parameter at each of `addresses`."""

    span: Span
    addresses: tuple[Address, ...]
    row: int
    full_shape: tuple[int, ...]  # of the parameter


def destinations(
    family: Family, shape: ModelShape, tensors: Mapping[str, TensorInfo], max_bytes: int
) -> Iterator[Destination]:
    """Every row of every HF tensor, once, in spans of at most `max_bytes`."""
    for name in family.parameters(shape):
        mapping = family.mapping_for(name, shape)
        infos = [tensors[hf_name] for hf_name in mapping.hf_names]
        full_shape = (sum(info.rows for info in infos), *infos[0].shape[1:])
        where = tuple(addresses(name, shape))
        for run in row_runs(mapping, [info.rows for info in infos]):
            hf_name = mapping.hf_names[run.hf_index]
            for start, stop in row_ranges(run.rows, tensors[hf_name].row_bytes, max_bytes):
                span = Span(hf_name, run.hf_start + start, run.hf_start + stop)
                yield Destination(span, where, run.megatron_start + start, full_shape)


@dataclass(frozen=True)
class Written:
    """A chunk that was written to a file."""

    destination: Destination
    place: _StorageInfo
    sizes: tuple[int, ...]
    dtype: torch.dtype


class ChunkFile:
    """One `.distcp` file. A context manager that leaves the bytes on the disk, not in its cache.

    Space for `num_bytes` is taken at once, which fails early on a full disk and makes writing cheaper.
    """

    def __init__(self, folder: Path, name: str, num_bytes: int = 0):
        self._name = name
        self._file = (folder / name).open("xb", buffering=0)
        if num_bytes:
            os.posix_fallocate(self._file.fileno(), 0, num_bytes)
        self.written: list[Written] = []

    def __enter__(self) -> ChunkFile:
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            self._file.truncate()
            sync(self._file)
        self._file.close()

    def write(self, destination: Destination, values: Tensor) -> None:
        """Write `values` [rows, ...] as one chunk."""
        values = values.contiguous()
        stacked = values.view(*(1 for _ in destination.addresses[0].stack), *values.shape)
        before, after = around(stacked)
        place = self._write(before, memoryview(values.view(-1).view(torch.uint8).numpy()), after)
        self.written.append(Written(destination, place, tuple(stacked.shape), values.dtype))

    def write_object(self, value: Any) -> _StorageInfo:
        """Store a non-tensor object as Megatron does: in a list of one."""
        stream = io.BytesIO()
        torch.save([value], stream)
        return self._write(stream.getbuffer())

    def _write(self, *parts: bytes | memoryview) -> _StorageInfo:
        start = self._file.tell()
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[self._file.write(left) :]
        return _StorageInfo(self._name, start, self._file.tell() - start)


def write_metadata(
    folder: Path, shape: ModelShape, written: Iterable[Written], model_arguments: Mapping[str, Any]
) -> None:
    """Write all but the chunks. `.metadata` comes last, so a folder without it is no checkpoint."""
    metadata = Metadata({}, storage_data={}, version=CURRENT_DCP_VERSION)
    for chunk in written:
        _enter_chunk(metadata, chunk)
    with ChunkFile(folder, "__common.distcp") as file:
        common = file.write_object(_common_state(model_arguments))
        nothing = file.write_object(None)
    for name in extra_states(shape):
        _enter_object(metadata, name, nothing)  # all of them are the same bytes
    _enter_object(metadata, COMMON_STATE, common)
    (folder / COMPLETE_NAME).write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    with (folder / METADATA_NAME).open("xb") as file:
        pickle.dump(metadata, file)


def _enter_chunk(metadata: Metadata, chunk: Written) -> None:
    destination = chunk.destination
    rest = (0,) * (len(destination.full_shape) - 1)
    for address in destination.addresses:
        offsets = torch.Size((*address.index, destination.row, *rest))
        tensor = metadata.state_dict_metadata.setdefault(
            address.key,
            TensorStorageMetadata(
                TensorProperties(chunk.dtype), torch.Size((*address.stack, *destination.full_shape)), []
            ),
        )
        assert isinstance(tensor, TensorStorageMetadata)
        index = MetadataIndex(address.key, offsets, len(tensor.chunks))
        assert index not in metadata.storage_data, f"{index} written twice"
        tensor.chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk.sizes)))
        metadata.storage_data[index] = chunk.place


def _enter_object(metadata: Metadata, name: str, place: _StorageInfo) -> None:
    metadata.state_dict_metadata[name] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(name)] = place


def _common_state(model_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What Megatron reads before the weights, the arguments of the model (--use-checkpoint-args) among it."""
    arguments = argparse.Namespace(  # the type that Megatron stores
        **model_arguments, tensor_model_parallel_size=1, pipeline_model_parallel_size=1
    )
    return {
        "args": arguments,
        "checkpoint_version": _CHECKPOINT_VERSION,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": _CONTENT_METADATA,
    }
