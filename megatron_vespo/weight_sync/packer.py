"""Copies what a trainer rank sends into a buffer, as a plan says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

import torch
from torch import Tensor

from megatron_vespo.weight_sync.plan import Piece, Plan
from megatron_vespo.weight_sync.wiring import extent


class Packer:
    """Of trainer rank `rank`. `groups` are its pieces by group."""

    def __init__(self, plan: Plan, rank: int, dtype: torch.dtype):
        """`dtype` is that of the bytes on their way."""
        self._dtype = dtype
        self.groups: dict[int, list[Piece]] = {}
        for piece in plan.pieces:
            if piece.source == rank:
                self.groups.setdefault(piece.group, []).append(piece)

    @torch.no_grad()
    def pack(self, group: int, held: Mapping[str, Tensor], buffer: Tensor) -> int:
        """Copy the group's pieces out of `held`, the rank's parameters by their first HF tensor, to their
        places in `buffer`, uint8. Returns the number of bytes.
        """
        targets, values, size = [], [], 0
        for piece in self.groups[group]:
            tensor = held[piece.tensor]
            matrix = tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.view(-1, 1)
            values.append(matrix[piece.row : piece.row + piece.rows, piece.col : piece.col + piece.cols])
            end = piece.offset + piece.elements * self._dtype.itemsize
            targets.append(buffer[piece.offset : end].view(self._dtype).view(piece.rows, -1))
            size += end - piece.offset
        torch._foreach_copy_(targets, values)  # pyright: ignore[reportPrivateImportUsage]
        return size

    def segments(self, group: int) -> Iterator[tuple[int, int, int]]:
        """Engine rank, offset and size of the neighbouring bytes that are for it."""
        for engine_rank, pieces in groupby(self.groups[group], lambda piece: piece.engine_rank):
            yield engine_rank, *extent(list(pieces), self._dtype.itemsize)
