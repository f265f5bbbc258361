"""Calls Python functions for the policy, in the tool format of Qwen3 (also known as Hermes).

    class Calculator(ToolEnvironment):
        functions = (add, multiply)

The functions' descriptions go into the prompt, through the chat template's `tools`. The policy writes

    <tool_call>
    {"name": "multiply", "arguments": {"a": 17, "b": 3}}
    </tool_call>

in its turn, once or several times. Each result becomes a message of role "tool". A turn without a call ends
the episode.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from megatron_vespo.data.located import located
from megatron_vespo.data.tool_calls import OPEN_TAG, read_call, tool_calls
from megatron_vespo.data.turns import Message
from megatron_vespo.rollout.environment import Step
from megatron_vespo.types import Prompt

_MAX_RESULT_CHARS = 4096


class ToolEnvironment:
    """Base class of environments whose steps are calls of `functions`.

    A function has type hints and a docstring with an Args section in Google's style: from these, transformers
    makes its description. It may be a coroutine function. Other functions run in a thread each, because they
    may block. What a function raises is told to the policy, as is a call that cannot be read.

    Set `replayable = True` if the functions always return the same and change nothing.
    """

    functions: ClassVar[Sequence[Callable[..., Any]]] = ()
    replayable: ClassVar[bool] = False
    roles: ClassVar[Sequence[str]] = ("tool",)

    def __init__(self) -> None:
        self.num_calls = self.num_failed_calls = 0
        self._by_name = {function.__name__: function for function in self.functions}

    @classmethod
    def tools(cls) -> list[dict[str, Any]]:
        """Return the functions' JSON schemas; ValueError names a function without hints or docstring."""
        from transformers.utils.chat_template_utils import get_json_schema

        if not cls.functions:
            raise ValueError(f"{cls.__name__}.functions is empty: a tool environment needs functions")
        schemas = []
        for function in cls.functions:
            with located(f"{cls.__name__}: the tool {function.__name__}"):
                schemas.append(get_json_schema(function))
        return schemas

    @classmethod
    def check_template(cls, template: str) -> None:
        """ValueError if the chat template does not describe this tool format to the model."""
        if OPEN_TAG not in template:
            raise ValueError(
                f"{cls.__name__} reads tool calls as {OPEN_TAG}, which the chat template does not know: its "
                "model has another tool format, so write an environment for it"
            )

    async def reset(self, prompt: Prompt) -> None:
        """Begin an episode; subclasses may keep the prompt."""

    async def step(self, text: str) -> Step:
        """Make the calls in `text` and return their results, in their order."""
        calls = tool_calls(text)
        if not calls:
            return Step("", None, done=True)
        results = await asyncio.gather(*(self._result(call) for call in calls))
        self.num_calls += len(calls)
        messages: list[Message] = [{"role": "tool", "content": result} for result in results]
        return Step(messages, None, done=False)

    def reward_data(self) -> dict[str, Any]:
        """Return how many calls were made and how many of them failed."""
        return {"tool_calls": self.num_calls, "failed_tool_calls": self.num_failed_calls}

    async def _result(self, call: str) -> str:
        try:
            name, arguments = read_call(call)
            function = self._by_name.get(name)
            if function is None:
                raise ValueError(f"there is no tool {name!r}; there are {', '.join(self._by_name)}")
            inspect.signature(function).bind(**arguments)
            if inspect.iscoroutinefunction(function):
                result = await function(**arguments)
            else:
                result = await _in_thread(function, arguments)
            return _as_text(result)
        except Exception as error:  # a tool may raise anything; the policy learns from it
            self.num_failed_calls += 1
            return f"Error: {type(error).__name__}: {error}"[:_MAX_RESULT_CHARS]


async def _in_thread(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call a function that may block.

    Its thread is a daemon. The threads of asyncio.to_thread are not: one that never returns would keep the
    program from ending.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if done.done():  # nobody waits any more
            return
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)

    def main() -> None:
        result, failure = None, None
        try:
            result = function(**arguments)
        except Exception as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=main, name=f"tool {function.__name__}", daemon=True).start()
    return await done


def _as_text(result: Any) -> str:
    text = result if isinstance(result, str) else json.dumps(result, default=str)
    return text if len(text) <= _MAX_RESULT_CHARS else text[:_MAX_RESULT_CHARS] + " ..."
