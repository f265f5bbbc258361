"""What an item is given, and how it measures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# numbers, texts, or tables of them, as JSON holds them
Figures = dict[str, object]


class Skip(Exception):
    """This machine cannot run the item; says why."""


@dataclass(frozen=True)
class Context:
    device: str  # "cuda", or "cpu" with small sizes, which proves the item but measures nothing
    folder: Path  # shared by all items of a run: what one has made, another finds

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def size(self, on_gpu, on_cpu):
        return on_gpu if self.on_gpu else on_cpu

    def milliseconds(self, function: Callable[[], object], runs: int = 10) -> float:
        """Median of `runs` runs after two for warming up."""
        import torch

        times = []
        for index in range(2 + runs):
            if self.on_gpu:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                function()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                began = time.perf_counter()
                function()
                elapsed = 1e3 * (time.perf_counter() - began)
            if index >= 2:
                times.append(elapsed)
        return statistics.median(times)


def gigabytes_per_second(num_bytes: float, milliseconds: float) -> float:
    return round(num_bytes / milliseconds / 1e6, 1)


def teraflops(operations: float, milliseconds: float) -> float:
    return round(operations / milliseconds / 1e9, 1)
