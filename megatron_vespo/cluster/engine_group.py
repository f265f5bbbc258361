"""SGLang servers, each supervised by a Ray actor on the node it runs on."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import ray

from megatron_vespo.cluster.calls import WorkerError, gather
from megatron_vespo.cluster.logs import log_tail, redirect_output
from megatron_vespo.cluster.placement import Placement, host_address
from megatron_vespo.preemption import shield_process
from megatron_vespo.rollout.engine import EngineError, SGLangEngine, find_free_port

CHECK_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0  # for the actor; the server itself holds nothing worth a grace period


class EngineWorker:
    """One engine as a Ray actor; the server dies with it."""

    def __init__(self, args: Namespace, number: int, server_args: list[str], log_dir: Path, loopback: bool):
        shield_process()
        redirect_output(log_dir / f"engine-{number}-supervisor.log")
        self._host = host_address(loopback)
        self._args, self._number, self._server_args = args, number, server_args
        self._log_path = log_dir / f"engine-{number}.log"
        self._engine: SGLangEngine | None = None

    def start(self) -> str:
        """Blocks until the server is healthy; returns its url."""
        port = (
            self._args.rollout_port + self._number if self._args.rollout_port else find_free_port(self._host)
        )
        self._engine = SGLangEngine(
            str(self._args.hf_checkpoint), self._host, port, self._server_args, self._log_path,
            self._args.engine_start_timeout,
        )  # fmt: skip
        self._engine.start()
        return self._engine.url

    def check(self) -> None:
        self._engine.check()

    def stop(self) -> None:
        if self._engine is not None:
            self._engine.stop(timeout_s=0)


class EngineGroup:
    """All engines: start together, be asked whether they live, stop together."""

    def __init__(self, args: Namespace, placement: Placement, server_args: list[str], log_dir: Path):
        self._start_timeout_s = args.engine_start_timeout + CHECK_TIMEOUT_S
        self._log_dir = log_dir
        remote = ray.remote(EngineWorker)
        self._workers = [
            remote.options(
                **placement.options(args.trainer_ranks + number, placement.gpus_per_engine)
            ).remote(args, number, server_args, log_dir, placement.loopback)
            for number in range(args.rollout_engines)
        ]
        self._starting = [worker.start.remote() for worker in self._workers]
        self.urls: list[str] = []

    def wait_until_ready(self) -> list[str]:
        """The servers start in the background from construction on; their urls when all are healthy."""
        self.urls = self._gather(self._starting, "start", self._start_timeout_s)
        return self.urls

    def check(self) -> None:
        """Raise, with the end of the log, when a server has died. Engines still starting count as alive."""
        if self.urls:
            self._gather([worker.check.remote() for worker in self._workers], "check", CHECK_TIMEOUT_S)

    def stop(self) -> None:
        """Kills the servers; an actor that does not answer takes its server along when killed itself."""
        stopping = [worker.stop.remote() for worker in self._workers]
        try:
            self._gather(stopping, "stop", STOP_TIMEOUT_S)
        except (WorkerError, EngineError):
            pass
        for worker in self._workers:
            ray.kill(worker)

    def _gather(self, refs: list, what: str, timeout_s: float) -> list:
        names = [f"engine {number}" for number in range(len(refs))]
        return gather(refs, names, what, timeout_s, self._explain, passed_on=(EngineError,))

    def _explain(self, number: int) -> str:
        return log_tail(self._log_dir / f"engine-{number}.log")
