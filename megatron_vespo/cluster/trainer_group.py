"""All Megatron ranks as one object."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import ray

from megatron_vespo.arguments.time_limits import check_timeout_s, sync_timeout_s
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.canary_file import CanaryMismatchError, canaries_of
from megatron_vespo.checkpoints.run_folder import SaveReport
from megatron_vespo.cluster.calls import TrainerError, gather
from megatron_vespo.cluster.logs import log_tail
from megatron_vespo.cluster.placement import Placement, object_store_bytes
from megatron_vespo.cluster.trainer_worker import Resumed, TrainerWorker
from megatron_vespo.data.packing import PackingRule
from megatron_vespo.data.shards import MiniBatchOutline, Shard
from megatron_vespo.data.token_values import TOKENS
from megatron_vespo.observability.layout_report import LayoutMeasurement
from megatron_vespo.observability.tracing import Span
from megatron_vespo.system.process_environment import exported_values
from megatron_vespo.types import TrainingSample
from megatron_vespo.weight_sync.disk_folder import export_folder, release, run_folder
from megatron_vespo.weight_sync.engine_admin import EnginesLostError
from megatron_vespo.weight_sync.verify import Sums

STOP_TIMEOUT_S = 60.0


class TrainerGroup:
    """Each method runs on every rank and returns rank 0's answer. `watch` is called every second.

    `on_calls(rank, spans)` is told after every method what the ranks have done when, `on_save` of every save
    that has ended, well or not.
    """

    def __init__(
        self,
        settings: TrainSettings,
        placement: Placement,
        log_dir: Path,
        watch: Callable[[], None],
        on_calls: Callable[[int, list[Span]], None] | None = None,
        on_save: Callable[[SaveReport], None] | None = None,
        prompts: bytes | None = None,
        log: Callable[[str], None] = print,
    ):
        """`prompts` are what every checkpoint says of them, see `prompt_record`; `log` gets remarks."""
        self._settings, self._log_dir, self._watch = settings, log_dir, watch
        self._timeout_s = settings.run.train_timeout
        self._prompts = prompts
        self._on_calls, self._on_save, self._log = on_calls, on_save, log
        self._told_of_the_store = False
        self._one_call = Lock()  # a collective of the ranks: all get their calls in the same order
        self._saving: int | None = None  # iteration of a save that has not ended
        self._last_save: SaveReport | None = None
        self.saved_iteration: int | None = None  # the newest in --save that this trainer knows to be its own
        remote = ray.remote(TrainerWorker)
        self._workers: list[Any] = [
            remote.options(**placement.options(assignment)).remote(
                settings, rank, log_dir, placement.loopback, exported_values(os.environ)
            )
            for rank, assignment in enumerate(placement.trainer)
        ]

    def start(self) -> Resumed | None:
        """Bring Megatron up; what the checkpoint that was resumed has stored, if there was one."""
        timeout = self._settings.run.worker_start_timeout
        [(host, port)] = self._gather([self._workers[0].rendezvous.remote()], "rendezvous", timeout)
        resumed = self._call("start", host, port, timeout_s=timeout)
        self.learn_places(timeout)
        if resumed is not None and self._settings.save.load == self._settings.save.save:
            self.saved_iteration = resumed.rollout_state["iteration"]
        return resumed

    def learn_places(self, timeout_s: float) -> None:
        """Ask all ranks how mini-batches are cut and which samples are theirs; `start` does so."""
        with self._one_call:
            places = self._answers("place", [()] * len(self._workers), timeout_s)
        self._rule: PackingRule = places[0][0]
        self._data_ranks: list[int] = [rank for _, rank in places]  # of the trainer ranks

    def describe(self) -> list[str]:
        """What runs each part of the model on rank 0's machine, for people."""
        return self._call("describe", timeout_s=self._settings.run.worker_start_timeout)

    def connect_engines(
        self,
        urls: list[str],
        fresh: list[str],
        number: int,
        engine_size: int,
        api_key: str | None,
        loaded: Mapping[str, Sums] | None = None,
    ) -> str:
        """How weights go to the engines, see WeightLink.

        This and the two that follow raise EnginesLostError; then they can be repeated.
        """
        arguments = urls, fresh, number, engine_size, api_key, loaded, self._sync_files
        return self._call("connect_engines", *arguments, timeout_s=sync_timeout_s(self._settings.sync))

    def sync_weights(self, policy_version: int) -> dict[str, float]:
        """Every engine that is connected serves the current weights as `policy_version` afterwards.

        Returns metrics, see `TrainerWorker.sync_weights`.
        """
        return self._call("sync_weights", policy_version, timeout_s=sync_timeout_s(self._settings.sync))

    def check_weights(self, policy_version: int) -> float:
        """Compares what the engines hold; the seconds that it took."""
        export = weight_check_folder(self._settings).resolve()
        timeout_s = self._timeout_s + check_timeout_s(self._settings.sync)  # it may write an export, too
        return self._call("check_weights", policy_version, export, timeout_s=timeout_s)

    def prepare(self, mini_batches: list[list[TrainingSample]]) -> None:
        """Hand out a rollout batch: packs it and computes log-probs of other policies as the loss wants.

        Each data-parallel rank receives its own samples only, one mini-batch after another: Ray's object
        store holds one mini-batch at a time. ValueError for a sample that cannot be trained on.
        """
        self._hand_out(mini_batches)
        self._call("prepare", canaries_of(mini_batches[-1]), timeout_s=self._timeout_s)

    def reference_log_probs(self, mini_batches: list[list[TrainingSample]]) -> list[np.ndarray]:
        """The reference policy's log-probs of a rollout batch, float32 [N] per sample; before `prepare`.

        The samples travel and are packed as in `prepare`, but without routes.
        """
        outlines = self._hand_out(mini_batches, replay=False)
        return self._call("reference_log_probs", outlines, timeout_s=self._timeout_s)

    def _hand_out(
        self, mini_batches: list[list[TrainingSample]], replay: bool = True
    ) -> list[MiniBatchOutline]:
        """Give each rank its own samples; with `replay` they have their routes, and are packed with them."""
        outlines = []
        for index, samples in enumerate(mini_batches):
            if not replay:
                samples = [replace(sample, routed_experts=None) for sample in samples]
            outline = MiniBatchOutline.of(samples, self._rule)
            outlines.append(outline)
            shards, num_bytes = [], 0
            for rank in range(self._rule.num_ranks):
                shard = Shard.of(samples, outline.cut.of_rank(rank))
                shards.append(ray.put(shard))
                num_bytes += shard.nbytes
            self._check_store(num_bytes)
            outline_ref = ray.put(outline)
            calls = [(index, outline_ref, shards[rank], replay) for rank in self._data_ranks]
            with self._one_call:
                self._calls("take", calls, self._timeout_s)
        return outlines

    def _check_store(self, num_bytes: int) -> None:
        """Say once that a mini-batch of this size does not fit into Ray's object store."""
        if self._told_of_the_store or num_bytes <= (capacity := object_store_bytes()):
            return
        self._told_of_the_store = True
        self._log(
            f"a mini-batch has {num_bytes / 1e9:.2f} GB, Ray's object store on the driver's node "
            f"{capacity / 1e9:.2f} GB: Ray writes the rest to disk, which is slow. Take more "
            "--steps-per-rollout, or start Ray yourself with a larger --object-store-memory"
        )

    def train_step(self, index: int) -> dict[str, Any]:
        """One optimizer step on mini-batch `index` of the prepared batch: the fields of StepResult.

        If values of tokens are recorded, TOKENS has those of every rank that has some.
        """
        with self._one_call:
            results = self._answers("train_step", [(index,)] * len(self._workers), self._timeout_s)
        if TOKENS in results[0]:
            results[0][TOKENS] = [one[TOKENS] for one in results if one[TOKENS] is not None]
        return results[0]

    def offload(self, keep_weights: bool = False) -> None:
        """Free the GPUs until a method needs them; with --no-colocate-offload weights and optimizer stay."""
        self._call("offload", keep_weights, timeout_s=self._timeout_s)

    def log_probs(self, samples: list[TrainingSample]) -> list[np.ndarray]:
        return self._call("log_probs", ray.put(samples), timeout_s=self._timeout_s)

    def log_w_floor(self, samples: list[TrainingSample]) -> np.ndarray:
        """What rounding alone puts into log W, float32 [num_samples]; after `prepare`, before a step."""
        return self._call("log_w_floor", ray.put(samples), timeout_s=self._timeout_s)

    def measure_layout(self, samples: list[TrainingSample], num_steps: int) -> LayoutMeasurement:
        """Optimizer steps on the samples, with everything that must not depend on the layout."""
        return self._call("measure_layout", ray.put(samples), num_steps, timeout_s=self._timeout_s)

    def save(self, rollout_state: dict, rollout_buffer: bytes | None) -> None:
        """One atomic checkpoint; with --async-save begun, and complete when `on_save` is told so.

        One that fails is told there as well and the run goes on, but see `finish_save`.
        """
        # a reference in a list would reach the ranks unresolved; the others need not hold them
        files = [None if content is None else ray.put(content) for content in (rollout_buffer, self._prompts)]
        calls = [(rollout_state, *files)] + [(rollout_state, None, None)] * (len(self._workers) - 1)
        with self._one_call:
            self._saving = rollout_state["iteration"]
            self._calls("save", calls, self._timeout_s)

    def poll_save(self) -> None:
        """Complete a save that has been written, unless a call is going on, which does so at its end.

        From any thread: while engines generate nobody else calls.
        """
        if self._saving is not None and self._one_call.acquire(blocking=False):
            try:
                self._calls("poll_save", [()] * len(self._workers), self._timeout_s)
            finally:
                self._one_call.release()

    def wait_for_save(self) -> None:
        """Until a save that is going on has ended, well or not."""
        self._call("finish_save", timeout_s=self._timeout_s)

    def finish_save(self) -> None:
        """The same; RuntimeError if the last save has failed."""
        self.wait_for_save()
        if self._last_save is not None and self._last_save.problem is not None:
            raise RuntimeError(
                f"the checkpoint of optimizer step {self._last_save.iteration} could not be saved: "
                f"{self._last_save.problem}"
            )

    def export_hf(self, target: Path) -> None:
        self._call("export_hf", target, timeout_s=self._timeout_s)

    def stop(self) -> None:
        for worker in self._workers:
            ray.kill(worker)
        if self._sync_files is not None:
            release(self._sync_files)

    def wait_until_gone(self) -> None:
        """After `stop`: the processes have ended and their GPUs are free. RuntimeError if one will not go."""
        calls = [worker.rendezvous.remote() for worker in self._workers]
        _, alive = ray.wait(calls, num_returns=len(calls), timeout=STOP_TIMEOUT_S)
        if alive:
            raise RuntimeError(
                f"trainer rank {calls.index(alive[0])} was killed, but is not gone after {STOP_TIMEOUT_S:g} s"
            )

    @property
    def _sync_files(self) -> Path | None:
        """The run's folder of --weight-sync disk. Absolute: ranks may have another current folder."""
        folder = self._settings.sync.weight_sync_folder
        return None if folder is None else run_folder(folder, self._settings.run.output_dir)

    def _call(self, method: str, *arguments: Any, timeout_s: float) -> Any:
        with self._one_call:
            return self._calls(method, [arguments] * len(self._workers), timeout_s)

    def _calls(self, method: str, arguments: Sequence[tuple], timeout_s: float) -> Any:
        """Rank 0's answer. Each rank has its own arguments; `_one_call` is held."""
        return self._answers(method, arguments, timeout_s)[0]

    def _answers(self, method: str, arguments: Sequence[tuple], timeout_s: float) -> list:
        """The answers of all ranks."""
        pairs = zip(self._workers, arguments, strict=True)
        refs = [worker.traced.remote(method, *own) for worker, own in pairs]
        answers = self._gather(refs, method, timeout_s)
        if self._on_calls is not None:
            for rank, (_, spans, _) in enumerate(answers):
                self._on_calls(rank, spans)
        self._take_reports(answers[0][2])
        return [result for result, _, _ in answers]

    def _take_reports(self, reports: list[SaveReport]) -> None:
        for report in reports:
            if report.iteration == self._saving:
                self._saving = None
            self._last_save = report
            if report.problem is None:
                self.saved_iteration = report.iteration
            if self._on_save is not None:
                self._on_save(report)

    def _gather(self, refs: list, what: str, timeout_s: float) -> list:
        names = [f"trainer rank {rank}" for rank in range(len(refs))]
        passed_on = (ValueError, EnginesLostError, CanaryMismatchError)
        return gather(refs, names, what, timeout_s, self._explain, self._watch, passed_on, TrainerError)

    def _explain(self, rank: int) -> str:
        return log_tail(self._log_dir / f"trainer-{rank}.log")


def weight_check_folder(settings: TrainSettings) -> Path:
    """Where engines and trainer both see the export that an engine is compared with."""
    shared, output_dir = settings.sync.weight_sync_folder, settings.run.output_dir
    return output_dir / "weight-check" if shared is None else export_folder(shared, output_dir)
