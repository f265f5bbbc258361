"""Virtual time: runs actions in the order of their times."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Clock:
    """Runs actions at points in time. Actions of the same time run in the order of their requests."""

    def __init__(self) -> None:
        self.now = 0.0  # seconds
        self._actions: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def at(self, time: float, action: Callable[[], None]) -> None:
        assert time >= self.now - 1e-9, f"{time} is before now, {self.now}"
        self._number += 1
        heapq.heappush(self._actions, (time, self._number, action))

    def run(self, ended: Callable[[], bool]) -> None:
        """Runs until `ended` returns True; it is asked after every action."""
        while not ended():
            assert self._actions, f"nothing can happen any more after {self.now} s"
            time, _, action = heapq.heappop(self._actions)
            self.now = max(self.now, time)
            action()


class Work:
    """Work of a given number of undisturbed seconds, which others may slow down or stop."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._left, self._speed, self._since, self._plan = 0.0, 1.0, 0.0, 0
        self._done: Callable[[], None] | None = None

    def start(self, seconds: float, done: Callable[[], None]) -> None:
        assert self._done is None, "still working"
        self._left, self._since, self._done = seconds, self._clock.now, done
        self._schedule()

    def set_speed(self, speed: float) -> None:
        """1: undisturbed; 0: stopped."""
        if speed == self._speed:
            return
        self._left = max(self._left - (self._clock.now - self._since) * self._speed, 0.0)
        self._since, self._speed = self._clock.now, speed
        if self._done is not None:
            self._schedule()

    def _schedule(self) -> None:
        self._plan += 1
        if self._speed > 0:
            plan = self._plan
            self._clock.at(self._clock.now + self._left / self._speed, lambda: self._finish(plan))

    def _finish(self, plan: int) -> None:
        if plan == self._plan and self._done is not None:
            done, self._done = self._done, None
            done()
