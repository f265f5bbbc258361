"""A trainer rank's end of the exact sync: its part of a plan, packed group by group into shared memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_vespo.weight_sync.messages import Introduction
from megatron_vespo.weight_sync.plan import Piece, Plan
from megatron_vespo.weight_sync.shared_memory import SharedMemory


class Packer:
    """Two buffers, filled in turn: engines read one while the other is filled."""

    def __init__(self, plan: Plan, rank: int, dtype: torch.dtype):
        self._dtype = dtype
        self._size = plan.buffer_bytes
        self._memory = SharedMemory(2 * self._size)
        self._groups: dict[int, list[Piece]] = defaultdict(list)
        for piece in plan.pieces:
            if piece.source == rank:
                self._groups[piece.group].append(piece)

    @property
    def path(self) -> str:
        return self._memory.path

    @torch.no_grad()
    def pack(self, group: int, held: Mapping[str, Tensor]) -> int:
        """Copy the group's pieces out of `held`, this rank's parameters by their first HF tensor.

        Returns the number of bytes.
        """
        start = group % 2 * self._size
        buffer = self._memory.bytes[start : start + self._size].view(self._dtype)
        targets, values, end = [], [], 0
        for piece in self._groups[group]:
            tensor = held[piece.tensor]
            matrix = tensor.view(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.view(-1, 1)
            values.append(matrix[piece.row : piece.row + piece.rows, piece.col : piece.col + piece.cols])
            end = piece.offset // self._dtype.itemsize
            targets.append(buffer[end : end + piece.elements].view(piece.rows, piece.cols))
            end += piece.elements
        if targets:
            torch._foreach_copy_(targets, values)  # pyright: ignore[reportPrivateImportUsage]
        return end * self._dtype.itemsize

    def close(self) -> None:
        self._memory.close()


def introductions(
    plan: Plan, paths: Mapping[int, str], dtype: torch.dtype, board: str, first_slot: int
) -> list[Introduction]:
    """For each rank of an engine. `paths` are the sources' shared memory, by trainer rank."""
    sources = {rank: number for number, rank in enumerate(paths)}
    found = []
    for engine_rank, matrices in enumerate(plan.matrices):
        numbers = {name: number for number, name in enumerate(matrices)}
        pieces: Sequence[list[int]] = [
            [
                *(piece.group, sources[piece.source], piece.offset, numbers[piece.parameter]),
                *(piece.to_row, piece.to_col, piece.rows, piece.cols),
            ]
            for piece in plan.pieces
            if piece.engine_rank == engine_rank
        ]
        padding = [
            [numbers[fill.parameter], fill.to_row, fill.rows]
            for fill in plan.padding
            if fill.engine_rank == engine_rank
        ]
        found.append(
            Introduction(
                board=board,
                slot=first_slot + engine_rank,
                sources=list(paths.values()),
                buffer_bytes=plan.buffer_bytes,
                dtype=str(dtype).removeprefix("torch."),
                matrices=[(name, *size) for name, size in matrices.items()],
                pieces=pieces,
                padding=padding,
            )
        )
    return found
