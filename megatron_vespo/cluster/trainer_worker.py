"""One Megatron rank as a Ray actor: policy, weight sync and export behind a few blocking calls."""

from __future__ import annotations

import copy
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.canary_file import compare, decode, encode
from megatron_vespo.checkpoints.names import BUFFER_NAME, CANARY_NAME, OLD_CANARY_NAME, PROMPTS_NAME
from megatron_vespo.checkpoints.run_folder import SaveReport
from megatron_vespo.cluster.logs import redirect_output
from megatron_vespo.cluster.placement import cores_of_a_gpu, host_address
from megatron_vespo.cluster.visible_gpus import check_visible_gpus
from megatron_vespo.data.token_values import TOKENS
from megatron_vespo.observability.layout_report import LayoutMeasurement
from megatron_vespo.observability.tracing import Span, Spans
from megatron_vespo.rollout.server_arguments import (
    expert_parallel_size,
    has_symmetric_memory,
    other_layout,
)
from megatron_vespo.system.hardware import runs_on_gpus
from megatron_vespo.system.optional_packages import check_deep_ep, check_transformer_engine
from megatron_vespo.system.ports import find_free_port
from megatron_vespo.system.preemption import shield_process
from megatron_vespo.system.process_environment import THREADS, apply_here, trainer_environment
from megatron_vespo.types import TrainingSample

if TYPE_CHECKING:
    from megatron_vespo.data.packing import PackingRule
    from megatron_vespo.data.shards import MiniBatchOutline, Shard
    from megatron_vespo.trainer.checkpoint import Stored
    from megatron_vespo.trainer.memory import GpuMemory
    from megatron_vespo.trainer.policy import MegatronPolicy
    from megatron_vespo.weight_sync.disk import Disk
    from megatron_vespo.weight_sync.engine_admin import PauseMode
    from megatron_vespo.weight_sync.exact import Exact, ExactSource
    from megatron_vespo.weight_sync.verify import Sums
    from megatron_vespo.weight_sync.weight_link import WeightLink

# of SGLang: with these engines may have loaded other values than --hf-checkpoint's
LOADING_FLAGS = {"--load-format", "--dtype"}


