"""Supervises all engines of a run: knows which serve, and restarts those that die, hang or fail to start."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Condition, Thread

import ray

from megatron_vespo.arguments.engines import EngineSettings
from megatron_vespo.cluster.assignments import Assignment
from megatron_vespo.cluster.engine_actor import EngineActor
from megatron_vespo.cluster.placement import Placement
from megatron_vespo.cluster.supervised_engine import EngineEndpoint, State, SupervisedEngine
from megatron_vespo.observability.activity import EngineStates
from megatron_vespo.rollout.router import LostRequests
from megatron_vespo.rollout.sglang_server import EngineError
from megatron_vespo.system.process_environment import exported_values

POLL_INTERVAL_S = 1.0
DEATH_NOTICE_S = 3.0
STOP_TIMEOUT_S = 5.0  # for the actors; the servers hold nothing that needs a grace period


class ServingUrls(Sequence[str | None]):
    """The url of each engine, None if it does not serve. A live view, which any thread may read."""

    def __init__(self, engines: Sequence[SupervisedEngine]):
        self._engines = engines

    def __len__(self) -> int:
        return len(self._engines)

    def __getitem__(self, number):
        return self._engines[number].serving_url


class EngineFleet:
    """Restarts engines that end, at most `restarts` times each. A thread polls them.

    Methods may be called from any thread. `check` raises EngineError, which ends the run, in two cases:
    fewer than `min_engines` are left, or an engine that never was healthy ends twice in the same way. All
    other events are logged. With `fixed_weights` an engine serves as soon as it runs, without a weight sync.
    """

    def __init__(
        self,
        engines: Sequence[SupervisedEngine],
        *,
        restarts: int,
        min_engines: int,
        log: Callable[[str], None],
        fixed_weights: bool = False,
    ):
        self.urls = ServingUrls(engines)
        self.lost = LostRequests(log)
        self._engines, self._restarts, self._min_engines, self._log = engines, restarts, min_engines, log
        self._changed = Condition()  # guards all fields here and the engines
        self._over: EngineError | None = None
        self._stopping = False
        self._quiet = 0
        self._held = self._starts_wait = False
        self._fixed_weights = fixed_weights
        for engine in engines:
            engine.start()
        self._thread = Thread(target=self._watch, name="engines", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises EngineError if the run cannot continue."""
        if self._over is not None:
            raise EngineError(self._over.what, self._over.log)

    def wait_until_ready(self) -> None:
        """Waits until all engines run, except those given up. Their start timeouts limit the wait."""
        with self._changed:
            while self._num_in(State.STARTING, State.WAITING):
                self._wait()
            self.check()

    def endpoints(self) -> list[EngineEndpoint]:
        """All running servers. Waits for one if there is none."""
        with self._changed:
            while not (found := self._running()):
                self._wait()
            self.check()
        return found

    def any_serves(self) -> bool:
        return any(url is not None for url in self.urls)

    def any_ready(self) -> bool:
        """Whether a running server does not have the policy's weights yet."""
        with self._changed:
            return self._num_in(State.READY) > 0

    def serve(self, endpoints: list[EngineEndpoint]) -> None:
        """Lets requests go to the servers of `endpoints`, which have the current weights."""
        with self._changed:
            for endpoint in endpoints:
                engine = self._engines[endpoint.number]
                if engine.state is State.READY and engine.is_still(endpoint):
                    self._serve(engine)

    def lose(self, endpoint: EngineEndpoint, why: str) -> None:
        """Kill and restart an engine that did not answer."""
        engine = self._engines[endpoint.number]
        with self._changed:
            # the connection breaks a moment before the process is known to be dead, which explains more
            if not self._changed.wait_for(lambda: not engine.is_still(endpoint), DEATH_NOTICE_S):
                self._ended(engine, EngineError(why))

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Inside, no health checks are sent, because the weights change.

        SGLang's /health generates a token. A paused engine cannot, and answers 503 after 20 s.
        """
        with self._changed:
            self._quiet += 1
        try:
            yield
        finally:
            with self._changed:
                self._quiet -= 1

    def hold(self) -> list[EngineEndpoint]:
        """Returns all running servers. Blocks health checks until `let_go`, and starts until `start_waiting`.

        First waits for engines that are starting, and for pending health checks, which make engines generate.
        """
        with self._changed:
            while self._num_in(State.STARTING):
                self._wait()
            if not self._held:
                self._quiet += 1
            self._held = self._starts_wait = True
            while any(engine.awaits_health_check for engine in self._engines):
                self._wait()
            self.check()
            return self._running()

    def start_waiting(self) -> None:
        """Restart the engines that have ended since `hold`."""
        with self._changed:
            self._starts_wait = False
            for engine in self._engines:
                if engine.state is State.WAITING:
                    engine.start()

    def let_go(self) -> None:
        """Ends `hold`, if there was one."""
        self.start_waiting()
        with self._changed:
            if self._held:
                self._quiet -= 1
            self._held = False

    def states(self) -> EngineStates:
        """The engines as they are now, for the display. Never waits: an engine may change meanwhile."""
        engines, states = self._engines, [engine.state for engine in self._engines]
        starting = [
            (engine.number, max(engine.num_starts - 1 + (state is State.WAITING), 0))
            for engine, state in zip(engines, states, strict=True)
            if state in (State.STARTING, State.WAITING)
        ]
        return EngineStates(
            number=len(engines),
            serving=states.count(State.SERVING),
            running=states.count(State.SERVING) + states.count(State.READY),
            starting=tuple(starting),
            restarts=self._restarts,
            lost=tuple(e.number for e, state in zip(engines, states, strict=True) if state is State.GONE),
        )

    def metrics(self) -> dict[str, float]:
        """The number of serving engines, and the restarts and lost requests of the run so far."""
        if not self._engines:
            return {}
        return {
            "engines/serving": float(sum(url is not None for url in self.urls)),
            "engines/restarts": float(sum(engine.num_starts - 1 for engine in self._engines)),
            "engines/lost_requests": float(self.lost.number),
        }

    def stop(self) -> None:
        """Kill the servers. An actor that does not answer is killed, and its server dies with it."""
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
                    except Exception as error:  # otherwise this thread would end unnoticed
                        self._over = EngineError(f"engine {engine.number}: {type(error).__name__}: {error}")
                self._changed.notify_all()
                self._changed.wait(POLL_INTERVAL_S)

    def _poll(self, engine: SupervisedEngine) -> None:
        if engine.state in (State.GONE, State.WAITING):
            return
        try:
            engine.poll(check_health=self._quiet == 0)
        except EngineError as error:
            self._ended(engine, error)
            return
        if self._fixed_weights and engine.state is State.READY:
            self._serve(engine)

    def _serve(self, engine: SupervisedEngine) -> None:
        engine.serve()
        if engine.num_starts > 1:
            self._log(f"engine {engine.number} serves again ({self._serving()})")

    def _ended(self, engine: SupervisedEngine, error: EngineError) -> None:
        used = engine.num_starts - 1
        may_restart = used < self._restarts
        if engine.end(error, State.WAITING if may_restart else State.GONE):
            self._over = error  # a restart does not repair a wrong flag
        elif may_restart:
            self._log(
                f"{error.what}; {self._serving()}, engine {engine.number} is started again "
                f"(restart {used + 1} of {self._restarts})"
            )
            if not self._starts_wait:
                engine.start()
        else:
            engine.stop()
            self._give_up(engine, error)

    def _give_up(self, engine: SupervisedEngine, error: EngineError) -> None:
        what = f"{error.what} and has had its --engine-restarts {self._restarts}: "
        left = len(self._engines) - self._num_in(State.GONE)
        if left < self._min_engines:
            self._over = EngineError(
                f"{what}{left} engines are left, --min-engines is {self._min_engines}; see {engine.log_path}",
                error.log,
            )
        else:
            self._log(f"{what}the run goes on without it, {self._serving()}")

    def _running(self) -> list[EngineEndpoint]:
        return [engine.endpoint for engine in self._engines if engine.is_running]

    def _num_in(self, *states: State) -> int:
        return sum(engine.state in states for engine in self._engines)

    def _serving(self) -> str:
        return f"{self._num_in(State.SERVING)} of {len(self._engines)} engines serve"


def start_engines(
    settings: EngineSettings,
    placement: Placement,
    assignments: Sequence[Assignment],
    server_args: list[str],
    api_key: str | None,
    log_dir: Path,
    log: Callable[[str], None],
    *,
    first: int = 0,
    fixed_weights: bool = False,
) -> EngineFleet:
    """One server per assignment, numbered from `first` on. They start in the background."""
    remote = ray.remote(EngineActor)
    executor = ThreadPoolExecutor(max(1, len(assignments)), thread_name_prefix="engine-health")

    def engine(number: int, assignment: Assignment) -> SupervisedEngine:
        def make_actor():
            return remote.options(**placement.options(assignment)).remote(
                settings, number, server_args, log_dir, placement.loopback, api_key,
                exported_values(os.environ), assignment.devices,
            )  # fmt: skip

        return SupervisedEngine(
            number,
            make_actor,
            start_timeout_s=settings.engine_start_timeout,
            health_timeout_s=settings.engine_health_timeout,
            executor=executor,
            log_path=log_dir / f"engine-{number}.log",
            api_key=api_key,
        )

    return EngineFleet(
        [engine(first + index, assignment) for index, assignment in enumerate(assignments)],
        restarts=settings.engine_restarts,
        min_engines=settings.min_engines,
        log=log,
        fixed_weights=fixed_weights,
    )
