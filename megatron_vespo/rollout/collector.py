"""Groups of completions from all engines at once: blocking, with deadlines, quick to notice a dead engine."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp

from megatron_vespo.rollout.client import EngineClient, NonFiniteLogProbsError
from megatron_vespo.rollout.generate_function import GenerateFunction, run_generate_function
from megatron_vespo.types import Completion, Prompt, SamplingParams

CHECK_INTERVAL_S = 1.0
CONNECT_TIMEOUT_S = 30.0
HOLD_POLL_S = 0.05
# a rare overflow costs a draw; an engine that makes them all the time would train a policy on what is left
MAX_REJECTED_SHARE = 0.03
Check = Callable[[], None]
Drafts = list[Completion | None]  # of a group, a place each
OnRequests = Callable[[int, int, int, int], None]  # engine, start, end, number of requests


class CollectError(RuntimeError):
    """An engine that did not answer a generate request, or whose answers are not to be used."""


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
    """Open connections to all engines; usable inside one event loop only.

    `on_requests` is told of every request when it ends, from the engine's last end on, or from where the
    engine began to work: of one engine these times follow each other and together are all of its work.
    """

    def __init__(
        self,
        clients: list[EngineClient],
        max_requests: int,
        timeout_s: float,
        check: Check | None,
        on_requests: OnRequests | None,
        function: GenerateFunction | None,
    ):
        self._function = function
        self._clients, self._on_requests = clients, on_requests
        self._outstanding = dict.fromkeys(clients, 0)
        self._working_since = dict.fromkeys(clients, 0)
        self._free_places = asyncio.Semaphore(max_requests)
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._timeout_s, self._check = timeout_s, check

    async def draw(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        seed: int,
        index: int,
        num_completions: int,
        rejected: RejectedDraws,
        drafts: Drafts | None = None,
    ) -> Completion:
        """Completion `index` of a group; one with non-finite log-probs is drawn anew.

        `drafts[index]` is where it begins and, at any time, as far as it has come. One that an engine hands
        back unfinished goes on as soon as that is allowed.
        """
        drafts = [None] * num_completions if drafts is None else drafts
        if self._function is None:
            return await self._complete(prompt, sampling, seed, index, num_completions, rejected, drafts)

        async def ask(prompt: Prompt, sampling: SamplingParams, seed: int) -> Completion:
            return await self._complete(prompt, sampling, seed, 0, 1, rejected, [None])

        if drafts[index] is None:
            own_seed = completion_seed(seed, prompt.prompt_id, index)
            drafts[index] = await run_generate_function(self._function, ask, prompt, sampling, own_seed)
        return drafts[index]

    async def _complete(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        seed: int,
        index: int,
        num_completions: int,
        rejected: RejectedDraws,
        drafts: Drafts,
    ) -> Completion:
        rejections: tuple[str, ...] = ()
        while (draft := drafts[index]) is None or draft.finish_reason == "abort":
            number = index + num_completions * len(rejections)
            try:
                drafts[index] = await self._draw_once(
                    prompt, sampling, completion_seed(seed, prompt.prompt_id, number), draft
                )
            except NonFiniteLogProbsError as error:
                rejected.add(error)
                rejections += (str(error),)
        draft.rejections += rejections
        return draft

    async def hold(self, timeout_s: float) -> None:
        """Makes engines hand back what they are at, and asks for nothing more until `release`."""
        self._allowed.clear()
        deadline = time.monotonic() + timeout_s
        while any(self._outstanding.values()):
            if time.monotonic() > deadline:
                busy = ", ".join(client.url for client, number in self._outstanding.items() if number)
                raise CollectError(f"{busy}: still at work {timeout_s:g} s after being asked to hand it back")
            # again and again: a request may reach its engine after this does
            await asyncio.gather(*(client.abort() for client in self._clients))
            await asyncio.sleep(HOLD_POLL_S)

    def release(self) -> None:
        self._allowed.set()

    async def watch(self) -> None:
        """Never returns; raises what `check` raises."""
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._run_check()

    async def _draw_once(
        self, prompt: Prompt, sampling: SamplingParams, seed: int, draft: Completion | None
    ) -> Completion | None:
        async with self._free_places:
            await self._allowed.wait()
            client = min(self._outstanding, key=self._outstanding.__getitem__)
            if self._outstanding[client] == 0:
                self._working_since[client] = time.time_ns()
            self._outstanding[client] += 1
            try:
                return await self._generate(client, prompt, sampling, seed, draft)
            finally:
                self._outstanding[client] -= 1
                self._report(client)

    def _report(self, client: EngineClient) -> None:
        start, end = self._working_since[client], time.time_ns()
        self._working_since[client] = end
        if self._on_requests is not None:
            self._on_requests(self._clients.index(client), start, end, 1)

    async def _generate(
        self, client: EngineClient, prompt, sampling, seed: int, draft: Completion | None
    ) -> Completion | None:
        try:
            return await client.generate(prompt, sampling, seed, draft)
        except TimeoutError as error:
            await self._run_check()
            raise CollectError(
                f"engine {client.url}: no completion of prompt {prompt.prompt_id} "
                f"within {self._timeout_s:g} s"
            ) from error
        except aiohttp.ClientError as error:
            # The connection breaks a moment before the process can be seen to be dead.
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._run_check()
            raise CollectError(
                f"engine {client.url}: connection lost at prompt {prompt.prompt_id} ({error})"
            ) from error

    async def _run_check(self) -> None:
        if self._check is not None:
            await asyncio.to_thread(self._check)


class Collector:
    """Spreads generate requests over the engines at `urls`, each to the one with the fewest outstanding.

    One request is one completion: as fast as batched requests (the engine batches by itself), and every
    completion frees its place as soon as it ends. `check`, called every second and after a lost connection,
    raises when an engine's process is dead. `num_layers` and `topk` are None for a dense model.
    `on_requests(engine, start, end, number)` is told after every `collect` when an engine's first request
    was sent and its last one of `number` was answered, in nanoseconds since 1970; of what is drawn from
    `connect` it is told request by request.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        num_layers: int | None,
        topk: int | None,
        request_timeout_s: float,
        max_requests_per_engine: int = 512,
        check: Check | None = None,
        api_key: str | None = None,
        on_requests: OnRequests | None = None,
        generate_function: GenerateFunction | None = None,
    ):
        if not urls:
            raise ValueError("a collector needs at least one engine url")
        self._urls = urls
        self._num_layers, self._topk = num_layers, topk
        self._request_timeout_s = request_timeout_s
        self._max_requests_per_engine = max_requests_per_engine
        self._check = check
        self._api_key = api_key
        self._on_requests = on_requests
        self._generate_function = generate_function

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
            clients = [
                EngineClient(url, session, self._num_layers, self._topk, self._api_key) for url in self._urls
            ]
            places = self._max_requests_per_engine * len(clients)
            told = on_requests or self._on_requests
            yield Engines(
                clients, places, self._request_timeout_s, self._check, told, self._generate_function
            )

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
                    watch = tasks.create_task(engines.watch())
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
