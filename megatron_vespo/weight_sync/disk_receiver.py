"""An engine rank's end of --weight-sync disk: reads its parts of a version into the model's parameters."""

from __future__ import annotations

import traceback
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megatron_vespo.weight_sync.changes import decode
from megatron_vespo.weight_sync.disk_folder import sees
from megatron_vespo.weight_sync.disk_version import DamagedError, Part, answer, read_manifest, read_part
from megatron_vespo.weight_sync.engine_parameters import EngineParameters
from megatron_vespo.weight_sync.messages import DiskHello, DiskLoad, DiskPlan

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DiskConnection:
    """With one trainer, from its hello on. Answers go into the folder that each message names."""

    def __init__(self, hello: DiskHello, device: torch.device):
        self._hello, self._device = hello, device
        self._receiver: DiskReceiver | None = None
        if sees(Path(hello.run_folder), hello.token):
            answer(Path(hello.folder), hello.slot, None)

    def take(self, message: DiskPlan | DiskLoad, model: nn.Module) -> None:
        error = None
        try:
            if isinstance(message, DiskPlan):
                self._receiver = DiskReceiver(message, self._device)
                self._receiver.check(model)
            else:
                assert self._receiver is not None, "the plan comes first"
                self._receiver.load(model, message)
        except Exception as failure:  # whatever it is, the trainer says it
            traceback.print_exc()
            error = f"{type(failure).__name__}: {failure}"
        try:
            answer(Path(message.folder), self._hello.slot, error)
        except OSError:  # the trainer finds that there is no answer
            traceback.print_exc()

    def close(self) -> None:
        """There is nothing to leave."""


class DiskReceiver:
    """Knows which version the parameters are: changes can be applied to their base alone."""

    def __init__(self, told: DiskPlan, device: torch.device):
        self._told, self._device = told, device
        self._dtype: torch.dtype = getattr(torch, told.dtype)
        self._parameters = EngineParameters(told.matrices)
        self._pieces: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for source, group, *piece in told.pieces:
            self._pieces.setdefault((source, group), []).append(tuple(piece))
        self._sync: int | None = None

    def check(self, model: nn.Module) -> None:
        """ValueError if the model is another one than planned for, see `EngineParameters`."""
        self._parameters.check(model)

    @torch.no_grad()
    def load(self, model: nn.Module, message: DiskLoad) -> None:
        """Read this rank's parts. DamagedError if a file is not what was written, ValueError if it is about
        another base than the parameters are.
        """
        folder = Path(message.folder)
        manifest = read_manifest(folder, message.checksum)
        if manifest.base not in (None, self._sync):
            raise ValueError(f"{folder} has what changed since sync {manifest.base}, here is {self._sync}")
        self._sync = None  # until all of it is there
        matrices = self._parameters.of(model)
        for part in manifest.parts:
            if part.engine_rank == self._told.engine_rank:
                self._apply(part, read_part(folder, manifest, part), matrices)
        if manifest.base is None:
            for parameter, to_row, rows in self._told.padding:
                matrices[parameter][to_row : to_row + rows] = 0
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        self._sync = manifest.sync

    def _apply(self, part: Part, data: bytearray, matrices: list[Tensor]) -> None:
        pieces = self._pieces[part.source, part.group]
        targets = [
            matrices[parameter][to_row : to_row + rows, to_col : to_col + cols]
            for parameter, to_row, to_col, rows, cols in pieces
        ]
        sizes = [rows * cols for _, _, _, rows, cols in pieces]
        if part.whole:
            if len(data) != sum(sizes) * self._dtype.itemsize:
                raise DamagedError(f"{len(data)} bytes are not {sum(sizes)} elements of {self._dtype}")
            flat = torch.frombuffer(data, dtype=self._dtype).to(self._device)
        else:
            flat = torch.cat([target.to(self._dtype).reshape(-1) for target in targets])
            self._change(flat, data)
        values = [value.view(target.shape) for value, target in zip(flat.split(sizes), targets, strict=True)]
        torch._foreach_copy_(targets, values)  # pyright: ignore[reportPrivateImportUsage]

    def _change(self, flat: Tensor, data: bytearray) -> None:
        itemsize = self._dtype.itemsize
        changes = decode(data, len(flat), itemsize)
        integers = flat.view(_INTEGERS[itemsize])

        def moved(array: np.ndarray, dtype: str) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array).view(dtype)).to(self._device)

        signed = f"<i{itemsize}"
        integers.scatter_(0, moved(changes.positions, "<i8"), moved(changes.values, signed))
        for start, values in changes.ranges:
            integers[start : start + len(values)] = moved(values.copy(), signed)
