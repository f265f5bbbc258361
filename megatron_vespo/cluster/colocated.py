"""Trainer and weight sync where engines share the trainer's GPUs: each call offloads what it needs to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.cluster.engine_fleet import EngineFleet
from megatron_vespo.cluster.engine_sync import EngineSync
from megatron_vespo.cluster.gpu_sharing import CACHE_AND_GRAPHS, WEIGHTS, GpuSharing
from megatron_vespo.cluster.supervised_engine import EngineEndpoint
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.cluster.trainer_worker import Resumed
from megatron_vespo.types import TrainingSample


class ColocatedTrainer(TrainerGroup):
    """Engines are offloaded before it computes."""

    def __init__(self, *arguments: Any, gpu_sharing: GpuSharing):
        super().__init__(*arguments)
        self._gpu_sharing = gpu_sharing

    def start(self) -> Resumed | None:
        self._gpu_sharing.offload_engines()
        return super().start()

    def connect_engines(self, *arguments: Any) -> str:
        return super().connect_engines(*arguments, loaded=self._gpu_sharing.loaded)

    def prepare(self, mini_batches: list[list[TrainingSample]]) -> None:
        self._gpu_sharing.offload_engines()
        super().prepare(mini_batches)

    def reference_log_probs(self, mini_batches: list[list[TrainingSample]]) -> list[np.ndarray]:
        self._gpu_sharing.offload_engines()
        return super().reference_log_probs(mini_batches)

    def log_probs(self, samples: list[TrainingSample]) -> list[np.ndarray]:
        with self._gpu_sharing.engines_offloaded(self.offload):
            return super().log_probs(samples)

    def save(self, rollout_state: dict, rollout_buffer: bytes | None) -> None:
        with self._gpu_sharing.engines_offloaded(self.offload):
            super().save(rollout_state, rollout_buffer)

    def export_hf(self, target: Path) -> None:
        with self._gpu_sharing.engines_offloaded(self.offload):
            super().export_hf(target)


class ColocatedSync(EngineSync):
    """Engines onload with the weights; the trainer keeps its own weights until all engines have them."""

    def __init__(
        self,
        engines: EngineFleet,
        engine_size: int,
        api_key: str | None,
        gpu_sharing: GpuSharing,
        *,
        log: Callable[[str], None],
    ):
        super().__init__(engines, engine_size, api_key, log=log)
        self._gpu_sharing = gpu_sharing

    def sync(self, policy_version: int) -> dict[str, float]:
        assert self._trainer is not None, "attach comes first"
        self._trainer.offload(keep_weights=True)
        self._gpu_sharing.begin_sync()
        metrics = super().sync(policy_version)
        self._gpu_sharing.end_sync()
        return metrics

    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"engines/turn_seconds": self._gpu_sharing.seconds}

    def _try(self, endpoints: list[EngineEndpoint], policy_version: int) -> dict[str, float]:
        assert self._trainer is not None, "attach comes first"
        # engines that have just started, and all engines in a repeated sync: the trainer's weights need room
        self._gpu_sharing.offload(endpoints, CACHE_AND_GRAPHS)
        self._gpu_sharing.onload(endpoints, WEIGHTS)
        metrics = super()._try(endpoints, policy_version)
        self._trainer.offload()
        self._gpu_sharing.onload(endpoints, CACHE_AND_GRAPHS)
        return metrics
