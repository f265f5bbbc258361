"""Spreads requests over engines."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable

from megatron_vespo.commands.simulate.clock import Clock
from megatron_vespo.commands.simulate.engine import Engine, Request
from megatron_vespo.commands.simulate.rates import EngineRates


class Pool:
    """A request goes to the engine with the fewest. At most `places` requests run, the rest wait."""

    def __init__(
        self,
        clock: Clock,
        rates: EngineRates,
        num_engines: int,
        places: int,
        on_working: Callable[[], None] | None = None,
    ):
        self.engines = engines = [Engine(clock, rates, self._end, on_working) for _ in range(num_engines)]
        self._free = places
        self._held = dict.fromkeys(engines, 0)
        # (held, place, engine): one entry of each engine is current, the others are out of date
        self._least = [(0, index, engine) for index, engine in enumerate(engines)]
        self._index = {engine: index for index, engine in enumerate(engines)}
        self._waiting: deque[Request] = deque()

    def submit(self, request: Request) -> None:
        self._waiting.append(request)
        self._spread()

    def cancel(self, request: Request) -> None:
        engine = request.engine
        request.cancelled = True
        if engine is not None:
            engine.cancel(request)
            self._release(engine)

    def pause(self) -> None:
        for engine in self.engines:
            engine.pause()

    def resume(self, version: int, recompute: bool) -> None:
        for engine in self.engines:
            engine.resume(version, recompute)

    def interrupt(self) -> list[Request]:
        """Takes all requests out of the engines."""
        taken = []
        for engine in self.engines:
            out = engine.interrupt()
            self._free += len(out)
            self._hold(engine, -len(out))
            taken += out
        return taken

    def set_up(self, engine: Engine, up: bool) -> None:
        """An engine dies, and its requests with it, or comes back."""
        lost = [] if up else engine.interrupt()
        engine.set_up(up)
        self._free += len(lost)
        self._hold(engine, -len(lost))
        for request in lost:
            if not request.cancelled:
                request.made = 0
                request.owner.lost(request)
        self._spread()

    def _end(self, request: Request) -> None:
        engine, request.engine = request.engine, None
        if engine is not None:  # not cancelled as a consequence of another request's end
            self._release(engine)
            request.owner.done(request)

    def _release(self, engine: Engine) -> None:
        self._free += 1
        self._hold(engine, -1)
        self._spread()

    def _hold(self, engine: Engine, change: int) -> None:
        self._held[engine] += change
        heapq.heappush(self._least, (self._held[engine], self._index[engine], engine))

    def _spread(self) -> None:
        while self._waiting and self._free > 0:
            if self._waiting[0].cancelled:
                self._waiting.popleft()
                continue
            engine = self._fewest()
            if engine is None:
                return
            self._free -= 1
            self._hold(engine, 1)
            engine.submit(self._waiting.popleft())

    def _fewest(self) -> Engine | None:
        while self._least:
            held, _, engine = self._least[0]
            if engine.up and held == self._held[engine]:
                return engine
            heapq.heappop(self._least)
        return None
