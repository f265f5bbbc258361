"""Groups of completions from all engines at once: blocking, with deadlines, whatever happens to an engine."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import aiohttp

from megatron_vespo.rollout.client import EngineClient, NonFiniteLogProbsError
from megatron_vespo.rollout.dispatch import CollectError, Dispatch, LostRequests, OnRequests
from megatron_vespo.types import Completion, Prompt, SamplingParams

CHECK_INTERVAL_S = 1.0
CONNECT_TIMEOUT_S = 30.0
# a rare overflow costs a draw; an engine that makes them all the time would train a policy on what is left
MAX_REJECTED_SHARE = 0.03
Check = Callable[[], None]


class TooManyRejectedError(CollectError):
    """Completions whose log-probs are no numbers, so many that the engine or the weights must be broken."""


class RejectedDraws:
    """Counts the completions that had to be drawn anew among `total`; an error when they are too many."""

    def __init__(self, total: int):
        self.total, self._num = total, 0

    def add(self, error: NonFiniteLogProbsError) -> None:
        self._num += 1
        if self._num > max(1, MAX_REJECTED_SHARE * self.total):
            raise TooManyRejectedError(
                f"{self._num} of {self.total} completions had non-finite log-probs, more than "
                f"{MAX_REJECTED_SHARE:.0%}; the last one: {error}"
            ) from error


class Engines:
    """Draws from all engines by `dispatch`; usable inside one event loop only."""

    def __init__(self, dispatch: Dispatch, lost: LostRequests, check: Check | None):
        self._dispatch, self._lost, self._check = dispatch, lost, check

    async def draw(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        seed: int,
        index: int,
        num_completions: int,
        rejected: RejectedDraws,
    ) -> Completion:
        """Completion `index` of a group; one with non-finite log-probs is drawn anew."""
        rejections: tuple[str, ...] = ()
        while True:
            number = index + num_completions * len(rejections)
            try:
                completion = await self._draw_once(
                    prompt, sampling, completion_seed(seed, prompt.prompt_id, number)
                )
            except NonFiniteLogProbsError as error:
                rejected.add(error)
                rejections += (str(error),)
            else:
                completion.rejections = rejections
                return completion

    async def watch(self, meanwhile: Callable[[], None] | None = None) -> None:
        """Never returns; raises what `check` raises. `meanwhile` may block the loop."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._run_check()
            if meanwhile is not None:
                meanwhile()
            self._dispatch.refresh()
            self._lost.tell()

    async def _draw_once(self, prompt: Prompt, sampling: SamplingParams, seed: int) -> Completion:
        try:
            return await self._dispatch.send(
                lambda client: client.generate(prompt, sampling, seed), f"prompt {prompt.prompt_id}"
            )
        except CollectError:
            # The connection breaks a moment before the process can be seen to be dead.
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._run_check()
            raise

    async def _run_check(self) -> None:
        if self._check is not None:
            await asyncio.to_thread(self._check)


class Collector:
    """Spreads generate requests over the engines at `urls`, which may change meanwhile: see Dispatch.

    One request is one completion: as fast as batched requests (the engine batches by itself), and every
    completion frees its place as soon as it ends. `check`, called every second and after a request that is
    given up, raises when nothing will come any more. `num_layers` and `topk` are None for a dense model.
    `on_requests(engine, start, end, number)` is told after every `collect` when an engine's first request
    was sent and its last one of `number` was answered, in nanoseconds since 1970; of what is drawn from
    `connect` it is told request by request.
    """

    def __init__(
        self,
        urls: Sequence[str | None],
        *,
        num_layers: int | None,
        topk: int | None,
        request_timeout_s: float,
        max_requests_per_engine: int = 512,
        max_dispatches: int = 1,
        check: Check | None = None,
        api_key: str | None = None,
        on_requests: OnRequests | None = None,
        lost: LostRequests | None = None,
    ):
        if not urls:
            raise ValueError("a collector needs at least one engine url")
        self.meanwhile: Callable[[], None] | None = None  # called every second while `collect` waits
        self._urls, self._max_dispatches, self._lost = urls, max_dispatches, lost or LostRequests()
        self._num_layers, self._topk = num_layers, topk
        self._request_timeout_s = request_timeout_s
        self._max_requests_per_engine = max_requests_per_engine
        self._check = check
        self._api_key = api_key
        self._on_requests = on_requests

    def collect(
        self,
        prompts: list[Prompt],
        sampling: SamplingParams,
        *,
        num_completions: int,
        seed: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """`num_completions` completions of each prompt, in prompt order; blocks the calling thread.

        A completion with non-finite log-probs is drawn anew, and the new one's `rejections` say so; more than
        MAX_REJECTED_SHARE of them, but always one, are an error.
        `on_progress(done, total)` is called after every completion. Raises at the first failure, naming the
        engine, and cancels what is still running: CollectError, EngineRequestError, GenerateReplyError, or
        whatever `check` raises.
        """
        return asyncio.run(self._collect(prompts, sampling, num_completions, seed, on_progress))

    @asynccontextmanager
    async def connect(self, on_requests: OnRequests | None = None) -> AsyncIterator[Engines]:
        """`on_requests` instead of the collector's own."""
        timeout = aiohttp.ClientTimeout(total=self._request_timeout_s, connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)  # `Engines` has the bound
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

            def client(url: str) -> EngineClient:
                return EngineClient(url, session, self._num_layers, self._topk, self._api_key)

            dispatch = Dispatch(
                self._urls,
                client,
                max_requests=self._max_requests_per_engine * len(self._urls),
                max_dispatches=self._max_dispatches,
                timeout_s=self._request_timeout_s,
                on_requests=on_requests or self._on_requests,
                lost=self._lost,
            )
            try:
                yield Engines(dispatch, self._lost, self._check)
            finally:
                self._lost.tell()

    async def _collect(self, prompts, sampling, num_completions, seed, on_progress) -> list[list[Completion]]:
        total, done = len(prompts) * num_completions, 0
        rejected = RejectedDraws(total)

        async def draw(engines: Engines, prompt: Prompt, index: int) -> Completion:
            nonlocal done
            completion = await engines.draw(prompt, sampling, seed, index, num_completions, rejected)
            done += 1
            if on_progress is not None:
                on_progress(done, total)
            return completion

        work: dict[int, tuple[int, int, int]] = {}  # of each engine

        def add_work(engine: int, start: int, end: int, number: int) -> None:
            first, _, before = work.get(engine, (start, end, 0))
            work[engine] = first, end, before + number

        async with self.connect(add_work) as engines:
            try:
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(engines.watch(self.meanwhile))
                    groups = [
                        [tasks.create_task(draw(engines, prompt, index)) for index in range(num_completions)]
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


def completion_seed(seed: int, prompt_id: int, index: int) -> int:
    """31-bit sampling seed of completion `index` of a prompt: the same from whichever engine and when."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
