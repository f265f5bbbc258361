"""Converts one Megatron parameter, with its tensor-parallel shards, to its HF tensors and back.

A mapping has both directions:

    merge(shards)         Megatron shards, one per tensor-parallel rank  ->  {HF name: full tensor}
    shard(tensors, size)  HF tensors in the order of `hf_names`          ->  Megatron shards, one per rank

Both return views or copies in the dtype of the inputs. They compute nothing, so a round trip is bit-exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Direct:
    """The same tensor on both sides. `dim` is the sharded dimension, None if every rank holds it in full."""

    hf_names: tuple[str, ...]  # one
    dim: int | None

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        full = shards[0] if self.dim is None else torch.cat(tuple(shards), dim=self.dim)
        return {self.hf_names[0]: full}

    def shard(self, tensors: Sequence[Tensor], size: int) -> list[Tensor]:
        if self.dim is None:
            return [tensors[0]] * size
        return list(tensors[0].chunk(size, dim=self.dim))


@dataclass(frozen=True)
class GatedMLP:
    """linear_fc1 stacks gate and up. Each rank's shard stacks its own parts of both."""

    hf_names: tuple[str, ...]  # gate, up: [intermediate, hidden]

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return {name: torch.cat([half[i] for half in halves]) for i, name in enumerate(self.hf_names)}

    def shard(self, tensors: Sequence[Tensor], size: int) -> list[Tensor]:
        gate, up = (tensor.chunk(size, dim=0) for tensor in tensors)
        return [torch.cat(pair) for pair in zip(gate, up, strict=True)]


@dataclass(frozen=True)
class QKV:
    """Megatron interleaves: [q of group 0, k 0, v 0, q of group 1, ...]. Shards hold whole query groups."""

    hf_names: tuple[str, ...]  # q [heads * head_dim, hidden], k and v [groups * head_dim, hidden]
    num_query_groups: int
    heads_per_group: int
    head_dim: int

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        full = torch.cat(tuple(shards))
        rest = full.shape[1:]
        grouped = full.view(self.num_query_groups, self.heads_per_group + 2, self.head_dim, *rest)
        parts = grouped.split([self.heads_per_group, 1, 1], dim=1)
        return {name: part.reshape(-1, *rest) for name, part in zip(self.hf_names, parts, strict=True)}

    def shard(self, tensors: Sequence[Tensor], size: int) -> list[Tensor]:
        rest = tensors[0].shape[1:]
        grouped = [tensor.reshape(self.num_query_groups, -1, self.head_dim, *rest) for tensor in tensors]
        return list(torch.cat(grouped, dim=1).reshape(-1, *rest).chunk(size))


@dataclass(frozen=True)
class Vocabulary(Direct):
    """Rows are tokens. Megatron pads them with zero rows so that all ranks hold the same number of rows."""

    vocab_size: int
    padded_vocab_size: int

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.hf_names[0]: torch.cat(tuple(shards))[: self.vocab_size]}

    def shard(self, tensors: Sequence[Tensor], size: int) -> list[Tensor]:
        rows = tensors[0]
        padding = rows.new_zeros(self.padded_vocab_size - self.vocab_size, *rows.shape[1:])
        return list(torch.cat([rows, padding]).chunk(size))


Mapping = Direct | GatedMLP | QKV | Vocabulary
