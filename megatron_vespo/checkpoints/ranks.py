"""Connects the processes that convert together: one, or all that torchrun or srun started."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from megatron_vespo.system.slurm_step import current_step, first_host, number_of

T = TypeVar("T")
_TIMEOUT = timedelta(hours=12)  # one rank may copy for hours while another is done
_PORT = 29511


class Ranks:
    """This process among `size`. A single process sends nothing."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """The results of `work` on all ranks. A failure on one rank fails all, so no rank waits forever."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # any failure: the other ranks wait for the outcome
            failure = error
        theirs = isinstance(failure, ValueError | OSError)  # caused by data or disk, not by a bug
        failures = self.gather(None if failure is None else (theirs, str(failure)))
        if failure is not None:
            raise failure
        for rank, other in enumerate(failures):
            if other is not None:
                theirs, text = other
                raise (ValueError if theirs else RuntimeError)(f"rank {rank}: {text}")
        return self.gather(cast(T, result))

    def on_first(self, work: Callable[[], T]) -> T:
        """Only rank 0 calls `work`. All ranks get its result, or fail with it."""
        return cast(T, self.together(lambda: work() if self.rank == 0 else None)[0])


@contextmanager
def joined_ranks():
    """The ranks that the environment describes, connected by gloo."""
    rank, size = _from_environment()
    if size == 1:
        yield Ranks()
        return
    os.environ.setdefault("MASTER_ADDR", _first_host())
    os.environ.setdefault("MASTER_PORT", str(_PORT))
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        yield Ranks(rank, size)
    finally:
        dist.destroy_process_group()


def _from_environment() -> tuple[int, int]:
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size = (number_of(os.environ, name) for name in ("RANK", "WORLD_SIZE"))
        if rank >= size:
            raise ValueError(f"environment variables RANK {rank} and WORLD_SIZE {size}: ranks begin with 0")
        return rank, size
    step = current_step()
    return (0, 1) if step is None else (step.rank, step.size)


def _first_host() -> str:
    step = current_step()
    return "127.0.0.1" if step is None else first_host(step.nodes)
