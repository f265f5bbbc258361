"""Generates in the background: a thread keeps as many groups in flight as can still be trained on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout.buffer import Group, InFlightGroup, RolloutBuffer
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.episode import EnvironmentFailedError
from megatron_vespo.rollout.generate_function import GenerateFunctionError
from megatron_vespo.rollout.generate_reply import GenerateReplyError
from megatron_vespo.rollout.router import CollectError
from megatron_vespo.rollout.sampler import RejectedDraws, Sampler, TooManyRejectedError
from megatron_vespo.rollout.scoring import describe_failures
from megatron_vespo.rollout.teachers import Teachers, TeacherScoring
from megatron_vespo.system.http import EngineRequestError
from megatron_vespo.types import Completion, SamplingParams

# after one of these errors the next request may succeed
FAILED_REQUEST = (
    CollectError,
    EngineRequestError,
    GenerateReplyError,
    GenerateFunctionError,
    EnvironmentFailedError,
)
MAX_FAILURES_IN_A_ROW = 32  # groups; after this many, the cause is not a single request
ON_WAIT_INTERVAL_S = 1.0
RETRY_PAUSE_S = 0.5  # after a failure, so that an engine that refuses every request is not flooded
# distance between the seeds of a prompt's attempts; larger than the number of prompts of any run
ATTEMPT_SEEDS = 2**40
Score = Callable[[Group], Sequence[RewardResult]]


class AsyncCollector:
    """Fills `buffer` in a thread, from `start` to `stop`; nothing else uses the buffer meanwhile.

    The training thread may call all methods. If generation ends, for example because of a dead engine, the
    next `take` raises the error.

    `teachers` score groups as they finish. Then `score` fills in rewards and returns those that failed. A
    waiting `take` calls `on_wait` every second.
    `on_change` is called when groups have finished or were taken. The seed of a group depends only on its
    prompt's place in the run and on its dispatch. It does not depend on when and where it is generated.
    """

    def __init__(
        self,
        collector: Collector,
        buffer: RolloutBuffer,
        sampling: SamplingParams,
        score: Score,
        *,
        num_completions: int,
        seed: int,
        max_failures: int = MAX_FAILURES_IN_A_ROW,
        scored_at_once: int = 1,  # groups
        teachers: Teachers | None = None,
        on_wait: Callable[[], None] = lambda: None,
        on_change: Callable[[RolloutBuffer], None] | None = None,
    ):
        self._collector, self._buffer, self._sampling, self._score = collector, buffer, sampling, score
        self._num_completions, self._seed, self._max_failures = num_completions, seed, max_failures
        self._on_wait, self._teachers = on_wait, teachers
        self._changed = threading.Condition()  # guards the buffer and the attributes below
        self._on_change = on_change
        self._error: BaseException | None = None
        self._messages: list[str] = []
        self._failed_rewards: list[RewardResult] = []
        self._failures_in_a_row = 0
        self._stopping = self._suspended = False
        self._sampler: Sampler | None = None  # while the thread runs
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._ended: list[asyncio.Task] = []  # groups since the loop's last round
        self._scoring = ThreadPoolExecutor(scored_at_once, "scoring")
        self._rejected = RejectedDraws(0)
        # daemon: a program that ends with an error does not wait for it
        self._thread = threading.Thread(target=self._main, name="async-rollout", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take(self, timeout_s: float) -> list[Group]:
        """The next rollout batch, scored; waits until enough groups have finished."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self._changed:
                if self._error is not None:
                    raise self._error
                batch = self._buffer.take()
                self._notify_loop()  # `take` makes room, also when it only drops stale groups
                if batch is not None:
                    self._report()
                    return batch
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CollectError(
                        f"no rollout batch within {timeout_s:g} s: {self._buffer.num_finished} groups have "
                        f"finished, {self._buffer.num_in_flight} are in flight"
                    )
                self._changed.wait(min(left, ON_WAIT_INTERVAL_S))
            self._on_wait()

    def weights_synced(self, policy_version: int) -> None:
        """The engines serve `policy_version` from now on."""
        with self._changed:
            self._buffer.weights_synced(policy_version)
            self._notify_loop()

    def messages(self) -> list[str]:
        """Log lines about events since the last call."""
        with self._changed:
            messages, self._messages = self._messages, []
            failures, self._failed_rewards = self._failed_rewards, []
        return messages + ([describe_failures(failures)] if failures else [])

    @contextmanager
    def held(self) -> Iterator[RolloutBuffer]:
        """The buffer, locked: inside the block, no group is dispatched and no prompt is taken."""
        with self._changed:
            yield self._buffer

    def suspend(self, timeout_s: float) -> None:
        """Makes engines return unfinished responses and stop; the buffer then has every token generated."""
        with self._changed:
            self._suspended = True
            sampler, error = self._sampler, self._error
        if error is not None:
            raise error
        if sampler is not None:
            asyncio.run_coroutine_threadsafe(sampler.hold(timeout_s), self._loop).result(2 * timeout_s)

    def resume(self) -> None:
        """Continues after `suspend`."""
        with self._changed:
            self._suspended = False
            if self._sampler is not None:
                self._loop.call_soon_threadsafe(self._sampler.release)
            self._notify_loop()

    def stop(self, timeout_s: float) -> None:
        """Cancels groups in flight and ends the thread. May be called twice, or before `start`."""
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
        except BaseException as error:  # whatever it is, the thread that waits raises it
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._scoring.shutdown(wait=False, cancel_futures=True)
            with self._changed:
                self._sampler = None
                self._loop.close()

    async def _run(self) -> None:
        connected = nullcontext() if self._teachers is None else self._teachers.connect()
        async with self._collector.connect() as sampler, connected as teachers:
            with self._changed:
                self._sampler = sampler
            watch = asyncio.create_task(_watch(sampler, teachers))
            watch.add_done_callback(lambda _: self._wake.set())
            groups: dict[asyncio.Task, InFlightGroup] = {}
            try:
                while not self._stopping:
                    self._wake.clear()
                    self._dispatch(sampler, teachers, groups)
                    await self._wake.wait()
                    if watch.done():
                        watch.result()
                    ended, self._ended = self._ended, []  # those that expired are no longer in `groups`
                    if self._settle({task: groups.pop(task) for task in ended if task in groups}):
                        await asyncio.sleep(RETRY_PAUSE_S)
            finally:
                tasks = [watch, *groups]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _dispatch(
        self,
        sampler: Sampler,
        teachers: TeacherScoring | None,
        groups: dict[asyncio.Task, InFlightGroup],
    ) -> None:
        with self._changed:
            if self._suspended:
                return
            expired = {in_flight.number for in_flight in self._buffer.expire()}
            fresh = [self._buffer.dispatch() for _ in range(self._buffer.room())]
        for task, in_flight in list(groups.items()) if expired else ():
            if in_flight.number in expired:
                del groups[task]
                task.cancel()
        for in_flight in fresh:
            self._rejected.total += self._num_completions
            task = asyncio.create_task(self._make_group(sampler, teachers, in_flight))
            # not asyncio.wait, which looks at every group in flight whenever one ends
            task.add_done_callback(self._group_ended)
            groups[task] = in_flight

    def _group_ended(self, task: asyncio.Task) -> None:
        self._ended.append(task)
        self._wake.set()

    async def _make_group(
        self, sampler: Sampler, teachers: TeacherScoring | None, in_flight: InFlightGroup
    ) -> tuple[Group, Sequence[RewardResult]]:
        size, partials = self._num_completions, in_flight.partials
        seed = self._seed + in_flight.serial + ATTEMPT_SEEDS * in_flight.attempts
        partials.extend([None] * (size - len(partials)))

        def draw(index: int) -> Coroutine[Any, Any, Completion]:
            how = seed, index, size, self._rejected, partials
            return sampler.draw(in_flight.prompt, self._sampling, *how)

        try:
            async with asyncio.TaskGroup() as tasks:
                draws = [tasks.create_task(draw(index)) for index in range(size)]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        group = [draw.result() for draw in draws]
        if teachers is not None:
            await teachers.score(group)
        return group, await self._loop.run_in_executor(self._scoring, self._score, group)

    def _settle(self, done: dict[asyncio.Task, InFlightGroup]) -> bool:
        """Hands finished groups to the buffer; True if one has failed."""
        failed = False
        errors = [
            task.exception() for task in done
        ]  # of all tasks: asyncio warns about errors that nobody retrieves
        with self._changed:
            for (task, in_flight), error in zip(done.items(), errors, strict=True):
                if error is None:
                    self._failures_in_a_row = 0
                    group, failed_rewards = task.result()
                    self._failed_rewards += failed_rewards
                    self._messages += [f"sampled again: {reason}" for c in group for reason in c.rejections]
                    self._buffer.finish(in_flight, group)
                    continue
                if isinstance(error, TooManyRejectedError) or not isinstance(error, FAILED_REQUEST):
                    raise error
                failed = True
                self._failures_in_a_row += 1
                again = self._buffer.fail(in_flight)
                what = "generated again" if again else f"given up after {in_flight.attempts} attempts"
                self._messages.append(f"prompt {in_flight.prompt.prompt_id} {what}: {error}")
                if self._failures_in_a_row >= self._max_failures:
                    raise CollectError(
                        f"{self._failures_in_a_row} groups in a row have failed; the last one: {error}"
                    ) from error
            if done:  # `take` wakes this loop; waking it for nothing would keep a core busy
                self._report()
                self._changed.notify_all()
        return failed

    def _report(self) -> None:
        if self._on_change is not None:
            self._on_change(self._buffer)


async def _watch(sampler: Sampler, teachers: TeacherScoring | None) -> None:
    """Raises what ends generation: no engine, or no teacher, will serve again."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(sampler.watch())
            if teachers is not None:
                tasks.create_task(teachers.watch())
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
