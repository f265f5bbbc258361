"""Collects groups of completions from all engines: blocks, has deadlines and tolerates lost engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from megatron_vespo.rollout.engine_client import (
    EngineClient,
    HttpEngineClient,
    MakeClient,
    RemoteClients,
    engine_session,
)
from megatron_vespo.rollout.generate_reply import RouteShape
from megatron_vespo.rollout.router import LostRequests, OnRequests, Router
from megatron_vespo.rollout.sampler import Check, Maker, RejectedDraws, Sampler
from megatron_vespo.types import Completion, Prompt, SamplingParams


class Collector:
    """Spreads generate requests over the engines at `urls`, which may change at any time: see Router.

    One request is one completion. That is as fast as batched requests, because the engine batches by itself,
    and every completion frees its place as soon as it ends.

    Args:
        routes: if given, completions have the experts chosen for every token.
        check: called every second and after a request is given up; raises if no more answers will come.
        on_requests: called as (engine, start, end, number), times in nanoseconds since 1970. After every
            `collect` it gets the whole work of an engine: `start` is when the first of its `number` requests
            was sent, `end` when the last was answered. A draw from `connect` calls it once per request.
        maker: makes a completion of several draws: a user's function, or episodes with an environment.
        on_wait: called every second while `collect` waits.
        on_progress: called as (done, total) when `collect` begins and after every completion.
        remote: processes that send the requests and read the replies; None: this process does.
    """

    def __init__(
        self,
        urls: Sequence[str | None],
        *,
        routes: RouteShape | None = None,
        request_timeout_s: float,
        max_requests_per_engine: int = 512,
        max_attempts: int = 1,
        check: Check | None = None,
        api_key: str | None = None,
        on_requests: OnRequests | None = None,
        lost: LostRequests | None = None,
        maker: Maker | None = None,
        on_wait: Callable[[], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        remote: RemoteClients | None = None,
    ):
        if not urls:
            raise ValueError("a collector needs at least one engine url")
        self.on_wait, self._on_progress = on_wait, on_progress
        self._urls, self._max_attempts, self._lost = urls, max_attempts, lost or LostRequests()
        self._routes = routes
        self._request_timeout_s = request_timeout_s
        self._max_requests_per_engine = max_requests_per_engine
        self._check = check
        self._api_key = api_key
        self._on_requests = on_requests
        self._maker = maker
        self._remote = remote

    @property
    def max_requests(self) -> int:
        """Most requests in flight."""
        return self._max_requests_per_engine * len(self._urls)

    def collect(
        self,
        prompts: list[Prompt],
        sampling: SamplingParams,
        *,
        num_completions: int,
        seed: int,
        on_progress: Callable[[int, int], None] | None = None,
        for_training: bool = True,
    ) -> list[list[Completion]]:
        """`num_completions` completions of each prompt, in prompt order; blocks the calling thread.

        A completion that cannot be trained on is sampled again, and the new one's `rejections` tell why. One
        such completion is always allowed; more than MAX_REJECTED_SHARE of all are an error.
        `on_progress(done, total)` is called after every completion. Only `for_training` keeps their routes.

        Raises the first failure, which names the engine, and cancels the other requests: CollectError,
        EngineRequestError, GenerateReplyError, or whatever `check` raises.
        """
        return asyncio.run(self._collect(prompts, sampling, num_completions, seed, on_progress, for_training))

    @asynccontextmanager
    async def connect(self, for_training: bool = True) -> AsyncIterator[Sampler]:
        """A sampler for arbitrary draws."""
        async with self._connect(self._on_requests, for_training) as sampler:
            yield sampler

    @asynccontextmanager
    async def _connect(self, on_requests: OnRequests | None, for_training: bool) -> AsyncIterator[Sampler]:
        routes = self._routes if for_training else None
        async with AsyncExitStack() as stack:
            router = Router(
                self._urls,
                await self._clients(routes, stack),
                max_requests=self.max_requests,
                max_attempts=self._max_attempts,
                timeout_s=self._request_timeout_s,
                on_requests=on_requests,
                lost=self._lost,
            )
            try:
                yield Sampler(router, self._lost, self._check, self._maker, not for_training)
            finally:
                self._lost.report()

    async def _clients(self, routes: RouteShape | None, stack: AsyncExitStack) -> MakeClient:
        if self._remote is not None:
            return await stack.enter_async_context(self._remote.connect(routes, self._request_timeout_s))
        session = await stack.enter_async_context(engine_session(self._request_timeout_s))

        def client(number: int, url: str) -> EngineClient:
            return HttpEngineClient(url, session, routes, self._api_key)

        return client

    async def _collect(
        self, prompts, sampling, num_completions, seed, on_progress, for_training
    ) -> list[list[Completion]]:
        total, done = len(prompts) * num_completions, 0
        rejected = RejectedDraws(total)
        listeners = [listen for listen in (on_progress, self._on_progress) if listen is not None]
        if self._on_progress is not None:
            self._on_progress(0, total)

        async def draw(sampler: Sampler, prompt: Prompt, index: int) -> Completion:
            nonlocal done
            completion = await sampler.draw(prompt, sampling, seed, index, num_completions, rejected)
            done += 1
            for listen in listeners:
                listen(done, total)
            return completion

        work: dict[int, tuple[int, int, int]] = {}  # engine -> start, end, number of requests

        def add_work(engine: int, start: int, end: int, number: int) -> None:
            first, _, before = work.get(engine, (start, end, 0))
            work[engine] = first, end, before + number

        async with self._connect(add_work, for_training) as sampler:
            try:
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(sampler.watch(self.on_wait))
                    groups = [
                        [tasks.create_task(draw(sampler, prompt, index)) for index in range(num_completions)]
                        for prompt in prompts
                    ]
                    if total:
                        await asyncio.wait([task for group in groups for task in group])
                    watch.cancel()
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            finally:
                if self._on_requests is not None:
                    for engine in sorted(work):
                        self._on_requests(engine, *work[engine])
        return [[task.result() for task in group] for group in groups]
