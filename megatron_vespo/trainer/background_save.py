"""Runs Megatron's asynchronous save with one writer thread per rank.

Megatron puts every asynchronous save into a queue. It stages the tensors in host memory, and a writer writes
them. When all ranks have written, the save is finished: index first, then tracker. Megatron's own writer is
a process that lives as long as the rank. A thread has three advantages:

* It works without CUDA. The process would receive CPU tensors as shared memory, which the next optimizer
  steps keep changing.
* It ends with its rank, however that ends. When a run resumes, nothing still writes into a checkpoint.
* It needs no second interpreter, with its memory, per rank. It needs no server process for its results,
  which would outlive a killed rank.

The thread holds the GIL only between writes: the bytes of a tensor are copied and written without it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import (
    AsyncCaller,
    AsyncCallsQueue,
    AsyncRequest,
)
from megatron.training import async_utils

from megatron_vespo.trainer.initialize import device

POLL_S = 0.02


class SaveQueue(AsyncCallsQueue):
    """Megatron's queue, installed as the one that Megatron uses. It holds at most one save.

    `admit(bytes)` is called with the bytes that all ranks together will write. It may raise, on all ranks.
    `before_finish()` is called when all ranks have written.
    """

    def __init__(self, background: bool, admit: Callable[[int], None], before_finish: Callable[[], None]):
        super().__init__()
        self._background, self._admit, self._before_finish = background, admit, before_finish
        # Megatron starts a server process for the results; here writer and reader are threads of one process
        filesystem_async._results_queue = queue.Queue()
        async_utils._async_calls_queue = self

    def schedule_async_request(self, async_request: AsyncRequest) -> int:
        total = torch.tensor([_num_bytes(async_request)], dtype=torch.int64, device=device())
        dist.all_reduce(total)
        self._admit(int(total))
        async_request.finalize_fns.insert(0, self._before_finish)
        return super().schedule_async_request(async_request)

    def _get_async_caller(self) -> AsyncCaller:
        return ThreadCaller(self._background)


class ThreadCaller(AsyncCaller):
    """Writes one request. With `background` it first copies the tensors that training will change."""

    def __init__(self, background: bool):
        self._background = background
        self._thread: threading.Thread | None = None  # None if the rank has nothing to write

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        if async_req.async_fn is None:
            return
        arguments = list(async_req.async_fn_args)
        if async_req.preload_fn is not None:
            staged = async_req.preload_fn()
            arguments[1] = _detached(staged, arguments[1]) if self._background else staged
        self._thread = threading.Thread(
            target=async_req.async_fn, args=arguments, kwargs=async_req.async_fn_kwargs, daemon=True
        )
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        if blocking and self._thread is not None:
            while self._thread.is_alive():
                time.sleep(POLL_S)  # a join could not be interrupted
        writing = self._thread is not None and self._thread.is_alive()
        return self.sync_all_async_calls(int(writing))

    def close(self, abort: bool = False) -> None:
        """The thread ends by itself."""

    def __del__(self) -> None:
        pass


def _detached(staged: list, live: list) -> list:
    """The staged buckets, with a copy of every tensor that staging did not copy: it was on the host."""
    detached = []
    for (path, key, (contents, tensors)), (_, _, (_, originals)) in zip(staged, live, strict=True):
        copies = [
            (item, tensor.clone() if tensor.data_ptr() == original.data_ptr() else tensor)
            for (item, tensor), (_, original) in zip(tensors, originals, strict=True)
        ]
        detached.append((path, key, (contents, copies)))
    return detached


def _num_bytes(request: AsyncRequest) -> int:
    """The number of bytes that this rank will write."""
    buckets = request.async_fn_args[1] if request.async_fn is not None else []
    return sum(
        sum(content.getbuffer().nbytes for _, content in contents)
        + sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
        for _, _, (contents, tensors) in buckets
    )
