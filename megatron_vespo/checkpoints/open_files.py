"""Reads byte ranges of many files. Each file is opened when it is first needed."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor


class OpenFiles:
    """Reads into tensors. Safe to use from several threads; a context manager that closes the files."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._stack, self._lock = ExitStack(), Lock()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()
        self._descriptors.clear()

    def read(self, path: Path, offset: int, values: Tensor) -> None:
        """Fill the contiguous `values`. ValueError naming the file if it is too short or cannot be read."""
        left = memoryview(values.view(-1).view(torch.uint8).numpy())
        try:
            while left:
                count = os.preadv(self._descriptor(path), [left], offset)
                if not count:
                    raise ValueError(f"{path} is cut short at byte {offset}")
                left, offset = left[count:], offset + count
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                descriptor = os.open(path, os.O_RDONLY)
                self._stack.callback(os.close, descriptor)
                self._descriptors[path] = descriptor
            return self._descriptors[path]
