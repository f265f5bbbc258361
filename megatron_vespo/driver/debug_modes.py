"""Parts and checks for runs without engines (--train-from) or without a trainer (--rollout-only)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.set_aside import set_aside
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.data.response_records import RESPONSES_SUFFIX, write_responses
from megatron_vespo.data.rollout_file import (
    RolloutRecord,
    batch_path,
    check_record,
    write_record,
)
from megatron_vespo.driver.learner import AfterStep
from megatron_vespo.driver.run_state import RunState
from megatron_vespo.rollout.batch_source import ScoredBatch
from megatron_vespo.types import TrainingSample


class NullLearner:
    """--rollout-only: does not train, but counts optimizer steps, so that the seeds are those of training."""

    policy_version = 0  # the engines keep the weights that they loaded

    def __init__(self, state: RunState, steps_per_rollout: int):
        self._state, self._steps_per_rollout = state, steps_per_rollout

    def reference_log_probs(self, samples: list[TrainingSample]) -> None:
        """There is no trainer to compute them, and nobody needs the advantages."""

    def update(self, samples: list[TrainingSample], after_step: AfterStep) -> dict[str, float]:
        self._state.iteration += self._steps_per_rollout
        return {}


class NullEngineSync:
    """--train-from: there are no engines to sync."""

    def attach(self, trainer: TrainerGroup) -> None:
        """Nothing to connect."""

    def sync(self, version: int) -> dict[str, float]:
        return {}

    def is_wanted(self, while_others_serve: bool) -> bool:
        return False

    def metrics(self) -> dict[str, float]:
        return {}


class Recorder:
    """--save-rollouts: two files per batch, one of them for people; a resumed run continues the numbering.

    When a run goes back to an older checkpoint, files of later batches are set aside like its checkpoints.
    """

    def __init__(self, settings: TrainSettings, iteration: int, tokenizer: Any):
        assert settings.run.save_rollouts is not None
        self._tokenizer = tokenizer
        self._folder, self._run = settings.run.save_rollouts, recorded_run(settings)
        self._batch = iteration // settings.rollout.steps_per_rollout
        self._goes_back = settings.save.ckpt_step is not None

    def __call__(self, batch: ScoredBatch) -> None:
        path = batch_path(self._folder, self._batch)
        if self._goes_back and (later := [old for old in _batch_files(path.parent) if old.stem >= path.stem]):
            set_aside(path.parent, later)
        self._goes_back = False
        # first, so that every recorded batch has it
        write_responses(path.with_suffix(RESPONSES_SUFFIX), self._tokenizer, batch.groups)
        write_record(path, RolloutRecord(batch.groups, batch.metrics, batch.consumed_prompts, self._run))
        self._batch += 1


def _batch_files(folder: Path) -> list[Path]:
    return [*folder.glob("batch-*.npz"), *folder.glob(f"batch-*{RESPONSES_SUFFIX}")]


def recorded_run(settings: TrainSettings) -> dict[str, Any]:
    """Settings that a recorded batch and the run that trains on it must share, named as in messages."""
    return {
        "--rollout-batch-size": settings.rollout.rollout_batch_size,
        "--group-size": settings.rollout.group_size,
        "--steps-per-rollout": settings.rollout.steps_per_rollout,
        "a vocabulary of": settings.trainer.vocab_size,
        "number of layers": settings.trainer.num_layers,
        "hidden size": settings.trainer.hidden_size,
        "number of experts": settings.trainer.num_experts,
        "experts a token": settings.trainer.moe_router_topk if settings.trainer.num_experts else None,
    }


def check_modes(settings: TrainSettings) -> None:
    """ValueError for flags that exclude each other, before anything starts."""
    if settings.run.train_from is not None:
        others = {
            "--rollout-only": settings.run.rollout_only,
            "--save-rollouts": settings.run.save_rollouts,
            "--eval-data": settings.eval.data,
        }
        for flag, given in others.items():
            if given:
                raise ValueError(f"--train-from starts no engines, {flag} needs them: leave one out")
        if not settings.save.load:
            check_recorded(settings, 0)
    if settings.run.rollout_only:
        if settings.run.record_responses:
            raise ValueError(
                "--record-responses keeps what optimizer steps measure, --rollout-only takes none: leave one "
                "out; --save-rollouts records responses without a trainer"
            )
        for flag, given in {"--load": settings.save.load, "--save": settings.save.save}.items():
            if given:
                raise ValueError(
                    f"--rollout-only has no trainer, the weights are --hf-checkpoint's: leave {flag} out"
                )
    folder = settings.run.save_rollouts
    if folder is not None and not settings.save.load and batch_path(folder, 0).exists():
        raise ValueError(f"--save-rollouts {folder} has recorded batches: name another folder")


def check_recorded(settings: TrainSettings, iteration: int) -> None:
    """ValueError unless --train-from has all batches that a run needs from optimizer step `iteration` on."""
    folder = settings.run.train_from
    assert folder is not None
    if not folder.is_dir():
        raise ValueError(f"--train-from {folder}: no such folder")
    steps, train_iters = settings.rollout.steps_per_rollout, settings.run.train_iters
    first, end = iteration // steps, train_iters // steps
    missing = [batch for batch in range(first, end) if not batch_path(folder, batch).is_file()]
    if missing:
        raise ValueError(
            f"--train-from {folder}: {batch_path(folder, missing[0]).name} is missing; --train-iters "
            f"{train_iters} at --steps-per-rollout {steps} needs batches {first} to {end - 1}"
        )
    for batch in range(first, end):
        replays = settings.rollout.routing_replay == "R3"
        distils = bool(settings.distillation.teachers)
        check_record(batch_path(folder, batch), recorded_run(settings), replays, distils)
