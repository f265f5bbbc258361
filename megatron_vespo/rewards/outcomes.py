"""What a worker process answers for a response: the fields of a RewardResult. Imports only the stdlib."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Mapping
from typing import Any

OUT_OF_MEMORY_STATUS = 77  # exit status of a worker whose function ran out of memory
_FLOAT32_MAX = 2.0**128 - 2.0**104  # advantages are stored as float32


class _WrongRewardError(Exception):
    """What the function returned is no reward; says why in one line."""


def reward_outcome(returned: Any) -> tuple:
    """Return the outcome of a call that returned; raises what `failure_outcome` takes if it is no reward."""
    if not isinstance(returned, Mapping):
        return _number(returned, ""), "ok", ""
    if "reward" not in returned:
        names = ", ".join(map(repr, returned)) or "nothing"
        raise _WrongRewardError(f"the reward function returned a dict with {names}, but without 'reward'")
    for name in returned:
        if not isinstance(name, str) or not name:
            raise _WrongRewardError(f"the reward function returned a dict with the key {name!r}, not a name")
    parts = {name: _number(value, f" as {name!r}") for name, value in returned.items()}
    return parts.pop("reward"), "ok", "", parts


def failure_outcome(error: BaseException) -> tuple:
    """Return the outcome of a call that raised. If memory is out, end the process instead."""
    if isinstance(error, MemoryError):
        os._exit(OUT_OF_MEMORY_STATUS)  # earlier items may have filled the memory: start a new process
    return 0.0, "error", describe(error)


def timeout_outcome(timeout_s: float, why: str = "") -> tuple:
    """Return the outcome of a call that is late."""
    return 0.0, "timeout", f"no reward within {timeout_s:g} s{f': {why}' if why else ''}"


def describe(error: BaseException) -> str:
    """Return the error as one line."""
    name = "" if isinstance(error, _WrongRewardError) else f"{type(error).__name__}: "
    return " ".join(f"{name}{error}".split())[:300]


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
