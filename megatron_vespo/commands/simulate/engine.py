"""Simulates an engine that decodes many requests at once."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Protocol

from megatron_vespo.commands.simulate.clock import Clock
from megatron_vespo.commands.simulate.rates import EngineRates

SAME_TOKEN = 1e-6  # requests whose ends differ by less, in tokens, end together


class Owner(Protocol):
    """The owner of requests; it is told how they end."""

    def done(self, request: Request) -> None: ...

    def lost(self, request: Request) -> None:
        """The request's engine has died."""


@dataclass(eq=False, slots=True)
class Request:
    """One completion."""

    owner: Owner
    prompt_tokens: int
    tokens: int  # length of the completion
    made: int = 0  # tokens made before it was interrupted
    first_version: int | None = None  # of the weights, at its first and its last token
    last_version: int = 0
    engine: Engine | None = None  # the engine that runs it
    running_since: float | None = None  # in its engine's virtual time
    cancelled: bool = False


class Engine:
    """Processor sharing: every running request gets one token per `decode.seconds(running)`.

    `virtual` counts the tokens that a request running from the start would have made. A request that starts
    at v and makes n tokens ends at v + n, whatever other requests come and go. So a heap of these ends is
    sufficient: O(log n) per request.
    """

    def __init__(
        self,
        clock: Clock,
        rates: EngineRates,
        on_end: Callable[[Request], None],
        on_working: Callable[[], None] | None = None,
    ):
        self._clock, self._rates, self._on_end, self._on_working = clock, rates, on_end, on_working
        self.version = 0  # of the weights
        self.virtual = 0.0
        self.prefilling = rates.decode.first  # seconds of prefill left before anything is decoded
        self.num_running = 0
        self.up = True
        self.tokens_made = 0.0
        self.busy: list[list[float]] = []  # start and end of each busy interval
        self._paused, self._speed = False, 1.0
        self._ends: list[tuple[float, int, Request]] = []  # ends of running requests, in virtual time
        self._waiting: deque[Request] = deque()
        self._since, self._plan, self._number, self._works = 0.0, 0, 0, False

    @property
    def works(self) -> bool:
        return self._works

    def submit(self, request: Request) -> None:
        self._advance()
        request.engine = self
        self._waiting.append(request)
        self._go_on()

    def cancel(self, request: Request) -> None:
        """Removes the request; its place is free at once."""
        self._advance()
        request.cancelled, request.engine = True, None
        if request.running_since is not None:
            request.running_since = None
            self.num_running -= 1
        self._go_on()

    def pause(self) -> None:
        """Stops decoding; running requests stay in the engine."""
        self._advance()
        self._paused = True
        self._go_on()

    def resume(self, version: int, recompute: bool) -> None:
        """Continues with new weights; `recompute`: the KV cache of running requests is computed again."""
        self._advance()
        self._paused, self.version = False, version
        if recompute:
            tokens = sum(r.prompt_tokens + self._made(r) for r in self._running())
            self.prefilling += tokens / self._rates.prefill
        self._go_on()

    def interrupt(self) -> list[Request]:
        """Takes all requests out; each keeps its number of tokens made."""
        self._advance()
        taken = [*self._running(), *(r for r in self._waiting if not r.cancelled)]
        for request in taken:
            request.made = self._made(request)
            request.engine = request.running_since = None
        self._ends.clear()
        self._waiting.clear()
        self.num_running, self.prefilling = 0, 0.0
        self._go_on()
        return taken

    def set_up(self, up: bool) -> None:
        self._advance()
        self.up = up
        self._go_on()

    def set_speed(self, speed: float) -> None:
        """`speed` is relative to the engine's rates."""
        if speed != self._speed:
            self._advance()
            self._speed = speed
            self._go_on()

    def _made(self, request: Request) -> int:
        if request.running_since is None:
            return request.made
        return min(request.made + int(self.virtual - request.running_since), request.tokens - 1)

    def _running(self) -> Iterator[Request]:
        return (request for _, _, request in self._ends if request.running_since is not None)

    def _advance(self) -> None:
        """Advances `virtual` to the present."""
        seconds = (self._clock.now - self._since) * self._speed
        self._since = self._clock.now
        if not self._works:
            return
        before = min(seconds, self.prefilling)
        self.prefilling -= before
        tokens = (seconds - before) / self._rates.decode.seconds(self.num_running)
        self.virtual += tokens
        self.tokens_made += tokens * self.num_running

    def _go_on(self) -> None:
        """After a change: starts waiting requests and schedules the next end."""
        while self.up and self._waiting and self.num_running < self._rates.max_running:
            self._start(self._waiting.popleft())
        while self._ends and self._ends[0][2].running_since is None:
            heapq.heappop(self._ends)
        works = bool(self._ends) and self.up and not self._paused
        if works != self._works:
            self._works = works
            self._note_work(works)
        self._plan += 1
        if works:
            tokens = max(self._ends[0][0] - self.virtual, 0.0)
            seconds = self.prefilling + tokens * self._rates.decode.seconds(self.num_running)
            plan = self._plan
            self._clock.at(self._clock.now + seconds / self._speed, lambda: self._end(plan))

    def _note_work(self, works: bool) -> None:
        if works:
            self.busy.append([self._clock.now, inf])
        else:
            self.busy[-1][1] = self._clock.now
        if self._on_working is not None:
            self._on_working()

    def _start(self, request: Request) -> None:
        if request.cancelled:
            return
        self.prefilling += (request.prompt_tokens + request.made) / self._rates.prefill
        request.running_since = self.virtual
        if request.first_version is None:
            request.first_version = self.version
        self._number += 1
        heapq.heappush(self._ends, (self.virtual + request.tokens - request.made, self._number, request))
        self.num_running += 1

    def _end(self, plan: int) -> None:
        if plan != self._plan:
            return  # the state has changed since
        self._advance()
        self.prefilling = 0.0
        self.virtual = max(self.virtual, self._ends[0][0])  # at least this end, despite rounding
        ended = []
        while self._ends and self._ends[0][0] <= self.virtual + SAME_TOKEN:
            request = heapq.heappop(self._ends)[2]
            if request.running_since is not None:
                request.made, request.last_version = request.tokens, self.version
                request.running_since = None
                self.num_running -= 1
                ended.append(request)
        self._go_on()
        for request in ended:
            self._on_end(request)
