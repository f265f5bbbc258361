"""Runs that do half of the work: recorded batches without engines, or rollouts without a trainer."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_vespo.checkpoints.set_aside import set_aside
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.data.rollout_file import (
    RolloutRecord,
    batch_path,
    check_record,
    write_record,
)
from megatron_vespo.rollout.batch_source import ScoredBatch
from megatron_vespo.types import RunState, TrainingSample


class NullLearner:
    """--rollout-only: optimizer steps are counted, so that seeds go on as in training, but nobody trains."""

    policy_version = 0  # the engines keep the weights that they have loaded

    def __init__(self, state: RunState, steps_per_rollout: int):
        self._state, self._steps_per_rollout = state, steps_per_rollout

    def update(
        self, samples: list[TrainingSample], after_step: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        self._state.iteration += self._steps_per_rollout
        return {}


class NullEngineSync:
    """--train-from: there are no engines that could get weights."""

    def attach(self, trainer: TrainerGroup) -> None:
        """Nothing to connect."""

    def sync(self, version: int) -> float:
        return 0.0

    def is_wanted(self, while_others_serve: bool) -> bool:
        return False

    def metrics(self) -> dict[str, float]:
        return {}


class Recorder:
    """--save-rollouts: one file per batch; a resumed run continues the numbering.

    When a run goes back to an older checkpoint, files of later batches are set aside like its checkpoints.
    """

    def __init__(self, args: Namespace, iteration: int):
        self._folder, self._run = args.save_rollouts, recorded_run(args)
        self._batch = iteration // args.steps_per_rollout
        self._goes_back = args.ckpt_step is not None

    def __call__(self, batch: ScoredBatch) -> None:
        path = batch_path(self._folder, self._batch)
        if self._goes_back and (later := [old for old in path.parent.glob("batch-*.npz") if old >= path]):
            set_aside(path.parent, later)
        self._goes_back = False
        write_record(path, RolloutRecord(batch.groups, batch.metrics, batch.consumed_prompts, self._run))
        self._batch += 1


def recorded_run(args: Namespace) -> dict[str, Any]:
    """What a recorded batch must have in common with the run that trains on it, by the words of messages."""
    return {
        "--rollout-batch-size": args.rollout_batch_size,
        "--group-size": args.group_size,
        "--steps-per-rollout": args.steps_per_rollout,
        "a vocabulary of": args.vocab_size,
        "number of layers": args.num_layers,
        "hidden size": args.hidden_size,
        "number of experts": args.num_experts,
        "experts a token": args.moe_router_topk if args.num_experts else None,
    }


def check_modes(args: Namespace) -> None:
    """ValueError for flags that contradict each other, before anything starts."""
    if args.train_from is not None:
        others = {
            "--rollout-only": args.rollout_only,
            "--save-rollouts": args.save_rollouts,
            "--eval-data": args.eval_data,
        }
        for flag, given in others.items():
            if given:
                raise ValueError(f"--train-from starts no engines, {flag} needs them: leave one out")
        if not args.load:
            check_recorded(args, 0)
    if args.rollout_only:
        for flag, given in {"--load": args.load, "--save": args.save}.items():
            if given:
                raise ValueError(
                    f"--rollout-only has no trainer, the weights are --hf-checkpoint's: leave {flag} out"
                )
    if args.save_rollouts is not None and not args.load and batch_path(args.save_rollouts, 0).exists():
        raise ValueError(f"--save-rollouts {args.save_rollouts} has recorded batches: name another folder")


def check_recorded(args: Namespace, iteration: int) -> None:
    """ValueError unless --train-from has what a run from optimizer step `iteration` on will ask for."""
    folder: Path = args.train_from
    if not folder.is_dir():
        raise ValueError(f"--train-from {folder}: no such folder")
    first, end = iteration // args.steps_per_rollout, args.train_iters // args.steps_per_rollout
    missing = [batch for batch in range(first, end) if not batch_path(folder, batch).is_file()]
    if missing:
        raise ValueError(
            f"--train-from {folder}: {batch_path(folder, missing[0]).name} is missing; --train-iters "
            f"{args.train_iters} at --steps-per-rollout {args.steps_per_rollout} needs batches "
            f"{first} to {end - 1}"
        )
    for batch in range(first, end):
        check_record(batch_path(folder, batch), recorded_run(args), args.routing_replay == "R3")
