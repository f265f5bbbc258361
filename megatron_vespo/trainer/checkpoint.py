"""Saves and reads Megatron's torch_dist checkpoints, with the rollout state (data cursor, policy version)."""

from __future__ import annotations

import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.training import checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_vespo.checkpoints import run_folder as checkpoint_folder
from megatron_vespo.checkpoints.resumable import check_resumable, stored_schedule
from megatron_vespo.checkpoints.run_folder import Entry, SaveReport
from megatron_vespo.checkpoints.set_aside import kept_step, make_room
from megatron_vespo.trainer.background_save import SaveQueue
from megatron_vespo.trainer.initialize import megatron_arguments
from megatron_vespo.trainer.stand_ins import stand_ins

FILES = "files"  # key in the stored rollout state: the entries of the files beside Megatron's


class SaveFailed(RuntimeError):
    """Raised on all ranks together, before anything is written or when one rank could not write."""


class Saver:
    """Saves to `args.save`. With --async-save a thread per rank writes while training continues.

    `iteration` is the number of optimizer steps done when the run began. All methods are collectives.

    A failed save, usually for lack of disk space, is reported and leaves no files. The tracker still names
    the last complete checkpoint.
    """

    def __init__(self, args: Namespace, iteration: int):
        self._args = args
        self._queue = SaveQueue(args.async_save, self._admit, self._release_reserve)
        self._has_room = False  # whether later checkpoints in --save have been set aside
        self._kept = kept_step(args.load, args.save, iteration)
        self._iteration = 0  # of the save in progress, like the fields below
        self._started = 0.0
        self._num_bytes = 0

    def save(
        self,
        iteration: int,
        model,
        optimizer,
        scheduler,
        state: dict,
        files: Mapping[str, bytes],
        beside: AbstractContextManager,
    ) -> list[SaveReport]:
        """Starts a save; returns the reports of saves that have ended, including an earlier one.

        `files` are stored beside Megatron's. Only rank 0 needs their content. Inside `beside` Megatron saves
        more tensors with the model's.
        """
        reports = self.poll(blocking=True)
        self._iteration, self._started, self._num_bytes = iteration, time.monotonic(), 0
        with beside:
            failed = self._attempt(lambda: self._schedule(model, optimizer, scheduler, state, files))
        return reports + (failed or self.poll(blocking=not self._args.async_save))

    def poll(self, blocking: bool = False) -> list[SaveReport]:
        """The reports of saves that have ended since the last call."""
        if self._queue.get_num_unfinalized_calls() == 0:
            return []
        failed = self._attempt(lambda: self._queue.maybe_finalize_async_calls(blocking))
        if failed or self._queue.get_num_unfinalized_calls():
            return failed
        return [self._report()]

    def _schedule(self, model, optimizer, scheduler, state: dict, files: Mapping[str, bytes]) -> None:
        # Megatron saves its arguments: everything stored beside weights and optimizer must be among them
        stored = {
            "rollout_state": state | {FILES: self._prepare(files)},
            "iteration": self._iteration,
            "async_save": True,  # always, as it hands the writing to the queue
        }
        with megatron_arguments(**stored):
            checkpointing.save_checkpoint(
                self._iteration, model, optimizer, scheduler, num_floating_point_operations_so_far=0
            )

    def _prepare(self, files: Mapping[str, bytes]) -> dict[str, Entry]:
        def write() -> dict[str, Entry]:
            self._num_bytes += sum(map(len, files.values()))
            save, hf_checkpoint = Path(self._args.save), self._args.hf_checkpoint
            if not self._has_room:
                make_room(save, self._kept, self._args.gone_back)
                self._has_room = True
            return checkpoint_folder.prepare(save, self._folder, hf_checkpoint, files)

        return _on_rank_0(write)

    def _admit(self, num_bytes: int) -> None:
        """Called with the bytes that all ranks will write, before they begin."""
        self._num_bytes += num_bytes
        reason = _on_rank_0(lambda: checkpoint_folder.why_no_room(Path(self._args.save), num_bytes))
        if reason is not None:
            raise SaveFailed(reason)

    def _release_reserve(self) -> None:
        if dist.get_rank() == 0:
            checkpoint_folder.release_reserve(self._folder)

    def _attempt(self, action: Callable[[], Any]) -> list[SaveReport]:
        """Runs `action`; returns the report of a failure that all ranks have met together."""
        try:
            action()
        except (SaveFailed, CheckpointException) as error:
            return [self._report(_on_rank_0(partial(self._clear, error)))]  # pyright: ignore[reportArgumentType]
        return []

    def _clear(self, error: Exception) -> str:
        """The message for the user. Megatron itself shows only the class of a disk error."""
        room = checkpoint_folder.free_space(Path(self._args.save))
        shutil.rmtree(self._folder, ignore_errors=True)
        return str(error) if isinstance(error, SaveFailed) else f"{_first_failure(error)}; {room}"  # pyright: ignore[reportArgumentType]

    def _report(self, problem: str | None = None) -> SaveReport:
        return SaveReport(self._iteration, time.monotonic() - self._started, self._num_bytes, problem)

    @property
    def _folder(self) -> Path:
        return Path(checkpointing.get_checkpoint_name(self._args.save, self._iteration, return_base_dir=True))


def _on_rank_0(function: Callable[[], Any]) -> Any:
    """Calls `function` on rank 0; returns its result on all ranks. Its OSError is SaveFailed on all ranks."""
    outcome: list = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except OSError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise SaveFailed(outcome[1])
    return outcome[0]


def _first_failure(error: CheckpointException) -> str:
    rank = min(error.failures)
    return f"rank {rank}: {' '.join(str(error.failures[rank][0]).split())}"


def exists(args: Namespace) -> bool:
    """Whether `args.load` holds a checkpoint or converted weights."""
    return args.load is not None and (
        args.ckpt_step is not None or checkpointing.checkpoint_exists(args.load)
    )


@dataclass(frozen=True)
class Stored:
    """What a checkpoint restores beside weights and optimizer."""

    folder: Path
    state: dict
    files: dict[str, Entry]
    schedule: dict[str, float]  # arguments that the checkpoint decides, see `stored_schedule`

    def file(self, name: str) -> bytes | None:
        """A file saved with the checkpoint, None if there was none. ValueError if it is broken."""
        entry = self.files.get(name)
        return None if entry is None else checkpoint_folder.read_file(self.folder, name, entry)


def stored(args: Namespace) -> Stored | None:
    """What the checkpoint in `args.load` stores: that of step `args.ckpt_step`, or the newest if None.

    Returns None for converted weights (Megatron calls them a release): training starts from them.
    ValueError if the checkpoint cannot be resumed.
    """
    iteration, release = args.ckpt_step, False
    if iteration is None:
        tracker = checkpointing.get_checkpoint_tracker_filename(args.load)
        iteration, release = checkpointing.read_metadata(tracker)
    if release:
        return None
    folder = Path(checkpointing.get_checkpoint_name(args.load, iteration, release, return_base_dir=True))
    with stand_ins():
        saved = vars(dist_checkpointing.load_common_state_dict(folder)["args"])
    check_resumable(folder, saved, vars(args))
    state = dict(saved["rollout_state"])
    files = state.pop(FILES, {})  # early checkpoints have none
    return Stored(folder, state, files, stored_schedule(saved, vars(args)))
