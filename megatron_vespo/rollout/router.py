"""Chooses the engine for every request, and another one if that engine is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_vespo.rollout.engine_client import ConnectionLostError

# an engine that lost a request gets no other for this long: longer than detecting its death takes
AVOID_S = 10.0
POLL_S = 0.5
HOLD_POLL_S = 0.05
ABORT_TIMEOUT_S = 5.0
OnRequests = Callable[[int, int, int, int], None]  # engine, start, end, number of requests


class CollectError(RuntimeError):
    """A generate request without an answer, or engines with unusable answers."""


class _LostError(Exception):
    """A request that its engine will not answer; the message names the request and the cause."""


class RoutedClient(Protocol):
    """What a router needs of an engine's client: see `EngineClient`."""

    url: str

    async def abort(self) -> None: ...


@dataclass(eq=False)
class _Engine[Client: RoutedClient]:
    number: int
    client: Client
    gone: asyncio.Future  # done when the engine is out of service
    outstanding: int = 0
    working_since: int = 0  # nanoseconds since 1970
    avoid_until: float = 0.0


class LostRequests:
    """Counts requests that were sent again, from any thread, and reports them in one line per engine."""

    def __init__(self, log: Callable[[str], None] | None = None):
        self.number = 0
        self._log, self._lock = log, threading.Lock()
        self._unreported: dict[str, tuple[int, str]] = {}  # url -> (count, why the first one was lost)

    def add(self, url: str, why: str) -> None:
        with self._lock:
            self.number += 1
            number, first = self._unreported.get(url, (0, why))
            self._unreported[url] = number + 1, first

    def report(self) -> None:
        """Logs the requests lost since the last report."""
        with self._lock:
            unreported, self._unreported = self._unreported, {}
        for number, why in unreported.values():
            if self._log is not None:
                self._log(f"{why}; {number} of its requests are sent again")


class Router[Client: RoutedClient]:
    """Sends each request to the engine at `urls` with the fewest requests; usable only inside one event loop.

    `urls[number]` may change at any time; None: out of service. If an engine goes out of service, or does not
    answer for `timeout_s`, its requests go to other engines, each at most `max_attempts` times. While no
    engine serves, requests wait for one, at most `timeout_s`.

    `on_requests` is called when a request ends. Its time span starts when the engine's previous request
    ended, or when the engine started to work. So the spans of one engine follow each other, and their sum is
    its whole working time.
    """

    def __init__(
        self,
        urls: Sequence[str | None],
        make_client: Callable[[int, str], Client],
        *,
        max_requests: int,
        max_attempts: int,
        timeout_s: float,
        on_requests: OnRequests | None,
        lost: LostRequests,
    ):
        self._urls, self._make_client = urls, make_client
        self._max_attempts, self._timeout_s = max_attempts, timeout_s
        self._on_requests, self._lost = on_requests, lost
        self._engines: dict[int, _Engine[Client]] = {}
        self._free_places = asyncio.Semaphore(max_requests)
        self._allowed = asyncio.Event()
        self._allowed.set()

    async def send[Answer](self, request: Callable[[Client], Awaitable[Answer]], what: str) -> Answer:
        """Calls `request` with the chosen engine's client; returns the answer. `what` names the request."""
        async with self._free_places:
            for attempt in range(1, self._max_attempts + 1):
                engine = await self._choose(what)
                try:
                    return await self._ask(engine, request, what)
                except _LostError as error:
                    engine.avoid_until = time.monotonic() + AVOID_S
                    if attempt == self._max_attempts:
                        times = f"; {attempt} engines in a row" if attempt > 1 else ""
                        raise CollectError(f"{error}{times}") from error.__cause__
                    self._lost.add(engine.client.url, str(error))
        raise AssertionError(f"--max-attempts {self._max_attempts}")

    def refresh(self) -> None:
        """Applies changes of `urls`; must be called every second while requests run."""
        for number, url in enumerate(self._urls):
            engine = self._engines.get(number)
            if engine is not None and engine.client.url != url:
                del self._engines[number]
                engine.gone.set_result(None)
            if url is not None and number not in self._engines:
                gone = asyncio.get_running_loop().create_future()
                self._engines[number] = _Engine(number, self._make_client(number, url), gone)

    async def hold(self, timeout_s: float) -> None:
        """Makes engines return unfinished responses, and sends no request until `release`."""
        self._allowed.clear()
        deadline = time.monotonic() + timeout_s
        while busy := [engine for engine in self._engines.values() if engine.outstanding]:
            if time.monotonic() > deadline:
                urls = ", ".join(engine.client.url for engine in busy)
                raise CollectError(f"{urls}: still generating {timeout_s:g} s after being asked to stop")
            # Repeated, because a request may reach its engine after the abort. The supervisor detects an
            # engine that does not answer.
            aborts = [asyncio.create_task(engine.client.abort()) for engine in busy]
            await asyncio.wait(aborts, timeout=ABORT_TIMEOUT_S)
            for abort in aborts:
                abort.cancel()
            await asyncio.gather(*aborts, return_exceptions=True)
            await asyncio.sleep(HOLD_POLL_S)

    def release(self) -> None:
        self._allowed.set()

    async def _choose(self, what: str) -> _Engine[Client]:
        await self._allowed.wait()
        deadline = time.monotonic() + self._timeout_s
        while True:
            self.refresh()
            now = time.monotonic()
            engines = [engine for engine in self._engines.values() if engine.avoid_until <= now]
            if engines:
                return min(engines, key=lambda engine: engine.outstanding)
            if now > deadline:
                raise CollectError(f"{what}: no engine has served for {self._timeout_s:g} s")
            await asyncio.sleep(POLL_S)

    async def _ask[Answer](
        self, engine: _Engine[Client], request: Callable[[Client], Awaitable[Answer]], what: str
    ) -> Answer:
        if engine.outstanding == 0:
            engine.working_since = time.time_ns()
        engine.outstanding += 1
        url = engine.client.url
        asking = asyncio.ensure_future(request(engine.client))
        # retrieves the error even if no caller waits any more
        asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            await asyncio.wait((asking, engine.gone), return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise _LostError(f"engine {url}: taken out of service at {what}")
            return asking.result()
        except TimeoutError as error:
            raise _LostError(f"engine {url}: no completion of {what} within {self._timeout_s:g} s") from error
        except ConnectionLostError as error:
            raise _LostError(f"engine {url}: connection lost at {what} ({error})") from error
        finally:
            asking.cancel()
            engine.outstanding -= 1
            start, engine.working_since = engine.working_since, time.time_ns()
            if self._on_requests is not None:
                self._on_requests(engine.number, start, engine.working_since, 1)
