"""All engines: which of them run and serve, and what becomes of those that die, hang or fail to start."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from threading import Condition, Thread

import ray

from megatron_vespo.cluster.engine_actor import EngineActor
from megatron_vespo.cluster.placement import Placement
from megatron_vespo.cluster.supervised_engine import SupervisedEngine
from megatron_vespo.rollout.router import LostRequests
from megatron_vespo.rollout.sglang_server import EngineError, EnginePortError
from megatron_vespo.system.process_environment import exported_values

POLL_INTERVAL_S = 1.0
DEATH_NOTICE_S = 3.0
STOP_TIMEOUT_S = 5.0  # for the actors; the servers themselves hold nothing worth a grace period


class State(Enum):
    STARTING = "starting"
    READY = "ready"  # runs, but has not the policy's weights
    SERVING = "serving"
    GONE = "gone"  # its restarts are used up


@dataclass(frozen=True)
class EngineEndpoint:
    """One server that runs: of engine `number`, its start number `start`."""

    number: int
    start: int
    url: str
    fresh: bool  # has not had a policy yet


class EngineFleet:
    """Restarts the engines that end, at most `restarts` times each; a thread of its own polls them.

    Methods may be called from any thread. `urls[number]` is None unless the engine serves: it changes while
    others read it. The run is over when fewer than `min_engines` are left, or when an engine that never was
    healthy ends twice in the same way: then `check` raises EngineError. `log` prints all other events.
    """

    def __init__(
        self,
        engines: Sequence[SupervisedEngine],
        *,
        restarts: int,
        min_engines: int,
        log: Callable[[str], None],
    ):
        self.urls: list[str | None] = [None] * len(engines)
        self.lost = LostRequests(log)
        self._engines, self._restarts, self._min_engines, self._log = engines, restarts, min_engines, log
        self._states = [State.STARTING] * len(engines)
        self._been_healthy = [False] * len(engines)
        self._last_ends: list[str | None] = [None] * len(engines)
        self._changed = Condition()  # guards everything here
        self._over: EngineError | None = None
        self._stopping = False
        self._quiet = 0
        self._held = self._starts_wait = False
        self._to_start: list[SupervisedEngine] = []
        for engine in engines:
            engine.start()
        self._thread = Thread(target=self._watch, name="engines", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises EngineError when the run cannot go on."""
        if self._over is not None:
            raise EngineError(self._over.what, self._over.log)

    def wait_until_ready(self) -> None:
        """Until all engines run, but for those that are given up; their deadlines bound it."""
        with self._changed:
            while State.STARTING in self._states:
                self._wait()
            self.check()

    def endpoints(self) -> list[EngineEndpoint]:
        """All servers that run; waits for one where there is none."""
        with self._changed:
            while not (found := self._running()):
                self._wait()
            self.check()
        return found

    def any_serves(self) -> bool:
        return any(url is not None for url in self.urls)

    def any_ready(self) -> bool:
        """Whether a server runs that has not the policy's weights yet."""
        with self._changed:
            return State.READY in self._states

    def serve(self, endpoints: list[EngineEndpoint]) -> None:
        """They have the current weights, requests may go to them."""
        with self._changed:
            for endpoint in endpoints:
                if self._states[endpoint.number] is State.READY and self._is_current(endpoint):
                    self._states[endpoint.number] = State.SERVING
                    self.urls[endpoint.number] = endpoint.url
                    if endpoint.start > 1:
                        self._log(f"engine {endpoint.number} serves again ({self._serving()})")

    def lose(self, endpoint: EngineEndpoint, why: str) -> None:
        """It did not answer: kill what is left of it and start it again."""
        with self._changed:
            # a connection breaks a moment before its process is seen to be dead, which says more
            if not self._changed.wait_for(lambda: not self._is_current(endpoint), DEATH_NOTICE_S):
                self._ended(self._engines[endpoint.number], EngineError(why))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """While their weights change, engines are not taken for hung.

        SGLang's /health generates a token, which a paused engine does not: it answers 503 after 20 s.
        """
        with self._changed:
            self._quiet += 1
        try:
            yield
        finally:
            with self._changed:
                self._quiet -= 1

    def hold(self) -> list[EngineEndpoint]:
        """All that run. Nobody is asked for a sign of life until `let_go`, or started until `start_waiting`.

        Waits for those that start, and for signs of life that are asked for: engines generate them.
        """
        with self._changed:
            while self._states.count(State.STARTING) > len(self._to_start):
                self._wait()
            if not self._held:
                self._quiet += 1
            self._held = self._starts_wait = True
            while any(engine.awaits_health_check for engine in self._engines):
                self._wait()
            self.check()
            return self._running()

    def start_waiting(self) -> None:
        """Start again what has ended since `hold`."""
        with self._changed:
            self._starts_wait = False
            waiting, self._to_start = self._to_start, []
            for engine in waiting:
                engine.start()

    def let_go(self) -> None:
        """The end of `hold`, if there was one."""
        self.start_waiting()
        with self._changed:
            if self._held:
                self._quiet -= 1
            self._held = False

    def metrics(self) -> dict[str, float]:
        """Of now, and of the run so far."""
        if not self._engines:
            return {}
        return {
            "engines/serving": float(sum(url is not None for url in self.urls)),
            "engines/restarts": float(sum(engine.num_starts - 1 for engine in self._engines)),
            "engines/lost_requests": float(self.lost.number),
        }

    def stop(self) -> None:
        """Kills the servers; an actor that does not answer takes its server along when killed itself."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(STOP_TIMEOUT_S)
        calls = [call for engine in self._engines if (call := engine.stop()) is not None]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=STOP_TIMEOUT_S)
        for engine in self._engines:
            engine.kill_actor()

    def _wait(self) -> None:
        self.check()
        self._changed.wait(POLL_INTERVAL_S)

    def _watch(self) -> None:
        with self._changed:
            while not self._stopping and self._over is None:
                for engine in self._engines:
                    try:
                        self._poll(engine)
                    except Exception as error:  # or nobody would look after the engines, unnoticed
                        self._over = EngineError(f"engine {engine.number}: {type(error).__name__}: {error}")
                self._changed.notify_all()
                self._changed.wait(POLL_INTERVAL_S)

    def _poll(self, engine: SupervisedEngine) -> None:
        number = engine.number
        if self._states[number] is State.GONE or engine in self._to_start:
            return
        try:
            engine.poll(check_health=self._quiet == 0)
        except EngineError as error:
            self._ended(engine, error)
            return
        if self._states[number] is State.STARTING and engine.url is not None:
            self._states[number] = State.READY
            self._been_healthy[number] = True

    def _ended(self, engine: SupervisedEngine, error: EngineError) -> None:
        number = engine.number
        self.urls[number] = None
        way = re.sub(r"\d+", "", error.what)  # without ports
        again = isinstance(error, EnginePortError) or self._last_ends[number] == way
        if not self._been_healthy[number] and again:
            self._over = error  # a wrong flag will not get better
            return
        self._last_ends[number] = way
        used = engine.num_starts - 1
        if used < self._restarts:
            self._states[number] = State.STARTING
            self._log(
                f"{error.what}; {self._serving()}, engine {number} is started again "
                f"(restart {used + 1} of {self._restarts})"
            )
            if self._starts_wait:
                self._to_start.append(engine)
            else:
                engine.start()
            return
        self._states[number] = State.GONE
        engine.stop()
        left = sum(state is not State.GONE for state in self._states)
        if left < self._min_engines:
            self._over = EngineError(
                f"{error.what} and has had its --engine-restarts {self._restarts}: {left} engines are left, "
                f"--min-engines is {self._min_engines}; see {engine.log_path}",
                error.log,
            )
        else:
            self._log(
                f"{error.what} and has had its --engine-restarts {self._restarts}: "
                f"the run goes on without it, {self._serving()}"
            )

    def _running(self) -> list[EngineEndpoint]:
        return [
            EngineEndpoint(engine.number, engine.num_starts, engine.url, fresh=state is State.READY)
            for engine, state in zip(self._engines, self._states, strict=True)
            if state in (State.READY, State.SERVING)
        ]

    def _is_current(self, endpoint: EngineEndpoint) -> bool:
        running = self._states[endpoint.number] in (State.READY, State.SERVING)
        return running and self._engines[endpoint.number].num_starts == endpoint.start

    def _serving(self) -> str:
        return f"{self._states.count(State.SERVING)} of {len(self._states)} engines serve"


def start_engines(
    args: Namespace,
    placement: Placement,
    server_args: list[str],
    api_key: str | None,
    log_dir: Path,
    log: Callable[[str], None],
) -> EngineFleet:
    """A server for each engine of `placement`; they start in the background."""
    remote = ray.remote(EngineActor)
    executor = ThreadPoolExecutor(max(1, args.rollout_engines), thread_name_prefix="engine-health")

    def engine(number: int) -> SupervisedEngine:
        assignment = placement.engines[number]

        def make_actor():
            return remote.options(**placement.options(assignment)).remote(
                args, number, server_args, log_dir, placement.loopback, api_key, exported_values(os.environ),
                assignment.devices,
            )  # fmt: skip

        return SupervisedEngine(
            number,
            make_actor,
            start_timeout_s=args.engine_start_timeout,
            health_timeout_s=args.engine_health_timeout,
            executor=executor,
            log_path=log_dir / f"engine-{number}.log",
            api_key=api_key,
        )

    return EngineFleet(
        [engine(number) for number in range(args.rollout_engines)],
        restarts=args.engine_restarts,
        min_engines=args.min_engines,
        log=log,
    )
