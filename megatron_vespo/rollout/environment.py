"""Environments: what answers the policy between the turns of an episode.

    class Guess:                                      # --environment my_module:Guess
        replayable = True

        async def reset(self, prompt):
            self.number = int(prompt.answer)

        async def step(self, text):                   # what the policy wrote in its turn
            if text.strip() == str(self.number):
                return "", 1.0, True
            return "No. Try again.", 0.0, False

Every episode has its own object. All episodes of a run share one event loop, so methods must not block: slow
calculations belong into `asyncio.to_thread` or a process.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple, Protocol, cast

from megatron_vespo.data.turns import Message
from megatron_vespo.system.import_path import import_function
from megatron_vespo.types import Prompt, Writer

ROLES = ("user", "tool", "system")  # of an observation's messages


class Step(NamedTuple):
    """What an environment answers. A plain tuple of three is as good.

    An observation is the text of a user's message, or a list of messages. With `done` it is ignored.
    """

    observation: str | Sequence[Message]
    reward: float | None = None  # None: this step gives none
    done: bool = False


class Environment(Protocol):
    """An episode's partner. Optional: `replayable`, `roles`, `tools`, `reward_data()` and `close()`.

    `replayable = True` says that the same turns always get the same observations. A resumed run then replays
    an unfinished episode and goes on with it. Without it, the episode begins anew. `roles` are the roles of
    observations, ("user",) by default. `tools` are descriptions for the chat template, as JSON schemas.
    `reward_data()` returns JSON values that the reward function finds in its `metadata`.
    """

    async def reset(self, prompt: Prompt) -> None:
        """Begin the episode of `prompt`."""
        ...

    async def step(self, text: str) -> Step | tuple[Any, Any, Any]:
        """Answer the turn whose text, without the stop token, is `text`."""
        ...


def load_environment(import_path: str) -> type[Environment]:
    """Return the class named "package.module:Class"; ValueError if it is not an environment."""
    where = f"--environment {import_path}"
    found = import_function(import_path, "environment", kind="class")
    if not inspect.isclass(found):
        raise ValueError(f"{where}: must be a class, it is a {type(found).__name__}")
    for name, *arguments in (("reset", "prompt"), ("step", "text"), ("close",)):
        method = getattr(found, name, None)
        if method is None and name == "close":
            continue
        if not (inspect.iscoroutinefunction(method) and _takes(method, ["self", *arguments])):
            signature = ", ".join(["self", *arguments])
            raise ValueError(f"{where}: needs a method `async def {name}({signature})`")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
        raise ValueError(f"{where}: is abstract, it leaves out {missing}")
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise ValueError(f"{where}: is made without arguments, but {error}") from error
    if not isinstance(replayable := getattr(found, "replayable", False), bool):
        raise ValueError(f"{where}: replayable = {_short(replayable)}, must be True or False")
    roles = getattr(found, "roles", ("user",))
    if not isinstance(roles, (list, tuple)) or not roles or not {*roles} <= {*ROLES}:
        raise ValueError(f"{where}: roles = {_short(roles)}, must be a tuple of {', '.join(ROLES)}")
    return cast(type[Environment], found)


def tools_of(environment: type[Environment]) -> Sequence[Any] | None:
    """Return what the environment's `tools()` gives; None if it has none.

    ValueError in one line if it cannot be called on the class, or does not return a list.
    """
    if (get := getattr(environment, "tools", None)) is None:
        return None
    where = f"--environment: {environment.__name__}.tools()"
    if not inspect.ismethod(get) and not isinstance(
        inspect.getattr_static(environment, "tools"), staticmethod
    ):
        raise ValueError(f"{where} must be a class method")
    try:
        tools = get()
    except ValueError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise ValueError(f"{where} raised {type(error).__name__}: {error}") from error
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"{where} returned {_short(tools)}, must be a list of JSON schemas")
    return tools


def _takes(method: Callable[..., Any], arguments: Sequence[str]) -> bool:
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError:
        return False
    return True


def messages_of_step(step: Step) -> list[Message]:
    """Return the messages of a step's observation."""
    if isinstance(step.observation, str):
        return [{"role": "user", "content": step.observation}]
    return list(step.observation)


def writer_of(messages: Sequence[Message]) -> Writer:
    """Return who wrote the messages."""
    return "tool" if any(message["role"] == "tool" for message in messages) else "environment"


def checked_step(answer: object) -> Step:
    """Return what `step` has answered as a Step; ValueError says what is wrong with it."""
    if not isinstance(answer, tuple) or len(answer) != 3:
        raise ValueError(f"step must return (observation, reward, done), not {_short(answer)}")
    step = Step(*answer)
    if not isinstance(step.done, bool):
        raise ValueError(f"step returned done = {_short(step.done)}, which must be True or False")
    if step.reward is not None and not (isinstance(step.reward, Real) and _is_finite(step.reward)):
        raise ValueError(f"step returned the reward {_short(step.reward)}, which must be a finite number")
    if not step.done:
        _check_observation(step.observation)
    return step


def _is_finite(number: Real) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int that no float holds
        return False


def _check_observation(observation: object) -> None:
    if isinstance(observation, str):
        return
    if not isinstance(observation, Sequence) or not observation:
        raise ValueError(f"step returned the observation {_short(observation)}, neither text nor messages")
    for message in observation:
        if not (
            isinstance(message, dict)
            and message.get("role") in ROLES
            and isinstance(message.get("content"), str)
        ):
            raise ValueError(
                f"step returned the message {_short(message)}: 'role' must be one of {', '.join(ROLES)}, "
                "'content' text"
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
