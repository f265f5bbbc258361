"""Runs inside a reward worker process; imports only the stdlib and what the reward function imports."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import pickle
import resource
import signal
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

RewardFunction = Callable[[str, str, dict], Any]  # of response, answer and metadata

OUT_OF_MEMORY_STATUS = 77  # exit status of a worker whose function ran out of memory
_ORPHAN_GRACE_S = 2.0
_FLOAT32_MAX = 2.0**128 - 2.0**104  # advantages are stored as float32


def worker_main(fd: int) -> None:
    """Main function of a worker process: load the reward function, then answer every item of every chunk."""
    os.set_inheritable(fd, False)
    # If the parent is killed, a hanging worker never sees its pipe end: the kernel's alarm ends it instead.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    connection = Connection(fd)
    try:
        setup, timeout_s, memory_gb = pickle.loads(connection.recv_bytes())
        if math.isfinite(memory_gb):
            _limit_memory(int(memory_gb * 2**30))
        function = pickle.loads(setup)
    except Exception as error:  # importing a custom module may raise anything; the parent reports it
        connection.send(_describe(error))
        return
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(None)
        while True:
            for response, answer, metadata in connection.recv():
                connection.send(_call(function, response, answer, metadata, timeout_s + _ORPHAN_GRACE_S))


def _limit_memory(num_bytes: int) -> None:
    """Limit the writable memory of the process; RLIMIT_AS would also count libraries and reservations."""
    _, allowed = resource.getrlimit(resource.RLIMIT_DATA)
    limit = num_bytes if allowed == resource.RLIM_INFINITY else min(num_bytes, allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _call(function: RewardFunction, response: str, answer: str, metadata: dict, alarm_s: float) -> tuple:
    """Score one response and return the fields of a RewardResult."""
    signal.setitimer(signal.ITIMER_REAL, alarm_s)
    try:
        return _ok(function(response, answer, metadata))
    except MemoryError:
        os._exit(OUT_OF_MEMORY_STATUS)  # earlier items may have filled the memory: start a new process
    except Exception as error:  # a custom function may raise anything, and one item must not end the run
        return 0.0, "error", _describe(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


class _WrongRewardError(Exception):
    """What the function returned is no reward; says why in one line."""


def _ok(returned: Any) -> tuple:
    """Return the fields of the RewardResult of what a reward function returned."""
    if not isinstance(returned, Mapping):
        return _number(returned, ""), "ok", ""
    if "reward" not in returned:
        names = ", ".join(map(repr, returned)) or "nothing"
        raise _WrongRewardError(f"the reward function returned a dict with {names}, but without 'reward'")
    for name in returned:
        if not isinstance(name, str) or not name:
            raise _WrongRewardError(f"the reward function returned a dict with the key {name!r}, not a name")
    found = {name: _number(value, f" as {name!r}") for name, value in returned.items()}
    return found.pop("reward"), "ok", "", found


def _number(value: Any, role: str) -> float:
    """Return `value` as a float; `role` says in an error what it was returned as."""
    value = _scalar(value)
    said = "the reward function returned"
    if not isinstance(value, numbers.Real):
        raise _WrongRewardError(f"{said} a {type(value).__name__}{role}, not a number")
    if not math.isfinite(value):
        raise _WrongRewardError(f"{said} {value}{role}")
    if abs(value) > _FLOAT32_MAX:  # pyright: ignore[reportOperatorIssue]
        raise _WrongRewardError(f"{said} {value:g}{role}, more than a float32 can hold")
    return float(value)


def _scalar(reward: Any) -> Any:
    """Return the Python number of a numpy or torch scalar, or of an array or tensor without dimensions."""
    return reward.item() if getattr(reward, "shape", None) == () and hasattr(reward, "item") else reward


def _describe(error: BaseException) -> str:
    name = "" if isinstance(error, _WrongRewardError) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())[:300]
