"""Streams groups of completions for many prompts one by one, so that memory stays bounded."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.sampler import RejectedDraws, Sampler
from megatron_vespo.types import Completion, Prompt, SamplingParams

STOP_TIMEOUT_S = 10.0
Finish = Callable[[int, list[Completion]], None]


def stream_groups(
    collector: Collector,
    prompts: list[Prompt],
    sampling: SamplingParams,
    finish: Finish,
    *,
    num_completions: int,
    seed: int,
) -> None:
    """Calls `finish(index, group)` for every prompt as soon as it has `num_completions` completions.

    All calls come from one other thread, one after another. So `finish` may compute rewards while engines
    generate. Prompts start in their order, when engines have places. Completions are kept only until their
    group has finished.
    Blocks the calling thread. Raises the first failure, as Collector.collect does, or what `finish` raises.
    """
    stream = _Stream(sampling, finish, num_completions, seed, len(prompts), collector.max_requests)
    try:
        _run_in_thread(stream.run(collector, prompts))
    finally:
        stream.scoring.shutdown(wait=False, cancel_futures=True)


def _run_in_thread(work: Coroutine[Any, Any, None]) -> None:
    """A signal's exception is raised here, in the main thread, never inside the event loop."""
    loop, ended = asyncio.new_event_loop(), threading.Event()
    task = loop.create_task(work)

    def main() -> None:
        try:
            loop.run_until_complete(asyncio.wait([task]))
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()
            ended.set()

    threading.Thread(target=main, name="evaluation", daemon=True).start()
    try:
        ended.wait()
    except BaseException:
        loop.call_soon_threadsafe(task.cancel)
        ended.wait(STOP_TIMEOUT_S)
        raise
    task.result()


class _Stream:
    def __init__(
        self,
        sampling: SamplingParams,
        finish: Finish,
        num_completions: int,
        seed: int,
        num_prompts: int,
        max_requests: int,
    ):
        self._sampling, self._finish = sampling, finish
        self._num_completions, self._seed = num_completions, seed
        self._rejected = RejectedDraws(num_prompts * num_completions)
        self._room = asyncio.Semaphore(max_requests)
        self.scoring = ThreadPoolExecutor(1, "scoring")  # the reward workers take one batch at a time

    async def run(self, collector: Collector, prompts: Iterable[Prompt]) -> None:
        async with collector.connect(for_training=False) as sampler:
            try:
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(sampler.watch(collector.on_wait))
                    groups = []
                    for index, prompt in enumerate(prompts):
                        draws = []
                        for number in range(self._num_completions):
                            await self._room.acquire()
                            draws.append(tasks.create_task(self._draw(sampler, prompt, number)))
                        groups.append(tasks.create_task(self._group(index, draws)))
                    await asyncio.gather(*groups)
                    watch.cancel()
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None

    async def _draw(self, sampler: Sampler, prompt: Prompt, number: int) -> Completion:
        try:
            return await sampler.draw(
                prompt, self._sampling, self._seed, number, self._num_completions, self._rejected
            )
        finally:
            self._room.release()

    async def _group(self, index: int, draws: list[asyncio.Task[Completion]]) -> None:
        completions = [await draw for draw in draws]
        draws.clear()
        await asyncio.get_running_loop().run_in_executor(self.scoring, self._finish, index, completions)
