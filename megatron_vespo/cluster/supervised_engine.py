"""Supervises one engine: its actor, the server that the actor runs now, and whether the server answers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from megatron_vespo.cluster.logs import log_tail
from megatron_vespo.rollout.sglang_server import EngineError, EnginePortError
from megatron_vespo.system.http import get_json

CHECK_TIMEOUT_S = 60.0  # for the actor to answer `check`
HEALTH_CHECKS_PER_TIMEOUT = 6


class State(Enum):
    STARTING = "starting"
    WAITING = "waiting"  # has ended and may not be started yet
    READY = "ready"  # runs, but does not have the policy's weights
    SERVING = "serving"
    GONE = "gone"  # its restarts are used up


@dataclass(frozen=True)
class EngineEndpoint:
    """One running server: start number `start` of engine `number`."""

    number: int
    start: int
    url: str
    fresh: bool  # has never had the policy's weights


class SupervisedEngine:
    """One engine. `poll` is called every second and never blocks. Not thread-safe.

    `make_actor` makes a new EngineActor, at the start and when the old one died with its process or node.
    Health checks run in `executor`, which has one thread per engine.
    """

    def __init__(
        self,
        number: int,
        make_actor: Callable[[], Any],
        *,
        start_timeout_s: float,
        health_timeout_s: float,
        executor: Executor,
        log_path: Path,
        api_key: str | None,
    ):
        self.number, self.log_path = number, log_path
        self.num_starts = 0  # also the number of the server that runs now
        self.url: str | None = None  # None unless it is healthy
        self.state = State.WAITING
        self._been_healthy = False
        self._last_end: str | None = None
        self._make_actor, self._actor = make_actor, None
        self._start_timeout_s, self._health_timeout_s = start_timeout_s, health_timeout_s
        self._executor, self._api_key = executor, api_key
        self._health_check: Future | None = None
        self._next_check = self._last_healthy = 0.0

    def start(self) -> None:
        """Begin to start a server. The old one is killed."""
        self.url = self._health_check = None
        self.state = State.STARTING
        self.num_starts += 1
        if self._actor is None:
            self._actor = self._make_actor()
        self._ask("start", self._start_timeout_s + CHECK_TIMEOUT_S)

    @property
    def is_running(self) -> bool:
        return self.state in (State.READY, State.SERVING)

    @property
    def endpoint(self) -> EngineEndpoint:
        """The endpoint of the running server."""
        assert self.url is not None
        return EngineEndpoint(self.number, self.num_starts, self.url, fresh=self.state is State.READY)

    @property
    def serving_url(self) -> str | None:
        """The url if the engine serves, else None. Any thread may ask."""
        url = self.url  # read first: a new server's url comes with another state
        return url if self.state is State.SERVING else None

    def become_ready(self, url: str) -> None:
        """Note that the server is healthy at `url`."""
        self.url, self.state, self._been_healthy = url, State.READY, True

    def serve(self) -> None:
        """Note that the server has the policy's weights: requests may go to it."""
        self.state = State.SERVING

    def is_still(self, endpoint: EngineEndpoint) -> bool:
        """Whether the server of `endpoint` still runs."""
        return self.is_running and self.num_starts == endpoint.start

    def end(self, error: EngineError, state: State) -> bool:
        """Note that the server has ended; `state` is the next state. Returns True if a restart cannot help.

        A restart cannot help if no server of this engine was ever healthy, and this one ended like the last
        one or could not get its port.
        """
        self.url, self.state = None, state
        way, last = re.sub(r"\d+", "", error.what), self._last_end  # without ports
        self._last_end = way
        return not self._been_healthy and (isinstance(error, EnginePortError) or way == last)

    def poll(self, check_health: bool) -> None:
        """Raises EngineError if the server has ended, could not start or does not answer.

        Without `check_health` no health check is sent, and silence does not count.
        """
        self._poll_actor()
        if self.url is not None:
            self._poll_health(self.url, check_health)

    @property
    def awaits_health_check(self) -> bool:
        """Whether a health check is still unanswered."""
        return self._health_check is not None and not self._health_check.done()

    def stop(self) -> ray.ObjectRef | None:
        """Begin to kill the server."""
        return None if self._actor is None else self._actor.stop.remote()

    def kill_actor(self) -> None:
        """Kill the actor, and with it the server."""
        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)

    def _ask(self, what: str, timeout_s: float) -> None:
        self._call, self._asked = getattr(self._actor, what).remote(), what
        self._answer_due = time.monotonic() + timeout_s

    def _poll_actor(self) -> None:
        ready, _ = ray.wait([self._call], timeout=0)
        if not ready:
            if time.monotonic() > self._answer_due:
                self.kill_actor()
                raise EngineError(
                    f"engine {self.number}'s actor: no answer to {self._asked}", log_tail(self.log_path)
                )
            return
        try:
            answer: Any = ray.get(self._call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EngineError):
                raise error.cause from None
            raise EngineError(f"engine {self.number}: {type(error.cause).__name__}: {error.cause}") from None
        except ray.exceptions.RayActorError as error:
            self._actor = None
            reason = str(error).strip().splitlines()[-1]
            raise EngineError(
                f"engine {self.number}'s actor died: {reason}", log_tail(self.log_path)
            ) from None
        if self.url is None:
            self._last_healthy = time.monotonic()
            self.become_ready(answer)
        self._ask("check", CHECK_TIMEOUT_S)

    def _poll_health(self, url: str, check_health: bool) -> None:
        now = time.monotonic()
        if self._health_check is not None and self._health_check.done():
            if self._health_check.exception() is None:
                self._last_healthy = now
            self._health_check = None
            self._next_check = now + self._health_timeout_s / HEALTH_CHECKS_PER_TIMEOUT
        if not check_health:
            self._last_healthy = now
        elif self._health_check is None and now >= self._next_check:
            self._health_check = self._executor.submit(
                get_json, url, "/health", self._health_timeout_s, self._api_key
            )
        if now - self._last_healthy > self._health_timeout_s:
            raise EngineError(
                f"engine {url} hangs: it has generated nothing for {self._health_timeout_s:g} s",
                log_tail(self.log_path),
            )
