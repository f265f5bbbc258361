"""Runs an asynchronous reward function inside a worker process: many responses at once in one event loop."""

from __future__ import annotations

import asyncio
import signal
import types
from collections.abc import Callable, Coroutine, Generator, Sequence
from functools import partial
from typing import Any

from megatron_vespo.rewards.outcomes import failure_outcome, reward_outcome, timeout_outcome

MAX_CONCURRENT = 64  # responses in work per worker
_ALARM_INTERVAL_S = 1.0

Item = tuple[str, str, dict]  # response, answer, metadata


class Coroutines:
    """Scores chunks with `function`, each response within `timeout_s` seconds.

    Before each step of a response's coroutine, `show` is called with its index. So if its code blocks the
    event loop, the parent process knows which response it is. The kernel ends a process whose loop is blocked
    for `alarm_s` seconds, also when the parent is gone.
    """

    def __init__(
        self,
        function: Callable[[str, str, dict], Coroutine[Any, Any, Any]],
        timeout_s: float,
        alarm_s: float,
        show: Callable[[int], None],
    ):
        self._function, self._timeout_s, self._alarm_s, self._show = function, timeout_s, alarm_s, show
        self._runner = asyncio.Runner()  # one loop for all chunks, so that a function may keep connections

    def answer(self, chunk: Sequence[tuple[int, Item]], send: Callable[[tuple], None]) -> None:
        """Score (index, item) pairs; `send` gets (index, outcome) as soon as there is one."""
        try:
            self._runner.run(self._answer(chunk, send))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    async def _answer(self, chunk: Sequence[tuple[int, Item]], send: Callable[[tuple], None]) -> None:
        places = asyncio.Semaphore(MAX_CONCURRENT)

        async def answer(index: int, item: Item) -> None:
            async with places:
                send((index, await self._outcome(index, item)))

        alarm = asyncio.create_task(self._hold_off_alarm())
        try:
            await asyncio.gather(*(answer(index, item) for index, item in chunk))
        finally:
            alarm.cancel()

    async def _outcome(self, index: int, item: Item) -> tuple:
        deadline = asyncio.timeout(self._timeout_s)
        try:
            async with deadline:
                return reward_outcome(await _shown(self._function(*item), partial(self._before_step, index)))
        except (Exception, asyncio.CancelledError) as error:  # a custom function may raise anything
            if deadline.expired():
                return timeout_outcome(self._timeout_s, str(error))
            return failure_outcome(error)

    def _before_step(self, index: int) -> None:
        self._show(index)
        signal.setitimer(signal.ITIMER_REAL, self._alarm_s)

    async def _hold_off_alarm(self) -> None:
        """Between steps, while all wait."""
        while True:
            signal.setitimer(signal.ITIMER_REAL, self._alarm_s)
            await asyncio.sleep(_ALARM_INTERVAL_S)


@types.coroutine
def _shown(coroutine: Coroutine[Any, Any, Any], show: Callable[[], None]) -> Generator[Any, Any, Any]:
    """Run `coroutine`; `show` is called before each of its steps."""
    step = partial(coroutine.send, None)
    while True:
        show()
        try:
            awaited = step()
        except StopIteration as end:
            return end.value
        try:
            step = partial(coroutine.send, (yield awaited))
        except BaseException as error:  # a cancellation: the coroutine's to handle
            step = partial(coroutine.throw, error)
