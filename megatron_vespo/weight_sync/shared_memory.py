"""Memory that another process of the same user opens by a path. It ends with the last process that has it.

A memfd instead of a file in /dev/shm: nothing is left behind by a process that is killed, and /dev/shm of a
container, often 64 MiB, does not bound it.
"""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor


class SharedMemory:
    """`size` bytes, zero at first; `path` is valid while this process keeps them."""

    def __init__(self, size: int):
        self._descriptor = os.memfd_create("megatron_vespo weights", os.MFD_CLOEXEC)
        os.ftruncate(self._descriptor, size)
        self._map = mmap.mmap(self._descriptor, size)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def close(self) -> None:
        """Forget the path. The memory goes with the last tensor that shows it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def opened(path: str) -> Tensor:
    """Another process's memory, uint8 [size]; stays after that process has ended."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
    finally:
        os.close(descriptor)