def set_environment(settings: TrainSettings, exported: Mapping[str, str]) -> None:
    """This rank's, before Megatron, CUDA and NCCL are there to read it."""
    threads = cores_of_a_gpu() if settings.trainer.optimizer_cpu_offload else None
    symmetric = has_symmetric_memory(settings.engines.sglang_flags)
    apply_here(trainer_environment(exported, threads=threads, symmetric_memory=symmetric))
    # torch has read the variable when it was imported
    torch.set_num_threads(int(os.environ[THREADS]))


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint has brought back beside weights and optimizer."""

    rollout_state: dict
    rollout_buffer: bytes | None  # rank 0 alone has read it
    canary_difference: float | None  # of saved log-probs, see `canary_file`; None without


class TrainerWorker:
    """All methods are collectives: the group calls them on every rank. Results are the same on all."""

    policy: MegatronPolicy  # from `start` on
    _memory: GpuMemory  # from `start` on

    def __init__(
        self, settings: TrainSettings, rank: int, log_dir: Path, loopback: bool, exported: Mapping[str, str]
    ):
        """`exported` is what the user has set of `process_environment.TABLE`."""
        set_environment(settings, exported)
        redirect_output(log_dir / f"trainer-{rank}.log")
        self._settings, self._args, self.rank = settings, settings.megatron, rank
        self._host = host_address(loopback)
        self._bucket_bytes = settings.sync.weight_sync_bucket_mb * 2**20
        self._fp8 = settings.engines.rollout_quantization == "fp8"
        self._started = False
        self._prepared: list = []
        self._link: WeightLink | None = None
        self._num_syncs = 0
        self._canaries: list[TrainingSample] = []  # of the last rollout batch
        self._reports: list[SaveReport] = []
        self._spans = Spans()
        shield_process()

    def traced(self, method: str, *arguments: Any) -> tuple[Any, list[Span], list[SaveReport]]:
        """What the method returns, when it did what on this machine's clock, and saves that have ended."""
        with self._spans.span(method):
            result = getattr(self, method)(*arguments)
        if self._started and method != "save":
            self._reports += self.policy.saver.poll()
        reports, self._reports = self._reports, []
        return result, self._spans.take(), reports

    def rendezvous(self) -> tuple[str, int]:
        """Host and a free port for torch.distributed; asked of rank 0."""
        return self._host, find_free_port(self._host)

    def start(self, master_address: str, master_port: int) -> Resumed | None:
        """Bring Megatron up and load the weights; what the checkpoint has stored, where one is resumed."""
        check_visible_gpus(self.rank, int(runs_on_gpus(self._settings.trainer.distributed_backend)))
        where = f"trainer rank {self.rank} on {self._host}"
        check_transformer_engine(self._args.transformer_impl, where)
        check_deep_ep(self._args.moe_token_dispatcher_type, self._args.moe_flex_dispatcher_backend, where)
        from megatron_vespo.trainer.capabilities import check_router
        from megatron_vespo.trainer.initialize import initialize
        from megatron_vespo.trainer.memory import GpuMemory
        from megatron_vespo.trainer.policy import MegatronPolicy

        check_router(self._args, where)
        # this process sees its own GPU only, so the local rank is always 0
        self._args = initialize(self._args, self.rank, 0, master_address, master_port)
        records = self._settings.run.record_responses
        self.policy = MegatronPolicy(self._args, self._settings.loss, records_tokens=records)
        self._memory = GpuMemory(
            self.policy.model, self.policy.optimizer, self._settings.sync.colocate_offload
        )
        self._started = True
        stored = self.policy.stored
        if stored is None:
            return None
        buffer = stored.file(BUFFER_NAME) if self.rank == 0 else None
        return Resumed(stored.state, buffer, self._check_canaries(stored))

    def _check_canaries(self, stored: Stored) -> float | None:
        content = stored.file(CANARY_NAME) or stored.file(OLD_CANARY_NAME)
        if content is None:
            return None
        samples, saved = decode(content)
        now = self.policy.log_probs(samples, False)
        return compare(saved, now, self._settings.trainer.bf16, f"--load {stored.folder}")

    def describe(self) -> list[str]:
        """Which implementation runs each part of the model on this machine, and why."""
        from megatron_vespo.trainer.capabilities import describe

        return describe(self._args)

    def place(self) -> tuple[PackingRule, int]:
        """How mini-batches are cut, and which data-parallel rank this is."""
        return self.policy.packing_rule, self.policy.groups.dp.rank()

    def take(self, index: int, outline: MiniBatchOutline, shard: Shard, replay: bool = True) -> None:
        """Pack this rank's samples of mini-batch `index` of a rollout batch, with routes if `replay`."""
        if index == 0:
            self._prepared = []
        with self._spans.span("pack"):
            self._prepared.append(self.policy.build(outline, shard.samples(), replay))

    def reference_log_probs(self, outlines: list[MiniBatchOutline]) -> list[np.ndarray]:
        """The reference policy's, of all samples of the mini-batches taken, float32 [N]; of rank 0 alone."""
        self._memory.weights.onload()
        prepared, self._prepared = self._prepared, []
        with self._spans.span("reference log-probs"):
            self.policy.compute_reference_log_probs(prepared)
            pairs = zip(prepared, outlines, strict=True)
            values = [self.policy.reference_log_probs(one, outline.samples) for one, outline in pairs]
        return [of_sample for part in values for of_sample in part] if self.rank == 0 else []

    def prepare(self, canaries: list[TrainingSample]) -> None:
        """Compute log-probs of pi_old and the reference, after `take` and before the first update.

        With --kl-coef the samples have come with the reference's.
        """
        self._memory.onload()
        self._canaries = copy.deepcopy(canaries)  # a view would pin its object in Ray's store
        if self._args.ratio_denominator != "rollout":
            with self._spans.span("old log-probs"):
                for mini_batch in self._prepared:
                    self.policy.compute_old_log_probs(mini_batch)
        loss = self._settings.loss
        if loss.uses_reference and loss.kl_coef is None:
            with self._spans.span("reference log-probs"):
                self.policy.compute_reference_log_probs(self._prepared)

    def train_step(self, index: int) -> dict:
        """One optimizer step; the fields of StepResult and, if they are recorded, this rank's TOKENS."""
        result = vars(self.policy.train_step(self._prepared[index]))
        return result | ({TOKENS: self.policy.recorded} if self._settings.run.record_responses else {})

    def offload(self, keep_weights: bool) -> None:
        """Free the GPU for an engine, until a method needs it."""
        self._prepared = []
        self._memory.offload(keep_weights)

    def log_probs(self, samples: list[TrainingSample]) -> list[np.ndarray]:
        self._memory.weights.onload()
        return self.policy.log_probs(samples)

    def log_w_floor(self, samples: list[TrainingSample]) -> np.ndarray:
        """What rounding alone puts into log W, float32 [num_samples]; after `prepare`."""
        return self.policy.log_w_floor(samples)

    def measure_layout(self, samples: list[TrainingSample], num_steps: int) -> LayoutMeasurement:
        from megatron_vespo.trainer.layout_probe import measure

        return measure(self.policy, samples, num_steps)

    def connect_engines(
        self,
        urls: list[str],
        fresh: list[str],
        number: int,
        engine_size: int,
        api_key: str | None,
        loaded: Mapping[str, Sums] | None,
        files: Path | None,
    ) -> str:
        """Connect with the engines; `fresh` ones have to get a policy first.

        `loaded` has the checksums of what those had loaded that were offloaded since. `files` is the
        run's folder of --weight-sync disk. Returns how weights go to the engines.
        """
        if self._link is None:
            self._link = self._make_link(engine_size, api_key, files)
        self._link.loaded |= loaded or {}
        self._link.connect(urls, fresh, number)
        self._all_fresh = set(fresh) == set(urls)
        return self._link.way

    def _make_link(self, engine_size: int, api_key: str | None, files: Path | None) -> WeightLink:
        from megatron_vespo.trainer.initialize import device
        from megatron_vespo.weight_sync.broadcast import Broadcast
        from megatron_vespo.weight_sync.bucket_sender import sync_backend
        from megatron_vespo.weight_sync.weight_link import WeightLink

        pp, sync = self.policy.groups.pp, self._settings.sync
        backend = sync_backend(device().type == "cuda", sync.colocate)
        return WeightLink(
            rank=self.rank,
            broadcast=Broadcast(
                pp.rank(), pp.size(), self.policy.is_sender, engine_size, self._host, backend
            ),
            exact=self._way(engine_size, files),
            timeout_s=sync.weight_sync_timeout,
            pause=cast("PauseMode", sync.on_weight_update.replace("-", "_")) if sync.max_staleness else None,
            api_key=api_key,
        )

    def _way(self, engine_size: int, files: Path | None) -> Exact | Disk | str:
        """As --weight-sync says; or the reason why weights are broadcast."""
        from megatron_vespo.weight_sync.disk import Disk
        from megatron_vespo.weight_sync.exact import Exact

        sync, engines = self._settings.sync, self._settings.engines
        why_no_plan = other_layout(engines.sglang_flags, engines.rollout_quantization)
        if sync.weight_sync == "broadcast":
            return "--weight-sync broadcast"
        if sync.weight_sync == "disk":
            assert files is not None
            return Disk(self._source(engine_size), files, self._export_for_engines, why_no_plan)
        return why_no_plan or Exact(self._source(engine_size))

    def _source(self, engine_size: int) -> ExactSource:
        from megatron_vespo.trainer.initialize import device
        from megatron_vespo.weight_sync.engine_layout import EngineLayout
        from megatron_vespo.weight_sync.exact import ExactSource
        from megatron_vespo.weight_sync.places import place_of
        from megatron_vespo.weight_sync.trainer_layout import TrainerShard

        return ExactSource(
            family=self.policy.family,
            shape=self.policy.shape,
            shard=TrainerShard(self.rank, place_of(device()), self.policy.part),
            layout=EngineLayout(engine_size, expert_parallel_size(self._settings.engines.sglang_flags)),
            dtype=self._args.params_dtype,
            device=device(),
            buffer_bytes=self._bucket_bytes,
            host=self._host,
            staging=self._settings.sync.weight_sync_staging,
        )

    @property
    def _engines(self) -> WeightLink:
        assert self._link is not None, "connect_engines comes first"
        return self._link

    def sync_weights(self, policy_version: int) -> dict[str, float]:
        """Make every engine serve the current weights as `policy_version`.

        Returns the seconds of their pause and, where weights go through files, the bytes written.
        """
        from megatron_vespo.checkpoints.buckets import buckets
        from megatron_vespo.weight_sync.weight_link import Weights

        self._memory.weights.onload()
        weights = Weights(
            buckets=lambda: buckets(self.policy.named_hf_weights(self._fp8), self._bucket_bytes),
            held=self.policy.held_weights,
        )
        metrics = {"sync/pause_seconds": self._engines.sync(weights, policy_version)}
        written = self._engines.written_bytes
        return metrics if written is None else metrics | {"sync/bytes": float(written)}

    def check_weights(self, policy_version: int, export: Path) -> float:
        """All engines hold the same weights and, when that is due, a checkpoint's; the seconds it took.

        At the start these are what the engines have loaded themselves. After a resume, where no engine had a
        policy before, and every so many syncs the policy is written to `export`; the folder stays where
        weights differ.
        """
        from megatron_vespo.weight_sync.agreement import together

        started = time.monotonic()
        first, interval = self._num_syncs == 0, self._settings.sync.weight_check_interval
        known = first and self._all_fresh and self._engines_have_loaded_the_policy()
        every_so_many = interval > 0 and (self._num_syncs + 1) % interval == 0
        due = not known if first or self._all_fresh else every_so_many
        if due:
            self._export_for_engines(export)
        together(self.rank == 0, self._compare, policy_version, known, export if due else None)
        if due and self.rank == 0:
            shutil.rmtree(export)
        self._num_syncs += 1
        self._all_fresh = False
        return time.monotonic() - started

    def _compare(self, policy_version: int, known: bool, export: Path | None) -> None:
        from megatron_vespo.weight_sync.verify import (
            check_against_checkpoint,
            check_engines_agree,
            compare_sums,
        )

        admin = self._engines.admin
        all_sums = check_engines_agree(admin, policy_version)
        if known:
            whose = f"--hf-checkpoint {self._settings.engines.hf_checkpoint}"
            for url, sums in zip(admin.urls, all_sums, strict=True):
                compare_sums(url, sums, whose, self._engines.loaded[url], policy_version)
        if export is not None:
            limit = self._settings.sync.weight_check_timeout
            check_against_checkpoint(admin, all_sums[0], export, policy_version, limit)

    def _engines_have_loaded_the_policy(self) -> bool:
        """Engines and trainer have both started from --hf-checkpoint."""
        from megatron_vespo.trainer import checkpoint

        as_stored = not self._fp8 and LOADING_FLAGS.isdisjoint(self._settings.engines.sglang_flags)
        return as_stored and not checkpoint.exists(self._args)

    def save(self, rollout_state: dict, buffer: bytes | None, prompts: bytes | None = None) -> None:
        """With --async-save only begun when this returns; rank 0 alone is given buffer and prompts."""
        given = {BUFFER_NAME: buffer, PROMPTS_NAME: prompts}
        files = {name: content for name, content in given.items() if content is not None}
        self._memory.weights.onload()
        if self._canaries:
            files[CANARY_NAME] = encode(self._canaries, self.policy.log_probs(self._canaries, False))
        self._memory.optimizer.onload()
        self._reports += self.policy.save(rollout_state, files)

    def poll_save(self) -> None:
        """Every call does, see `traced`."""

    def finish_save(self) -> None:
        """Wait for a save that is going on."""
        self._reports += self.policy.saver.poll(blocking=True)

    def export_hf(self, target: Path) -> None:
        """Write the policy as an HF folder at `target`; it appears there only when complete."""
        self._export(target, fp8=False)

    def _export_for_engines(self, target: Path) -> None:
        """The same, as engines hold the weights."""
        self._export(target, self._fp8)

    def _export(self, target: Path, fp8: bool) -> None:
        from megatron_vespo.trainer.export import export_hf

        self._memory.weights.onload()
        export_hf(self.policy, target, self._bucket_bytes, fp8)
