"""Runs inside a reward worker process; imports only the stdlib and what the reward function imports."""

from __future__ import annotations

import contextlib
import inspect
import math
import mmap
import os
import pickle
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from megatron_vespo.rewards.coroutines import Coroutines
from megatron_vespo.rewards.outcomes import describe, failure_outcome, reward_outcome

RewardFunction = Callable[[str, str, dict], Any]  # of response, answer and metadata

BOARD_BYTES = 8  # shared memory with the index of the item whose code runs
_ORPHAN_GRACE_S = 2.0


def is_async(function: RewardFunction) -> bool:
    """Return whether `function` gives coroutines."""
    return any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", None))))  # noqa: B004


def worker_main(fd: int, board_fd: int) -> None:
    """Main function of a worker process: load the reward function, then answer every item of every chunk."""
    os.set_inheritable(fd, False)
    board = mmap.mmap(board_fd, BOARD_BYTES)
    os.close(board_fd)
    # If the parent is killed, a hanging worker never sees its pipe end: the kernel's alarm ends it instead.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    connection = Connection(fd)
    try:
        setup, timeout_s, memory_gb = pickle.loads(connection.recv_bytes())
        if math.isfinite(memory_gb):
            _limit_memory(int(memory_gb * 2**30))
        function = pickle.loads(setup)
    except Exception as error:  # importing a custom module may raise anything; the parent reports it
        connection.send(describe(error))
        return

    def show(index: int) -> None:
        board[:] = index.to_bytes(BOARD_BYTES)

    alarm_s = timeout_s + _ORPHAN_GRACE_S
    coroutines = Coroutines(function, timeout_s, alarm_s, show) if is_async(function) else None
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(None)
        while True:
            chunk = connection.recv()
            if coroutines is not None:
                coroutines.answer(chunk, connection.send)
                continue
            for index, item in chunk:
                show(index)
                connection.send((index, _call(function, item, alarm_s)))


def _limit_memory(num_bytes: int) -> None:
    """Limit the writable memory of the process; RLIMIT_AS would also count libraries and reservations."""
    _, allowed = resource.getrlimit(resource.RLIMIT_DATA)
    limit = num_bytes if allowed == resource.RLIM_INFINITY else min(num_bytes, allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _call(function: RewardFunction, item: tuple[str, str, dict], alarm_s: float) -> tuple:
    """Score one item."""
    signal.setitimer(signal.ITIMER_REAL, alarm_s)
    try:
        return reward_outcome(function(*item))
    except Exception as error:  # a custom function may raise anything, and one item must not end the run
        return failure_outcome(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
