"""Writes an HF checkpoint folder of known tensors, any rows in any order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_vespo.checkpoints.names import SINGLE_NAME
from megatron_vespo.checkpoints.safetensors_file import TensorInfo, header
from megatron_vespo.checkpoints.spans import Span
from megatron_vespo.system.disk import sync


def plan_shards(tensors: Mapping[str, TensorInfo], max_bytes: int) -> dict[str, dict[str, TensorInfo]]:
    """{file name: its tensors}. A file holds at most `max_bytes`, or one larger tensor."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    # wide elements first, so that every tensor of a file is aligned to its element size
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    total = len(shards)
    return {f"model-{number:05d}-of-{total:05d}.safetensors": shard for number, shard in enumerate(shards, 1)}


class ShardFile:
    """One safetensors file. The constructor writes its header and reserves its space. A context manager."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]):
        self._tensors = tensors
        text, self._offsets = header(tensors)
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        os.pwrite(self._descriptor, text, 0)
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size:
            os.posix_fallocate(self._descriptor, len(text), size)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is None:
            sync(self._descriptor)
        os.close(self._descriptor)

    def write(self, span: Span, values: Tensor) -> None:
        """Write the span's rows, given in the file's dtype. Safe to call from several threads."""
        tensor = self._tensors[span.name]
        assert values.dtype == tensor.dtype and values.nbytes == (span.stop - span.start) * tensor.row_bytes
        left = memoryview(values.contiguous().view(-1).view(torch.uint8).numpy())
        offset = self._offsets[span.name] + span.start * tensor.row_bytes
        while left:
            count = os.pwrite(self._descriptor, left, offset)
            left, offset = left[count:], offset + count
