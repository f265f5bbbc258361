"""A Ray actor beside an engine: sends its requests, reads and checks its replies, keeps the routes there.

A reply of 4,096 tokens is 160 kB of JSON, and 8.5 MB with the routes of a large model. The actor makes arrays
of 32 kB of it, and sends many of them to the driver in one message.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aiohttp
import numpy as np

from megatron_vespo.cluster.logs import redirect_output
from megatron_vespo.rollout.engine_client import ConnectionLostError, HttpEngineClient, engine_session
from megatron_vespo.rollout.generate_reply import GenerateReplyError, RouteShape
from megatron_vespo.system.http import EngineRequestError
from megatron_vespo.system.preemption import shield_process
from megatron_vespo.types import Prompt, SamplingParams, TokenSupports, VersionSpans

# after this long a message may be empty: it tells the driver that the actor lives
ANSWER_INTERVAL_S = 1.0
# a message waits so long for more answers: it costs the driver as much as ten of them
GATHER_S = 0.01
THREADS = 8  # a session holds one while it waits for answers
T = TypeVar("T")


class Request(NamedTuple):
    """One draw of the engine at `url`; `number` is unique in its session."""

    number: int
    url: str
    prompt: Prompt  # its id and its tokens only
    sampling: SamplingParams
    seed: int | None
    routes_start: int | None  # see EngineClient.draw


class Drawn(NamedTuple):
    """The columns of one completion. The actor keeps its routes, if there are any, until `hand_over`."""

    token_ids: np.ndarray
    log_probs: np.ndarray
    policy_versions: VersionSpans
    finish_reason: str
    num_retractions: int
    supports: TokenSupports | None
    has_routes: bool


class Answer(NamedTuple):
    """The answer to a request: a completion, None if no token was generated, or an error to be raised."""

    number: int
    result: Drawn | Exception | None


class ReplyCollector:
    """A Ray actor with an event loop of its own. No method takes longer than a call to the engine.

    Ray runs the methods in THREADS threads. It is no async actor, whose methods never run in the main thread:
    only that can ignore signals.
    """

    def __init__(self, log_path: Path, api_key: str | None):
        shield_process()
        redirect_output(log_path)
        self._api_key = api_key
        self._sessions: dict[str, _Session] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="replies", daemon=True).start()

    def open(self, name: str, routes: RouteShape | None, timeout_s: float) -> None:
        """Begin session `name`, whose requests have the deadline `timeout_s` each."""
        self._sessions[name] = self._do(_Session.begun(routes, timeout_s, self._api_key))

    def close(self, name: str) -> None:
        """End a session and its requests."""
        self._do(self._sessions.pop(name).close())

    def submit(self, name: str, requests: Sequence[Request], cancelled: Sequence[int]) -> None:
        """Send requests, and give up earlier ones by their numbers."""
        self._do(self._sessions[name].submit(requests, cancelled))

    def receive(self, name: str) -> list[Answer]:
        """The answers since the last call; waits for one, at most ANSWER_INTERVAL_S."""
        return self._do(self._sessions[name].receive())

    def hand_over(self, name: str, numbers: Sequence[int]) -> tuple:
        """None, then the routes of these requests: as many return values, which Ray keeps on this node."""
        kept = self._sessions[name].kept
        return (None, *(kept.pop(number) for number in numbers))

    def abort(self, name: str, url: str) -> None:
        """Make the engine return all its requests."""
        self._do(self._sessions[name].client(url).abort())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


class _Session:
    """The requests of one event loop of the driver; all but `kept` belongs to the actor's event loop."""

    def __init__(self, routes: RouteShape | None, http: aiohttp.ClientSession, api_key: str | None):
        self._routes, self._http, self._api_key = routes, http, api_key
        self._running: dict[int, asyncio.Task] = {}
        self._answers: list[Answer] = []
        self._answered = asyncio.Event()
        self.kept: dict[int, np.ndarray] = {}  # routes by the number of the request

    @classmethod
    async def begun(cls, routes: RouteShape | None, timeout_s: float, api_key: str | None) -> _Session:
        return cls(routes, engine_session(timeout_s), api_key)

    def client(self, url: str) -> HttpEngineClient:
        return HttpEngineClient(url, self._http, self._routes, self._api_key)

    async def close(self) -> None:
        for task in self._running.values():
            task.cancel()
        await self._http.close()

    async def submit(self, requests: Sequence[Request], cancelled: Sequence[int]) -> None:
        for request in requests:
            self._running[request.number] = asyncio.create_task(self._run(request))
        for number in cancelled:
            if (task := self._running.pop(number, None)) is not None:
                task.cancel()

    async def receive(self) -> list[Answer]:
        try:
            await asyncio.wait_for(self._answered.wait(), ANSWER_INTERVAL_S)
        except TimeoutError:
            return []
        await asyncio.sleep(GATHER_S)
        self._answered.clear()
        answers, self._answers = self._answers, []
        return answers

    async def _run(self, request: Request) -> None:
        try:
            result: Drawn | Exception | None = await self._draw(request)
        except Exception as error:
            result = _portable(error)
        self._running.pop(request.number, None)
        self._answers.append(Answer(request.number, result))
        self._answered.set()

    async def _draw(self, request: Request) -> Drawn | None:
        client = self.client(request.url)
        drawn = await client.draw(request.prompt, request.sampling, request.seed, request.routes_start)
        if drawn is None:
            return None
        if drawn.routed_experts is not None:
            assert isinstance(drawn.routed_experts, np.ndarray)
            self.kept[request.number] = drawn.routed_experts
        return Drawn(
            drawn.token_ids, drawn.log_probs, drawn.policy_versions, drawn.finish_reason,
            drawn.num_retractions, drawn.supports, drawn.routed_experts is not None,
        )  # fmt: skip


def _portable(error: Exception) -> Exception:
    """The error as another process can read it."""
    if isinstance(error, EngineRequestError | GenerateReplyError | ConnectionLostError):
        return error
    if isinstance(error, TimeoutError):
        return TimeoutError(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")
