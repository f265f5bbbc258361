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
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from megatron_vespo.data.located import located
from megatron_vespo.data.tool_calls import CLOSE_TAG, OPEN_TAG, read_call, tool_calls
from megatron_vespo.data.turns import Message
from megatron_vespo.rollout.environment import Step
from megatron_vespo.types import Prompt

# as Qwen3's template shows it to the model; other families have other formats between the same tags
_FORMAT = re.compile(rf"""{OPEN_TAG}(\\n|\s)*\{{\\?["'](name|arguments)""")
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
        schemas: dict[str, dict[str, Any]] = {}
        for function in cls.functions:
            name = getattr(function, "__name__", None)
            if name is None or name in schemas:
                problem = "two functions have one name" if name else "a tool needs a name, so use def"
                raise ValueError(f"{cls.__name__}.functions has {name or function!r}: {problem}")
            with located(f"{cls.__name__}: the tool {name}"):
                schemas[name] = get_json_schema(function)
        return list(schemas.values())

    @classmethod
    def check_template(cls, template: str) -> None:
        """ValueError if the chat template does not describe this tool format to the model."""
        if _FORMAT.search(template) is None:
            raise ValueError(
                f'{cls.__name__} reads tool calls as {OPEN_TAG}{{"name": ...}}{CLOSE_TAG}, which the chat '
                "template does not show: its model has another tool format, so write an environment for it"
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
        except (Exception, SystemExit) as error:  # a tool may raise anything; the policy learns from it
            self.num_failed_calls += 1
            return _as_text(f"Error: {type(error).__name__}: {error}")


async def _in_thread(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call a function that may block.

    Its thread is a daemon. The threads of asyncio.to_thread are not: one that never returns would keep the
    program from ending.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not done.done():  # else nobody waits any more
            done.set_result((result, error))  # not every exception may be a future's

    def main() -> None:
        result, failure = None, None
        try:
            result = function(**arguments)
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=main, name=f"tool {function.__name__}", daemon=True).start()
    result, error = await done
    if error is not None:
        raise error
    return result


def _as_text(result: Any) -> str:
    text = result if isinstance(result, str) else json.dumps(result, default=str, ensure_ascii=False)
    text = text.encode(errors="replace").decode()  # half of a surrogate pair is no text
    return text if len(text) <= _MAX_RESULT_CHARS else text[:_MAX_RESULT_CHARS] + " ..."
