"""An engine rank's end of the exact sync: copies pieces into the model's own parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_vespo.weight_sync.engine_parameters import EngineParameters
from megatron_vespo.weight_sync.exported_memory import opened
from megatron_vespo.weight_sync.messages import Introduction
from megatron_vespo.weight_sync.outside_group import leave_group


class Receiver:
    """Of one connection with a trainer."""

    def __init__(self, told: Introduction, device: torch.device):
        self._told, self._device = told, device
        self._dtype: torch.dtype = getattr(torch, told.dtype)
        self._parameters = EngineParameters(told.matrices)
        self._buffers = [
            opened(handle, size * told.ring, device)
            if handle
            else torch.empty(size * told.ring, dtype=torch.uint8, device=device)
            for handle, size in told.buffers
        ]
        self._pieces: dict[int, list[Sequence[int]]] = {}
        for group, *piece in told.pieces:
            self._pieces.setdefault(group, []).append(piece)
        self._arrivals: dict[int, list[Sequence[int]]] = {}
        for group, *arrival in told.arrivals:
            self._arrivals.setdefault(group, []).append(arrival)
        # views of 20,000 pieces take 0.3 s to make; they are kept as long as the parameters stay in place
        self._views: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._pointers: list[int] = []
        self._group: dist.ProcessGroup | None = None
        self._posted: dict[int, list[dist.Work]] = {}

    def join(self, group: dist.ProcessGroup) -> None:
        """Receive over `group`."""
        self._group = group

    def close(self) -> None:
        if self._group is not None:
            leave_group(self._group)
            self._group = None

    def stage(self) -> None:
        """Receive all groups. The buffers have to hold them all, and keep them until `load`."""
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with torch.cuda.stream(stream):
            for group in self._arrivals:
                self._post(group)
                self._wait(group)
        if stream is not None:
            stream.synchronize()

    def check(self, model: nn.Module) -> None:
        """ValueError if the model is another one than planned for, see `EngineParameters`."""
        self._parameters.check(model)

    @torch.no_grad()
    def load(self, model: nn.Module, start: int, stop: int, staged: bool) -> None:
        """Copy the pieces of the groups from `start` to `stop` - 1. Then their buffers may be overwritten."""
        for group in range(start, stop):
            if not staged:
                self._post(group)
                self._wait(group)
                self._post(group + 1)  # it arrives while this one is copied
            self._copy(model, group)
        if self._device.type == "cuda":
            # not the whole device, where a kernel may wait for the next group
            torch.cuda.current_stream(self._device).synchronize()

    def _copy(self, model: nn.Module, group: int) -> None:
        matrices = self._parameters.of(model)
        pointers = [matrix.data_ptr() for matrix in matrices]
        if pointers != self._pointers:  # at the first copy, or the engine has bound its parameters anew
            self._pointers, self._views = pointers, {}
        if group not in self._views:
            self._views[group] = self._views_of(group, matrices)
        targets, values = self._views[group]
        if targets:
            torch._foreach_copy_(targets, values)  # pyright: ignore[reportPrivateImportUsage]
        if group == 0:
            for parameter, to_row, rows in self._told.padding:
                matrices[parameter][to_row : to_row + rows] = 0

    def _views_of(self, group: int, matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Where the group's pieces go, and where they are."""
        slot = group % self._told.ring
        buffers = [
            buffer[slot * size : (slot + 1) * size].view(self._dtype)
            for buffer, (_, size) in zip(self._buffers, self._told.buffers, strict=True)
        ]
        targets, values = [], []
        for buffer, offset, parameter, to_row, to_col, rows, cols in self._pieces.get(group, ()):
            first = offset // self._dtype.itemsize
            targets.append(matrices[parameter][to_row : to_row + rows, to_col : to_col + cols])
            values.append(buffers[buffer][first : first + rows * cols].view(rows, cols))
        return targets, values

    def _post(self, group: int) -> None:
        """Start to receive what arrives for the group, unless that has been done."""
        if group in self._posted or not self._arrivals.get(group):
            return
        assert self._group is not None
        buffer, (_, size) = self._buffers[-1], self._told.buffers[-1]
        start = group % self._told.ring * size
        operations = [
            dist.P2POp(dist.irecv, buffer[start + offset : start + offset + length], source, self._group)
            for source, offset, length in self._arrivals[group]
        ]
        self._posted[group] = dist.batch_isend_irecv(operations)

    def _wait(self, group: int) -> None:
        for work in self._posted.pop(group, ()):
            work.wait()
