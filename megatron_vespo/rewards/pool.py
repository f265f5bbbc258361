"""Runs reward functions in killable worker processes, with a deadline for every response.

A hanging reward function cannot be interrupted from within (sympy and regular expressions stay in C). So each
worker is a process that reports results one by one. If it is late or dies, only its current response is lost.
An asynchronous function works on many responses at once; the current one is that whose code ran last.

Workers start as fresh interpreters. Forking a parent with threads, gRPC or CUDA is unsafe. With spawn and
forkserver of multiprocessing, every worker would import the parent's main program again, including torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe, wait
from typing import Literal

from megatron_vespo.rewards.outcomes import OUT_OF_MEMORY_STATUS
from megatron_vespo.rewards.worker import BOARD_BYTES, RewardFunction, is_async
from megatron_vespo.system.time_limits import IMPORT_TIMEOUT_S

_START_DEADLINE_S = IMPORT_TIMEOUT_S  # time to import the function's module, e.g. with sympy
_STOP_DEADLINE_S = 10.0
_MAX_CHUNK = 32
_MAX_ASYNC_CHUNK = 512  # more than are in work at once: a slow response then holds up fewer others
_ASYNC_BATCHES = 32  # while one runs, the others become the next one
_ASYNC_MARGIN_S = 1.0  # a worker answers itself for coroutines that are late
_WORKER_COMMAND = """
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from megatron_vespo.system.import_path import import_function
from megatron_vespo.rewards.worker import worker_main
worker_main(int(sys.argv[1]), int(sys.argv[3]))
"""


@dataclass(frozen=True)
class RewardItem:
    """One response to score."""

    response: str  # what the policy wrote in its last turn
    answer: str
    metadata: dict  # the row's, and the conversation's
    ended: bool  # False if the length limit cut the response: its reward is 0.0


@dataclass(frozen=True)
class RewardResult:
    """One score. `value` is 0.0 unless status is "ok"; `detail` describes the error."""

    value: float
    status: Literal["ok", "timeout", "error"]
    detail: str
    parts: Mapping[str, float] = field(default_factory=dict)  # what the function names beside the reward


class RewardPool:
    """`num_workers` processes that score responses with one function, each within `timeout_s` seconds.

    Each worker, and each process that it starts, may use `memory_gb` GiB.

    Raises:
        ValueError: another process cannot import the function by name (a lambda, or a function of __main__).
    """

    def __init__(
        self, function: RewardFunction, num_workers: int, timeout_s: float, memory_gb: float = math.inf
    ) -> None:
        assert num_workers >= 1 and timeout_s > 0 and memory_gb > 0, (num_workers, timeout_s, memory_gb)
        self._setup = _pickle_setup(function, timeout_s, memory_gb)
        self._timeout_s, self._is_async = timeout_s, is_async(function)
        self._lock = threading.Lock()  # of the workers
        self._waiting: deque[_Request] = deque()
        self._workers = [_Worker(self._setup) for _ in range(num_workers)]
        self.close = weakref.finalize(self, _stop_all, self._workers)  # at interpreter exit at the latest

    @property
    def batches_at_once(self) -> int:
        """How many calls of `score` at once keep the workers busy."""
        return _ASYNC_BATCHES if self._is_async else 1

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Score the items and return results in the same order.

        Thread-safe. What several threads ask for while a batch runs becomes the next batch.

        Raises:
            RuntimeError: the pool is closed, or a worker cannot start.
        """
        if not self.close.alive:
            raise RuntimeError("the reward pool is closed")
        request = _Request(items)
        self._waiting.append(request)
        with self._lock:
            if not request.is_done:
                self._serve([self._waiting.popleft() for _ in range(len(self._waiting))])
        if request.error is not None:
            raise request.error
        return request.results

    def _serve(self, requests: list[_Request]) -> None:
        items = [item for request in requests for item in request.items]
        try:
            batch = _Batch(items, self._workers, self._setup, self._timeout_s, self._is_async)
            results = iter(batch.run())
            for request in requests:
                request.results = [next(results) for _ in request.items]
        except BaseException as error:
            for request in requests:
                request.error = error
        finally:
            for request in requests:
                request.is_done = True


