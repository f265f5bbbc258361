"""Generation in the background: a thread keeps as many groups in flight as may still be trained on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron_vespo.http import EngineRequestError
from megatron_vespo.rollout.buffer import Group, RolloutBuffer, Ticket
from megatron_vespo.rollout.client import GenerateReplyError
from megatron_vespo.rollout.collector import (
    CHECK_INTERVAL_S,
    CollectError,
    Collector,
    Engines,
    RejectedDraws,
    TooManyRejectedError,
)
from megatron_vespo.types import SamplingParams

# a request that failed in one of these ways says nothing about the next one
FAILED_REQUEST = (CollectError, EngineRequestError, GenerateReplyError)
MAX_FAILURES_IN_A_ROW = 32  # groups; then it is not the requests
RETRY_PAUSE_S = (
    0.5  # after a failure: an engine that refuses everything is not asked a thousand times a second
)


class AsyncCollector:
    """Fills `buffer`, which nothing else touches while the thread runs, until `stop`.

    All methods may be called from the thread that trains. What ends generation, a dead engine for one, is
    raised by the next `take`. `seed` is that of the first dispatch, every other one has its own.
    """

    def __init__(
        self,
        collector: Collector,
        buffer: RolloutBuffer,
        sampling: SamplingParams,
        *,
        num_completions: int,
        seed: int,
        max_failures: int = MAX_FAILURES_IN_A_ROW,
    ):
        self._collector, self._buffer, self._sampling = collector, buffer, sampling
        self._num_completions, self._seed, self._max_failures = num_completions, seed, max_failures
        self._changed = threading.Condition()  # guards the buffer and what follows
        self._error: BaseException | None = None
        self._messages: list[str] = []
        self._failures_in_a_row = 0
        self._stopping = False
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._rejected = RejectedDraws(0)
        # daemon: a program that dies of something else does not wait for it
        self._thread = threading.Thread(target=self._main, name="async-rollout", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self, timeout_s: float, check: Callable[[], None] = lambda: None) -> list[Group]:
        """The next rollout batch; waits until enough groups have finished.

        `check` is called every second meanwhile and may raise: nothing is taken then.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                batch = self._buffer.take()
                self._notify_loop()  # taking makes room, also where it dropped something
                if batch is not None:
                    return batch
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CollectError(
                        f"no rollout batch within {timeout_s:g} s: {self._buffer.num_finished} groups have "
                        f"finished, {self._buffer.num_in_flight} are in flight"
                    )
                self._changed.wait(min(left, CHECK_INTERVAL_S))
                check()

    def serve(self, version: int) -> None:
        """The engines serve `version` from now on."""
        with self._changed:
            self._buffer.serve(version)
            self._notify_loop()

    def messages(self) -> list[str]:
        """What has happened since the last call, for people."""
        with self._changed:
            messages, self._messages = self._messages, []
        return messages

    @contextmanager
    def held(self) -> Iterator[RolloutBuffer]:
        """The buffer, which does not change meanwhile: nothing is dispatched, no prompt is taken."""
        with self._changed:
            yield self._buffer

    def stop(self, timeout_s: float) -> None:
        """Cancels what is in flight and ends the thread. Harmless when called twice, or before `start`."""
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                return
            self._stopping = True
            self._notify_loop()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise CollectError(f"asynchronous generation has not stopped within {timeout_s:g} s")

    def _notify_loop(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake.set)

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            with self._changed:
                self._loop.close()

    async def _run(self) -> None:
        async with self._collector.connect() as engines:
            watch = asyncio.create_task(engines.watch())
            groups: dict[asyncio.Task, Ticket] = {}
            try:
                while not self._stopping:
                    self._wake.clear()
                    self._dispatch(engines, groups)
                    waking = asyncio.create_task(self._wake.wait())
                    await asyncio.wait([watch, waking, *groups], return_when=asyncio.FIRST_COMPLETED)
                    waking.cancel()
                    if watch.done():
                        watch.result()
                    done = {task: groups.pop(task) for task in list(groups) if task.done()}
                    if self._settle(done):
                        await asyncio.sleep(RETRY_PAUSE_S)
            finally:
                tasks = [watch, *groups]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _dispatch(self, engines: Engines, groups: dict[asyncio.Task, Ticket]) -> None:
        with self._changed:
            expired = {ticket.number for ticket in self._buffer.expire()}
            fresh = [self._buffer.dispatch() for _ in range(self._buffer.room())]
        for task, ticket in list(groups.items()):
            if ticket.number in expired:
                del groups[task]
                task.cancel()
        for ticket in fresh:
            self._rejected.total += self._num_completions
            groups[asyncio.create_task(self._draw_group(engines, ticket))] = ticket

    async def _draw_group(self, engines: Engines, ticket: Ticket) -> Group:
        seed = self._seed + ticket.number
        try:
            async with asyncio.TaskGroup() as tasks:
                draws = [
                    tasks.create_task(
                        engines.draw(
                            ticket.prompt, self._sampling, seed, index, self._num_completions, self._rejected
                        )
                    )
                    for index in range(self._num_completions)
                ]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return [draw.result() for draw in draws]

    def _settle(self, done: dict[asyncio.Task, Ticket]) -> bool:
        """Hands finished groups to the buffer; whether one has failed."""
        failed = False
        with self._changed:
            for task, ticket in done.items():
                error = task.exception()
                if error is None:
                    self._failures_in_a_row = 0
                    self._buffer.finish(ticket, task.result())
                    continue
                if isinstance(error, TooManyRejectedError) or not isinstance(error, FAILED_REQUEST):
                    raise error
                failed = True
                self._failures_in_a_row += 1
                again = self._buffer.fail(ticket)
                what = "generated again" if again else f"given up after {ticket.dispatches} dispatches"
                self._messages.append(f"prompt {ticket.prompt.prompt_id} {what}: {error}")
                if self._failures_in_a_row >= self._max_failures:
                    raise CollectError(
                        f"{self._failures_in_a_row} groups in a row have failed; the last one: {error}"
                    ) from error
            self._changed.notify_all()
        return failed
