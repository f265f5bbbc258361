"""Finds the reward function that --reward-function names."""

from __future__ import annotations

import inspect

from megatron_vespo.rewards.code import CodeReward
from megatron_vespo.rewards.worker import RewardFunction
from megatron_vespo.system.import_path import import_function

ENVIRONMENT = "environment"  # its rewards count, and nothing is called


def load_rewards(name: str, code_reward: CodeReward | None = None) -> RewardFunction | None:
    """Return the reward function, see `load_reward_function`; None if the environment gives the rewards."""
    return None if name == ENVIRONMENT else load_reward_function(name, code_reward)


def reward_remarks(function: RewardFunction | None) -> list[str]:
    """Return log lines about what may go wrong with the reward function."""
    unreachable = getattr(function, "unreachable", None)  # only an endpoint's function has it
    problem = unreachable() if unreachable is not None else None
    return [problem] if problem else []


def load_reward_function(name: str, code_reward: CodeReward | None = None) -> RewardFunction:
    """Return the reward function named "math" or "code" (built in), "package.module:function", or a URL.

    "code" is `code_reward`, or the one with default settings; its sandbox must work on this machine.

    A custom function is called as function(response, answer, metadata), and may be a coroutine function. It
    returns a finite number, or a dict of finite numbers: "reward", and any other names for its parts.

    Raises:
        ValueError: the module or function does not exist, or cannot be called this way; a wrong URL.
    """
    if name == "code":
        code_reward = code_reward or CodeReward()
        code_reward.check()
        return code_reward
    if name.startswith(("http:", "https:")):
        from megatron_vespo.rewards.http import HttpReward  # aiohttp, which a trainer's rank can do without

        return HttpReward(name)
    path = "megatron_vespo.rewards.math:math_reward" if name == "math" else name
    function = import_function(path, "reward function", builtin='"math", "code", "environment", a URL')
    _check_signature(function, f"reward function {name!r}")
    return function


def _check_signature(function: RewardFunction, where: str) -> None:
    right = "it is called as function(response, answer, metadata) and returns a float or a dict"
    if inspect.isclass(function):
        raise ValueError(f"{where}: is a class, not a function; {right}")
    try:
        signature = inspect.signature(function)
    except ValueError:
        return  # a function written in C may have no signature
    try:
        signature.bind("response", "answer", {})
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"{where}: {name}{signature} does not fit ({error}); {right}") from error
