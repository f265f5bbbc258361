"""A trainer rank's part of a version: everything at first, afterwards the elements that have changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from megatron_vespo.weight_sync.changes import Elements, encode, integers
from megatron_vespo.weight_sync.disk_version import Part, checksum_of, file_of
from megatron_vespo.weight_sync.packer import Packer
from megatron_vespo.weight_sync.plan import Plan


@dataclass(frozen=True)
class Written:
    """`size` is the file's, in bytes; `changed` the number of elements that it brings."""

    size: int
    changed: int
    parts: list[Part]


class DiskWriter:
    """Keeps on the host what it has written last: as many bytes as the rank sends to one engine."""

    def __init__(self, plan: Plan, rank: int, dtype: torch.dtype, device: torch.device):
        self._packer = Packer(plan, rank, dtype)
        self._rank, self._device, self._buffer_bytes = rank, device, plan.buffer_bytes
        self._elements = integers(dtype.itemsize)
        self._last: dict[int, Elements] = {}  # by group

    def write(self, folder: Path, held: Mapping[str, Tensor]) -> Written:
        """A file in `folder`; none if no element has changed. `held` as in `Packer`.

        OSError if it cannot be written. Then the next one of a new writer has to hold everything.
        """
        size, changed, parts = 0, 0, []
        stream: BufferedWriter | None = None
        path = file_of(folder, self._rank)
        buffer = torch.empty(self._buffer_bytes, dtype=torch.uint8, device=self._device)
        try:
            for group in self._packer.groups:
                used = self._packer.pack(group, held, buffer)
                packed = buffer[:used].cpu().numpy().view(self._elements)
                for engine_rank, segment in self._segments(group):
                    data, number = self._said(group, segment, packed)
                    changed += number
                    if data is None:
                        continue
                    stream = stream or path.open("xb")
                    stream.write(data)
                    whole = number == segment.stop - segment.start
                    parts.append(
                        Part(self._rank, group, engine_rank, size, len(data), checksum_of(data), whole)
                    )
                    size += len(data)
                self._keep(group, packed)
        finally:
            if stream is not None:
                stream.close()
        return Written(size, changed, parts)

    def _segments(self, group: int) -> list[tuple[int, slice]]:
        """Engine rank and its elements in the group's buffer."""
        itemsize = self._elements.itemsize
        return [
            (engine_rank, slice(offset // itemsize, (offset + size) // itemsize))
            for engine_rank, offset, size in self._packer.segments(group)
        ]

    def _said(self, group: int, segment: slice, packed: Elements) -> tuple[memoryview | bytes | None, int]:
        """What is written of a segment, None if it is as before, and its number of changed elements."""
        new = packed[segment]
        if group not in self._last:
            return new.data.cast("B"), len(new)
        data, changed = encode(new, self._last[group][segment])
        return (new.data.cast("B") if changed == len(new) else data), changed

    def _keep(self, group: int, packed: Elements) -> None:
        if group in self._last:
            self._last[group][:] = packed
        else:
            self._last[group] = packed.copy()
