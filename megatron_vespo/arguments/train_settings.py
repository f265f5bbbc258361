"""The settings of a run, one dataclass per concern."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any

from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.arguments.checkpoint import SaveSettings
from megatron_vespo.arguments.code_rewards import CodeRewardSettings
from megatron_vespo.arguments.data import DataSettings
from megatron_vespo.arguments.distillation import DistillationSettings
from megatron_vespo.arguments.engines import EngineSettings
from megatron_vespo.arguments.environment import EnvironmentSettings
from megatron_vespo.arguments.evaluation import EvalSettings
from megatron_vespo.arguments.rewards import RewardSettings
from megatron_vespo.arguments.rollout import RolloutSettings
from megatron_vespo.arguments.run import RunSettings
from megatron_vespo.arguments.tracking import TrackingSettings
from megatron_vespo.arguments.trainer import TrainerSettings
from megatron_vespo.arguments.weight_sync import SyncSettings


@dataclass(frozen=True)
class TrainSettings:
    """The result of `parse_args`. Nothing is changed afterwards.

    `megatron` has all arguments in Megatron's own form; only the trainer's ranks read it.
    """

    megatron: Namespace
    trainer: TrainerSettings
    data: DataSettings
    rollout: RolloutSettings
    responses: EnvironmentSettings
    rewards: RewardSettings
    distillation: DistillationSettings
    code_rewards: CodeRewardSettings
    eval: EvalSettings
    engines: EngineSettings
    sync: SyncSettings
    save: SaveSettings
    run: RunSettings
    loss: LossSettings
    tracking: TrackingSettings

    @classmethod
    def of(cls, args: Namespace) -> TrainSettings:
        return cls(
            args, TrainerSettings.of(args), DataSettings.of(args), RolloutSettings.of(args),
            EnvironmentSettings.of(args), RewardSettings.of(args), DistillationSettings.of(args),
            CodeRewardSettings.of(args), EvalSettings.of(args),
            EngineSettings.of(args), SyncSettings.of(args), SaveSettings.of(args), RunSettings.of(args),
            LossSettings.of(args), TrackingSettings.of(args),
        )  # fmt: skip

    def as_run(self) -> TrainSettings:
        """Without engines if the run trains on recorded batches; without a trainer for --rollout-only."""
        if self.run.train_from:
            args = self._with(rollout_engines=0)
            return replace(self, megatron=args, engines=replace(self.engines, rollout_engines=0))
        if self.run.rollout_only:
            args = self._with(trainer_ranks=0, hf_export=False)
            trainer, run = replace(self.trainer, trainer_ranks=0), replace(self.run, hf_export=False)
            return replace(self, megatron=args, trainer=trainer, run=run)
        return self

    def _with(self, **changes: Any) -> Namespace:
        return Namespace(**vars(self.megatron) | changes)

    def going_on_from(self, load: str | None, step: int | None) -> TrainSettings:
        """The same run, resumed from another checkpoint."""
        args = self._with(load=load, ckpt_step=step)
        return replace(self, megatron=args, save=replace(self.save, load=load, ckpt_step=step))
