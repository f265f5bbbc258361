"""Finds the reward function that --reward-function names."""

from __future__ import annotations

import inspect

from megatron_vespo.rewards.code import CodeReward
from megatron_vespo.rewards.worker import RewardFunction
from megatron_vespo.system.import_path import import_function


def load_reward_function(name: str, code_reward: CodeReward | None = None) -> RewardFunction:
    """Return the reward function named "math" or "code" (built in), or "package.module:function".

    "code" is `code_reward`, or the one with default settings; its sandbox must work on this machine.

    A custom function is called as function(response, answer, metadata), and may be a coroutine function. It
    returns a finite number, or a dict of finite numbers: "reward", and any other names for its parts.

    Raises:
        ValueError: the module or function does not exist, or cannot be called this way.
    """
    if name == "code":
        code_reward = code_reward or CodeReward()
        code_reward.check()
        return code_reward
    path = "megatron_vespo.rewards.math:math_reward" if name == "math" else name
    function = import_function(path, "reward function", builtin='"math", "code"')
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
