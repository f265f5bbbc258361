"""All Megatron ranks as one object."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray

from megatron_vespo.cluster.calls import gather
from megatron_vespo.cluster.logs import log_tail
from megatron_vespo.cluster.placement import Placement
from megatron_vespo.cluster.trainer_worker import TrainerWorker
from megatron_vespo.observability.layout_report import LayoutMeasurement
from megatron_vespo.observability.tracing import Span
from megatron_vespo.types import TrainingSample
from megatron_vespo.weight_sync.distributed import EnginesLostError

STOP_TIMEOUT_S = 60.0
SYNC_DEADLINES = 4  # of a weight sync's several waits for engines


class TrainerGroup:
    """Each method runs on every rank and returns rank 0's answer. `watch` is called every second.

    `on_calls(rank, spans)` is told after every method what the ranks have done when.
    """

    def __init__(
        self,
        args: Namespace,
        placement: Placement,
        log_dir: Path,
        watch: Callable[[], None],
        on_calls: Callable[[int, list[Span]], None] | None = None,
    ):
        self._args, self._log_dir, self._watch, self._on_calls = args, log_dir, watch, on_calls
        remote = ray.remote(TrainerWorker)
        self._workers = [
            remote.options(**placement.options(rank, placement.gpus_per_rank)).remote(
                args, rank, log_dir, placement.loopback
            )
            for rank in range(args.trainer_ranks)
        ]

    def start(self) -> dict | None:
        """Bring Megatron up; returns the rollout state of the checkpoint that was resumed, if any."""
        timeout = self._args.worker_start_timeout
        [(host, port)] = self._gather([self._workers[0].rendezvous.remote()], "rendezvous", timeout)
        return self._call("start", host, port, timeout_s=timeout)

    def describe(self) -> list[str]:
        """What runs each part of the model on rank 0's machine, for people."""
        return self._call("describe", timeout_s=self._args.worker_start_timeout)

    def connect_engines(self, urls: list[str], fresh: list[str], number: int, engine_size: int) -> None:
        """See EngineLink. This and the two that follow raise EnginesLostError; then they can be repeated."""
        self._call("connect_engines", urls, fresh, number, engine_size, timeout_s=self._sync_timeout_s())

    def sync_weights(self, version: int) -> None:
        """Every engine that is connected serves the current weights as `version` afterwards."""
        self._call("sync_weights", version, timeout_s=self._sync_timeout_s())

    def check_weights(self, version: int) -> float:
        """Compares what the engines hold; the seconds that it took."""
        export = (self._args.output_dir / "weight-check").resolve()
        return self._call("check_weights", version, export, timeout_s=self._args.train_timeout)

    def _sync_timeout_s(self) -> float:
        """The ranks' own deadlines come first: they know which engine they wait for."""
        return SYNC_DEADLINES * self._args.weight_sync_timeout

    def prepare(self, mini_batches: list[list[TrainingSample]]) -> None:
        """Hand out a rollout batch: packs it and, where the loss wants them, computes pi_old's log-probs."""
        self._call("prepare", ray.put(mini_batches), timeout_s=self._args.train_timeout)

    def train_step(self, index: int) -> dict[str, Any]:
        """One optimizer step on mini-batch `index` of the prepared batch: the fields of StepResult."""
        return self._call("train_step", index, timeout_s=self._args.train_timeout)

    def log_probs(self, samples: list[TrainingSample]) -> list[np.ndarray]:
        return self._call("log_probs", ray.put(samples), timeout_s=self._args.train_timeout)

    def measure_layout(self, samples: list[TrainingSample], num_steps: int) -> LayoutMeasurement:
        """Optimizer steps on the samples, with everything that must not depend on the layout."""
        return self._call("measure_layout", ray.put(samples), num_steps, timeout_s=self._args.train_timeout)

    def save(self, rollout_state: dict, rollout_buffer: bytes | None) -> None:
        state = rollout_state | {"rollout_buffer": rollout_buffer}
        self._call("save", state, timeout_s=self._args.train_timeout)

    def export_hf(self, target: Path) -> None:
        self._call("export_hf", target, timeout_s=self._args.train_timeout)

    def stop(self) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def wait_until_gone(self) -> None:
        """After `stop`: the processes have ended and their GPUs are free. RuntimeError if one will not go."""
        calls = [worker.rendezvous.remote() for worker in self._workers]
        _, alive = ray.wait(calls, num_returns=len(calls), timeout=STOP_TIMEOUT_S)
        if alive:
            raise RuntimeError(
                f"trainer rank {calls.index(alive[0])} was killed, but is not gone after {STOP_TIMEOUT_S:g} s"
            )

    def _call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        refs = [worker.traced.remote(method, *arguments) for worker in self._workers]
        answers = self._gather(refs, method, timeout_s)
        if self._on_calls is not None:
            for rank, (_, spans) in enumerate(answers):
                self._on_calls(rank, spans)
        return answers[0][0]

    def _gather(self, refs: list, what: str, timeout_s: float) -> list:
        names = [f"trainer rank {rank}" for rank in range(len(refs))]
        passed_on = (ValueError, EnginesLostError)
        return gather(refs, names, what, timeout_s, self._explain, self._watch, passed_on)

    def _explain(self, rank: int) -> str:
        return log_tail(self._log_dir / f"trainer-{rank}.log")
