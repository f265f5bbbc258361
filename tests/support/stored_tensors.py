"""A checkpoint in memory."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, uint8

from megatron_vespo.checkpoints.safetensors_file import TensorInfo


class StoredTensors:
    """A reader of these tensors. It does not write the last `left_out` bytes of what it is asked for."""

    folder = Path("memory")

    def __init__(self, values: dict[str, Tensor], left_out: int = 0):
        self.values, self._left_out = values, left_out
        self.tensors = {name: TensorInfo(value.dtype, tuple(value.shape)) for name, value in values.items()}
        self.most_rows = 0  # that were asked for at a time

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        self.most_rows = max(self.most_rows, stop - start)
        content = self.values[name][start:stop].contiguous().view(-1).view(uint8)
        end = len(content) - self._left_out
        out[:end] = content[:end]
