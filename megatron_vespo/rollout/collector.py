"""Groups of completions from all engines at once: blocking, with deadlines, quick to notice a dead engine."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable

import aiohttp

from megatron_vespo.rollout.client import EngineClient, NonFiniteLogProbsError
from megatron_vespo.types import Completion, Prompt, SamplingParams

CHECK_INTERVAL_S = 1.0
CONNECT_TIMEOUT_S = 30.0
# a rare overflow costs a draw; an engine that makes them all the time would train a policy on what is left
MAX_REJECTED_SHARE = 0.03


class CollectError(RuntimeError):
    """An engine that did not answer a generate request, or whose answers are not to be used."""


class RejectedDraws:
    """Counts the completions that had to be drawn anew among `total`; CollectError when they are too many."""

    def __init__(self, total: int):
        self._total, self._num = total, 0

    def add(self, error: NonFiniteLogProbsError) -> None:
        self._num += 1
        if self._num > max(1, MAX_REJECTED_SHARE * self._total):
            raise CollectError(
                f"{self._num} of {self._total} completions had non-finite log-probs, more than "
                f"{MAX_REJECTED_SHARE:.0%}; the last one: {error}"
            ) from error


class Collector:
    """Spreads generate requests over the engines at `urls`, each to the one with the fewest outstanding.

    One request is one completion: as fast as batched requests (the engine batches by itself), and every
    completion frees its place as soon as it ends. `check`, called every second and after a lost connection,
    raises when an engine's process is dead. `num_layers` and `topk` are None for a dense model.
    `on_requests(engine, start, end, number)` is told after every `collect` when an engine's first request
    was sent and its last one of `number` was answered, in nanoseconds since 1970.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        num_layers: int | None,
        topk: int | None,
        request_timeout_s: float,
        max_requests_per_engine: int = 512,
        check: Callable[[], None] | None = None,
        api_key: str | None = None,
        on_requests: Callable[[int, int, int, int], None] | None = None,
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

    async def _collect(self, prompts, sampling, num_completions, seed, on_progress) -> list[list[Completion]]:
        timeout = aiohttp.ClientTimeout(total=self._request_timeout_s, connect=CONNECT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)  # `free_places` is the bound
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            clients = [
                EngineClient(url, session, self._num_layers, self._topk, self._api_key) for url in self._urls
            ]
            outstanding = dict.fromkeys(clients, 0)
            requests: dict[EngineClient, list[tuple[int, int]]] = {client: [] for client in clients}
            free_places = asyncio.Semaphore(self._max_requests_per_engine * len(clients))
            total, done = len(prompts) * num_completions, 0
            rejected = RejectedDraws(total)

            async def draw(prompt: Prompt, index: int) -> Completion:
                nonlocal done
                async with free_places:
                    client = min(clients, key=outstanding.__getitem__)
                    outstanding[client] += 1
                    sent = time.time_ns()
                    try:
                        completion = await self._generate(client, prompt, sampling, seed, index)
                    finally:
                        outstanding[client] -= 1
                        requests[client].append((sent, time.time_ns()))
                done += 1
                if on_progress is not None:
                    on_progress(done, total)
                return completion

            async def draw_sound(prompt: Prompt, index: int) -> Completion:
                rejections: tuple[str, ...] = ()
                while True:
                    try:
                        completion = await draw(prompt, index + num_completions * len(rejections))
                    except NonFiniteLogProbsError as error:
                        rejected.add(error)
                        rejections += (str(error),)
                    else:
                        completion.rejections = rejections
                        return completion

            try:
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(self._watch())
                    groups = [
                        [tasks.create_task(draw_sound(prompt, index)) for index in range(num_completions)]
                        for prompt in prompts
                    ]
                    if total:
                        await asyncio.wait([task for group in groups for task in group])
                    watch.cancel()
            except BaseExceptionGroup as failures:
                raise failures.exceptions[0] from None
            finally:
                self._report(requests.values())
        return [[task.result() for task in group] for group in groups]

    async def _generate(self, client: EngineClient, prompt, sampling, seed: int, index: int) -> Completion:
        try:
            return await client.generate(prompt, sampling, completion_seed(seed, prompt.prompt_id, index))
        except TimeoutError as error:
            await self._run_check()
            raise CollectError(
                f"engine {client.url}: no completion of prompt {prompt.prompt_id} "
                f"within {self._request_timeout_s:g} s"
            ) from error
        except aiohttp.ClientError as error:
            # The connection breaks a moment before the process can be seen to be dead.
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._run_check()
            raise CollectError(
                f"engine {client.url}: connection lost at prompt {prompt.prompt_id} ({error})"
            ) from error

    def _report(self, requests: Iterable[list[tuple[int, int]]]) -> None:
        for engine, times in enumerate(requests):
            if times and self._on_requests is not None:
                sent, answered = zip(*times, strict=True)
                self._on_requests(engine, min(sent), max(answered), len(times))

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(CHECK_INTERVAL_S)
            await self._run_check()

    async def _run_check(self) -> None:
        if self._check is not None:
            await asyncio.to_thread(self._check)


def completion_seed(seed: int, prompt_id: int, index: int) -> int:
    """31-bit sampling seed of completion `index` of a prompt: the same from whichever engine and when."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