@dataclass
class _Request:
    """One call of RewardPool.score."""

    items: Sequence[RewardItem]
    results: list[RewardResult] = field(default_factory=list)
    error: BaseException | None = None
    is_done: bool = False


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, setup: bytes) -> None:
        self.connection, child = Pipe()
        board = os.memfd_create("reward-worker")
        try:
            os.ftruncate(board, BOARD_BYTES)
            self.board = mmap.mmap(board, BOARD_BYTES)
            arguments = [str(child.fileno()), json.dumps(_absolute_sys_path()), str(board)]
            self.process = subprocess.Popen(
                [sys.executable, "-c", _WORKER_COMMAND, *arguments],
                pass_fds=(child.fileno(), board),
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # killed as a group, with processes that a custom function started
            )
        finally:
            child.close()
            os.close(board)
        self.connection.send_bytes(setup)
        self.started = False
        self.assigned: list[int] = []  # indices of items sent but not answered yet, in order
        self.deadline = time.monotonic() + _START_DEADLINE_S

    @property
    def is_awaited(self) -> bool:
        return bool(self.assigned) or not self.started

    def current(self) -> int:
        """Return the assigned item whose code runs, or ran last."""
        shown = int.from_bytes(self.board[:])
        return shown if shown in self.assigned else self.assigned[0]

    def kill(self) -> None:
        self.connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=_STOP_DEADLINE_S)
        self.board.close()

    def exit_status(self) -> int | None:
        """Return the exit status of a process whose connection has ended; None if it is still alive."""
        try:
            return self.process.wait(timeout=_STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            return None


class _Batch:
    """One call of RewardPool.score: deals items out to workers and replaces those that hang or die."""

    def __init__(
        self,
        items: Sequence[RewardItem],
        workers: list[_Worker],
        setup: bytes,
        timeout_s: float,
        is_async: bool,
    ) -> None:
        self.items = items
        self.workers = workers
        self.setup = setup
        self.timeout_s = timeout_s
        # The deadline runs from the last answer on. Coroutines that begin together end within one time-out.
        self.patience_s = timeout_s + (_ASYNC_MARGIN_S if is_async else 0.0)
        self.results = [RewardResult(0.0, "ok", "the response did not end")] * len(items)
        self.queue = deque(index for index, item in enumerate(items) if item.ended)
        if is_async:  # as many at once as possible: they wait for others
            self.chunk = min(_MAX_ASYNC_CHUNK, -(-len(self.queue) // len(workers)))
        else:  # small enough that the last chunks finish together, large enough that pipes do not dominate
            self.chunk = max(1, min(_MAX_CHUNK, len(self.queue) // (4 * len(workers))))

    def run(self) -> list[RewardResult]:
        try:
            while self.queue or any(worker.assigned for worker in self.workers):
                for slot, worker in enumerate(self.workers):
                    if self.queue and not worker.is_awaited:
                        self.assign(slot)
                self.collect()
        finally:
            # After an exception, a worker may still be busy: its answers must not reach the next batch.
            for slot, worker in enumerate(self.workers):
                if worker.assigned:
                    self.replace(slot)
        return self.results

    def assign(self, slot: int) -> None:
        worker = self.workers[slot]
        indices = [self.queue.popleft() for _ in range(min(self.chunk, len(self.queue)))]
        items = [(index, self.items[index]) for index in indices]
        try:
            worker.connection.send(
                [(index, (item.response, item.answer, item.metadata)) for index, item in items]
            )
        except ConnectionError:  # it died while idle, for example by the machine's out-of-memory killer
            self.queue.extendleft(reversed(indices))
            self.replace(slot)
            return
        worker.assigned.extend(indices)
        worker.deadline = time.monotonic() + self.patience_s

    def collect(self) -> None:
        """Wait for the next answers or the next deadline, whichever comes first."""
        awaited = [worker for worker in self.workers if worker.is_awaited]
        if not awaited:
            return
        next_deadline = min(worker.deadline for worker in awaited)
        ready = wait([worker.connection for worker in awaited], max(0.0, next_deadline - time.monotonic()))
        now = time.monotonic()
        for slot, worker in enumerate(self.workers):
            if worker.connection in ready:
                self.receive(slot)
            elif worker.is_awaited and now >= worker.deadline and not worker.connection.poll():
                self.lose(slot, "timeout", f"no reward within {self.timeout_s:g} s")

    def receive(self, slot: int) -> None:
        worker = self.workers[slot]
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionError):
            exit_status = worker.exit_status()
            if exit_status == -signal.SIGALRM:
                self.lose(slot, "timeout", f"no reward within {self.timeout_s:g} s")
            elif exit_status == OUT_OF_MEMORY_STATUS:
                self.lose(slot, "error", "the reward function ran out of memory, see --reward-memory-gb")
            else:
                self.lose(slot, "error", f"the reward function ended its process, exit status {exit_status}")
            return
        if worker.started:
            index, result = message
            worker.assigned.remove(index)
            self.results[index] = RewardResult(*result)
            worker.deadline = time.monotonic() + self.patience_s
        elif message is None:
            worker.started = True
        else:
            raise RuntimeError(f"a reward worker cannot load the reward function: {message}")

    def lose(self, slot: int, status: Literal["timeout", "error"], detail: str) -> None:
        """Fail the current item, return the others to the queue, and replace the worker."""
        worker = self.workers[slot]
        if not worker.started:
            why = detail if status == "error" else f"not ready after {_START_DEADLINE_S:g} s"
            raise RuntimeError(f"a reward worker did not start: {why}")
        current = worker.current()
        worker.assigned.remove(current)
        self.results[current] = RewardResult(0.0, status, detail)
        self.queue.extendleft(reversed(worker.assigned))
        self.replace(slot)

    def replace(self, slot: int) -> None:
        self.workers[slot].kill()
        self.workers[slot] = _Worker(self.setup)


def _pickle_setup(function: RewardFunction, timeout_s: float, memory_gb: float) -> bytes:
    if getattr(function, "__module__", None) == "__main__":
        raise ValueError("the reward function is defined in the main program: move it to a module of its own")
    try:
        return pickle.dumps((pickle.dumps(function), timeout_s, memory_gb))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(f"the reward function must be defined at the top of a module: {error}") from error


def _absolute_sys_path() -> list[str]:
    return [os.path.abspath(path) for path in sys.path]  # "" means the current folder


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.kill()
