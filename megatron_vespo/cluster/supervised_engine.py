"""One engine's place in the cluster: its actor, the server that runs there now, and whether it answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import ray

from megatron_vespo.cluster.logs import log_tail
from megatron_vespo.rollout.sglang_server import EngineError
from megatron_vespo.system.http import get_json

CHECK_TIMEOUT_S = 60.0  # for an actor's word on its server's process
PROBES_PER_TIMEOUT = 6


class SupervisedEngine:
    """`look` asks nothing that blocks; it is called every second. Not thread-safe.

    `make_actor` makes a new actor of EngineActor, at the beginning and where the old one has gone with its
    process or its node. `probes` has a thread for each engine.
    """

    def __init__(
        self,
        number: int,
        make_actor: Callable[[], Any],
        *,
        start_timeout_s: float,
        health_timeout_s: float,
        probes: Executor,
        log_path: Path,
        api_key: str | None,
    ):
        self.number, self.log_path = number, log_path
        self.num_starts = 0  # also the name of the server that runs now
        self.url: str | None = None  # None until it is healthy
        self._make_actor, self._actor = make_actor, None
        self._start_timeout_s, self._health_timeout_s = start_timeout_s, health_timeout_s
        self._probes, self._api_key = probes, api_key
        self._probe: Future | None = None
        self._probe_due = self._heard = 0.0

    def start(self) -> None:
        """Begins to start a server, in the place of the old one, which is killed."""
        self.url = self._probe = None
        self.num_starts += 1
        if self._actor is None:
            self._actor = self._make_actor()
        self._ask("start", self._start_timeout_s + CHECK_TIMEOUT_S)

    def look(self, probing: bool) -> None:
        """Takes in what has happened. EngineError when the server ended, could not start or does not answer.

        Without `probing` nothing is asked of the server itself, and its silence does not count.
        """
        self._look_at_call()
        if self.url is not None:
            self._look_at_health(probing)

    @property
    def is_probed(self) -> bool:
        """Whether the server has been asked for a sign of life and not answered."""
        return self._probe is not None and not self._probe.done()

    def stop(self) -> ray.ObjectRef | None:
        """Begins to kill the server."""
        return None if self._actor is None else self._actor.stop.remote()

    def kill_actor(self) -> None:
        """Kills the actor, and with it the server."""
        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)

    def _ask(self, what: str, timeout_s: float) -> None:
        self._call, self._asked = getattr(self._actor, what).remote(), what
        self._answer_due = time.monotonic() + timeout_s

    def _look_at_call(self) -> None:
        ready, _ = ray.wait([self._call], timeout=0)
        if not ready:
            if time.monotonic() > self._answer_due:
                self.kill_actor()
                raise EngineError(
                    f"engine {self.number}'s actor: no answer to {self._asked}", log_tail(self.log_path)
                )
            return
        try:
            answer = ray.get(self._call)
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
            self.url, self._heard = answer, time.monotonic()
        self._ask("check", CHECK_TIMEOUT_S)

    def _look_at_health(self, probing: bool) -> None:
        now = time.monotonic()
        if self._probe is not None and self._probe.done():
            if self._probe.exception() is None:
                self._heard = now
            self._probe, self._probe_due = None, now + self._health_timeout_s / PROBES_PER_TIMEOUT
        if not probing:
            self._heard = now
        elif self._probe is None and now >= self._probe_due:
            self._probe = self._probes.submit(
                get_json, self.url, "/health", self._health_timeout_s, self._api_key
            )
        if now - self._heard > self._health_timeout_s:
            raise EngineError(
                f"engine {self.url} hangs: it has generated nothing for {self._health_timeout_s:g} s",
                log_tail(self.log_path),
            )
