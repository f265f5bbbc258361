"""The driver's side of the ReplyCollectors: clients of the engines that cost the driver a tenth of HTTP.

All requests of one moment travel in one message per engine, and so do the answers. Ray keeps the routes on
the engine's node, and the driver has references only.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.exceptions

from megatron_vespo.cluster.placement import Placement
from megatron_vespo.cluster.reply_collector import (
    ANSWER_INTERVAL_S,
    THREADS,
    Answer,
    Drawn,
    ReplyCollector,
    Request,
)
from megatron_vespo.cluster.stored_routes import StoredRoutes
from megatron_vespo.rollout.engine_client import ConnectionLostError, EngineClient, MakeClient
from megatron_vespo.rollout.generate_reply import RouteShape
from megatron_vespo.system.time_limits import IMPORT_TIMEOUT_S
from megatron_vespo.types import Completion, Prompt, SamplingParams, TokenSupports

# an actor sends a message every second; on a busy node it may be late
ANSWER_TIMEOUT_S = ANSWER_INTERVAL_S + 60.0


class ReplyCollectors:
    """One ReplyCollector per engine of `placement`, on the engine's node; see RemoteClients.

    If one dies or does not answer, its requests fail as if their engine were lost, and a new one is started
    for the next request.
    """

    def __init__(self, placement: Placement, log_dir: Path, api_key: str | None):
        self._placement, self._log_dir, self._api_key = placement, log_dir, api_key
        self._remote = ray.remote(ReplyCollector)
        self._lock = threading.Lock()  # an evaluation may run beside background generation
        self._actors: dict[int, Any] = {}
        self._started: set[Any] = set()
        for number in range(len(placement.engines)):  # they start while the engines do
            self.actor(number)

    def actor(self, number: int) -> Any:
        """The collector of engine `number`."""
        with self._lock:
            if number not in self._actors:
                place = replace(self._placement.engines[number], devices=None)
                options = self._placement.options(place) | {"num_cpus": 0, "max_concurrency": THREADS}
                log_path = self._log_dir / f"engine-{number}-replies.log"
                self._actors[number] = self._remote.options(**options).remote(log_path, self._api_key)
            return self._actors[number]

    def opening_timeout_s(self, actor: Any) -> float:
        """How long the actor may take to begin a session: longer if it is still importing its modules."""
        return ANSWER_TIMEOUT_S if actor in self._started else IMPORT_TIMEOUT_S

    def started(self, actor: Any) -> None:
        """Note that the actor has answered."""
        self._started.add(actor)

    def lose(self, number: int, actor: Any) -> None:
        """End an actor that does not answer."""
        with self._lock:
            self._started.discard(actor)
            if self._actors.get(number) is actor:
                del self._actors[number]
        ray.kill(actor)

    def stop(self) -> None:
        """End all actors."""
        with self._lock:
            actors, self._actors = self._actors, {}
            self._started.clear()
        for actor in actors.values():
            ray.kill(actor)

    @asynccontextmanager
    async def connect(self, routes: RouteShape | None, timeout_s: float) -> AsyncIterator[MakeClient]:
        """See RemoteClients."""
        mailboxes: dict[int, _Mailbox] = {}

        def mailbox(number: int) -> _Mailbox:
            if number not in mailboxes or mailboxes[number].is_broken:
                mailboxes[number] = _Mailbox(self, number, routes, timeout_s)
            return mailboxes[number]

        def client(number: int, url: str) -> EngineClient:
            return _RemoteEngineClient(url, routes is not None, partial(mailbox, number))

        try:
            yield client
        finally:
            for used in mailboxes.values():
                await used.close()


class _RemoteEngineClient(EngineClient):
    def __init__(self, url: str, wants_routes: bool, mailbox: Callable[[], _Mailbox]):
        super().__init__(url, wants_routes)
        self._mailbox = mailbox

    async def draw(
        self, prompt: Prompt, sampling: SamplingParams, seed: int | None, routes_start: int | None
    ) -> Completion | None:
        return await self._mailbox().draw(self.url, prompt, sampling, seed, routes_start)

    async def abort(self) -> None:
        await self._mailbox().abort(self.url)


@dataclass
class _Waiting:
    answer: asyncio.Future[Completion | None]
    prompt: Prompt
    temperature: float


class _Mailbox:
    """One session of one ReplyCollector; usable only inside the event loop that made it."""

    def __init__(self, collectors: ReplyCollectors, engine: int, routes: RouteShape | None, timeout_s: float):
        self._collectors, self._engine, self._actor = collectors, engine, collectors.actor(engine)
        self._routes, self._timeout_s = routes, timeout_s
        self._name, self._numbers = uuid.uuid4().hex, count()
        self._waiting: dict[int, _Waiting] = {}
        self._requests: list[Request] = []
        self._cancelled: list[int] = []
        self._sending: asyncio.Task | None = None
        self._loop = asyncio.get_running_loop()
        self._opened = self._loop.create_future()
        self._listening = self._loop.create_task(self._listen())
        self.is_broken = False

    async def draw(
        self,
        url: str,
        prompt: Prompt,
        sampling: SamplingParams,
        seed: int | None,
        routes_start: int | None,
    ) -> Completion | None:
        """See EngineClient.draw. The actor has the deadline; here it is a little later."""
        await asyncio.shield(self._opened)
        number, answer = next(self._numbers), self._loop.create_future()
        self._waiting[number] = _Waiting(answer, prompt, sampling.temperature)
        asked = Prompt(prompt.prompt_id, prompt.token_ids, answer="", text="")
        self._requests.append(Request(number, url, asked, sampling, seed, routes_start))
        self._send_soon()
        try:
            async with asyncio.timeout(self._timeout_s + ANSWER_TIMEOUT_S):
                return await answer
        finally:
            if self._waiting.pop(number, None) is not None:  # given up
                self._cancelled.append(number)
                self._send_soon()

    async def abort(self, url: str) -> None:
        """See EngineClient.abort."""
        await asyncio.shield(self._opened)
        await _answered(self._actor.abort.remote(self._name, url), ANSWER_TIMEOUT_S)

    async def close(self) -> None:
        """End the session; nothing may wait for an answer."""
        tasks = [task for task in (self._listening, self._sending) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._opened.done() and not self.is_broken:
            self._actor.close.remote(self._name)

    def _send_soon(self) -> None:
        if self._sending is None or self._sending.done():
            self._sending = self._loop.create_task(self._send())

    async def _send(self) -> None:
        """Send all that has come in messages, one after another."""
        while (self._requests or self._cancelled) and not self.is_broken:
            requests, self._requests = self._requests, []
            cancelled, self._cancelled = self._cancelled, []
            sent = self._actor.submit.remote(self._name, requests, cancelled)
            try:
                await _answered(sent, ANSWER_TIMEOUT_S)
            except (ray.exceptions.RayError, TimeoutError) as error:
                self._lose(error)

    async def _listen(self) -> None:
        try:
            opening = self._actor.open.remote(self._name, self._routes, self._timeout_s)
            await _answered(opening, self._collectors.opening_timeout_s(self._actor))
            self._collectors.started(self._actor)
            self._opened.set_result(None)
            while True:
                answers = await _answered(self._actor.receive.remote(self._name), ANSWER_TIMEOUT_S)
                routes = await self._stored_routes(answers)
                for answer in answers:
                    self._deliver(answer, routes.get(answer.number))
        except (ray.exceptions.RayError, TimeoutError) as error:
            self._lose(error)
        except Exception as error:  # whoever waits raises it
            self._break(error)

    async def _stored_routes(self, answers: list[Answer]) -> dict[int, StoredRoutes]:
        """References to the routes, by request. They outlive the actor, as the driver owns them."""
        numbers = [a.number for a in answers if isinstance(a.result, Drawn) and a.result.has_routes]
        if not numbers:
            return {}
        call = self._actor.hand_over.options(num_returns=1 + len(numbers))
        done, *refs = call.remote(self._name, numbers)
        await _answered(done, ANSWER_TIMEOUT_S)
        return {number: StoredRoutes(ref) for number, ref in zip(numbers, refs, strict=True)}

    def _deliver(self, answer: Answer, routes: StoredRoutes | None) -> None:
        waiting = self._waiting.pop(answer.number, None)
        if waiting is None or waiting.answer.done():
            return
        match answer.result:
            case Exception() as error:
                waiting.answer.set_exception(error)
            case None:
                waiting.answer.set_result(None)
            case drawn:
                waiting.answer.set_result(_completion(waiting, drawn, routes))

    def _lose(self, error: Exception) -> None:
        """The actor has died or does not answer."""
        why = str(error).strip().splitlines()[-1] if str(error) else "it does not answer"
        self._break(ConnectionLostError(f"the collector of engine {self._engine}'s replies died: {why}"))
        self._collectors.lose(self._engine, self._actor)

    def _break(self, error: Exception) -> None:
        self.is_broken = True
        pending, self._waiting = self._waiting, {}
        for answer in (self._opened, *(waiting.answer for waiting in pending.values())):
            if not answer.done():
                answer.set_exception(error)
                answer.exception()  # asyncio warns about errors that nobody retrieves


def _completion(waiting: _Waiting, drawn: Drawn, routes: StoredRoutes | None) -> Completion:
    return Completion(
        prompt=waiting.prompt,
        # copies: a view would keep the whole message in the object store
        token_ids=np.array(drawn.token_ids),
        log_probs=np.array(drawn.log_probs),
        policy_versions=drawn.policy_versions,
        routed_experts=routes,
        finish_reason=drawn.finish_reason,
        temperature=waiting.temperature,
        num_retractions=drawn.num_retractions,
        supports=drawn.supports and TokenSupports.joined([drawn.supports]),
    )


async def _answered(call: Awaitable, timeout_s: float) -> Any:
    """The answer of a remote call; TimeoutError if there is none in time."""
    async with asyncio.timeout(timeout_s):
        return await call
