"""Trainer and weight sync where engines share the trainer's GPUs: whose turn each call needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.cluster.engine_fleet import EngineEndpoint, EngineFleet
from megatron_vespo.cluster.engine_sync import EngineSync
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.cluster.trainer_worker import Resumed
from megatron_vespo.cluster.turns import REST, WEIGHTS, Turns
from megatron_vespo.types import TrainingSample


class ColocatedTrainer(TrainerGroup):
    """Engines make room before it computes."""

    def __init__(self, *arguments: Any, turns: Turns):
        super().__init__(*arguments)
        self._turns = turns

    def start(self) -> Resumed | None:
        self._turns.train()
        return super().start()

    def connect_engines(self, *arguments: Any) -> None:
        super().connect_engines(*arguments, loaded=self._turns.loaded)

    def prepare(self, mini_batches: list[list[TrainingSample]]) -> None:
        self._turns.train()
        super().prepare(mini_batches)

    def log_probs(self, samples: list[TrainingSample]) -> list[np.ndarray]:
        with self._turns.lent(self.give_memory_back):
            return super().log_probs(samples)

    def save(self, rollout_state: dict, rollout_buffer: bytes | None) -> None:
        with self._turns.lent(self.give_memory_back):
            super().save(rollout_state, rollout_buffer)

    def export_hf(self, target: Path) -> None:
        with self._turns.lent(self.give_memory_back):
            super().export_hf(target)


class ColocatedSync(EngineSync):
    """The engines' turn begins with the weights; the trainer keeps its own until all engines have them."""

    def __init__(self, engines: EngineFleet, engine_size: int, api_key: str | None, turns: Turns):
        super().__init__(engines, engine_size, api_key)
        self._turns = turns

    def sync(self, version: int) -> float:
        self._trainer.give_memory_back(keep_weights=True)
        self._turns.restart()
        seconds = super().sync(version)
        self._turns.generate()
        return seconds

    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"engines/turn_seconds": self._turns.seconds}

    def _try(self, endpoints: list[EngineEndpoint], version: int) -> float:
        # one that has just started, and all where the sync is repeated: the trainer's weights need the room
        self._turns.release(endpoints, REST)
        self._turns.resume(endpoints, WEIGHTS)
        seconds = super()._try(endpoints, version)
        self._trainer.give_memory_back()
        self._turns.resume(endpoints, REST)
        return seconds
