"""Runs the trainer, in one attempt after another, and ends the run."""

from __future__ import annotations

import time
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path

from megatron_vespo.arguments.resume import how_to_go_on, resumed_folder
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.names import TRACKER_NAME
from megatron_vespo.checkpoints.run_folder import newest_save
from megatron_vespo.cluster.calls import TrainerError
from megatron_vespo.driver.controller import Controller, StoppedByAlarm
from megatron_vespo.driver.run_state import RunState
from megatron_vespo.driver.services import Services
from megatron_vespo.driver.trainer_attempt import TrainerAttempt
from megatron_vespo.system.preemption import EXIT_RESUME, EXIT_UNSAVED, EndedBySignal, Preempted


class Run:
    """Starts the trainer. If ranks die, restarts it, at most --trainer-restarts times."""

    def __init__(self, settings: TrainSettings, services: Services, setup_seconds: float):
        """`setup_seconds` plus the time of the monotonic clock is the setup time, in seconds."""
        self._settings, self._services = settings, services
        self.setup_seconds = setup_seconds
        self.idle: dict[str, dict] = {}
        self.restarts: list[str] = []  # of the trainer: when, and the log's line
        self._training_since: int | None = None  # nanoseconds since 1970

    @property
    def has_started(self) -> bool:
        """Whether training has begun, and with it the files of this run."""
        return self._training_since is not None

    def idle_so_far(self) -> dict[str, dict]:
        """The shares of `Trace.idle` from the start of training until its end, or until now."""
        if self.idle or self._training_since is None:
            return self.idle
        return self._services.trace.idle(self._training_since, time.time_ns())

    def train(self) -> RunState:
        restarts, settings, number = Restarts(self._settings), self._settings, 0
        while True:
            attempt = TrainerAttempt(settings, self._services, number)
            try:
                with attempt:
                    assert attempt.controller is not None
                    return self._train(attempt.controller)
            except TrainerError as error:
                if self._services.preemption.signal is not None:
                    self._end_unsaved(str(error).splitlines()[0], error)
                if self._training_since is None:  # a restart does not help a trainer that never started
                    raise
                settings, message = restarts.next(error)
                self._services.display.message(message)
                self.restarts.append(f"{datetime.now(UTC).isoformat(timespec='seconds')} {message}")
            attempt.wait_until_gone()
            number += 1

    def _train(self, controller: Controller) -> RunState:
        settings, services = self._settings, self._services
        trainer, saves = controller.trainer, settings.save.save is not None
        if self._training_since is None:
            self.setup_seconds += time.monotonic()
            self._training_since = time.time_ns()
        try:
            with services.preemption.guarded() if saves else nullcontext():
                state = controller.train()
        except Preempted:
            self._end_resumable(controller)
        except EndedBySignal:
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self._interrupted(controller.state.iteration)) from None
        except StoppedByAlarm:
            if trainer is not None and saves:
                trainer.finish_save()
            raise
        self.idle = services.trace.idle(self._training_since, time.time_ns())
        if trainer is not None and saves:
            with services.display.phase("save"):
                trainer.finish_save()
        if trainer is not None and settings.run.hf_export:
            with services.display.phase("export"):
                trainer.export_hf((settings.run.output_dir / "hf").resolve())
        return state

    def _end_resumable(self, controller: Controller) -> None:
        """Saves before the preemption's deadline; raises Preempted, or EndedBySignal if the save failed."""
        settings, preemption = self._settings, self._services.preemption
        if settings.save.save is None:
            preemption.conclude(EXIT_RESUME)
            raise Preempted(f"ended by {preemption.signal}; without --save nothing is kept")
        trainer, step = controller.trainer, controller.state.iteration
        assert trainer is not None, "--rollout-only does not save"
        try:
            trainer.wait_for_save()
            if step not in (0, trainer.saved_iteration):
                controller.save()
                trainer.finish_save()
        except RuntimeError as error:
            self._end_unsaved(str(error).splitlines()[0], error)
        preemption.conclude(EXIT_RESUME)
        saved = (
            f", which is saved: continue with {how_to_go_on(settings.save, step)}"
            if step
            else ": nothing to save yet"
        )
        raise Preempted(f"ended by {preemption.signal} at optimizer step {step}{saved}")

    def _interrupted(self, step: int) -> str:
        save, where = self._settings.save.save, f"interrupted at optimizer step {step}"
        if save is None:
            return f"{where}; without --save nothing is kept"
        if (newest := newest_save(Path(save))) is None:
            return f"{where}, before the first checkpoint: the same command starts again from the beginning"
        same = self._settings.save.load == save
        how = "the same command continues it" if same else f"continue with --load {save}"
        return f"{where}; the newest checkpoint is {newest}: {how}"

    def _end_unsaved(self, reason: str, error: Exception) -> None:
        preemption = self._services.preemption
        preemption.conclude(EXIT_UNSAVED)
        raise EndedBySignal(f"ended by {preemption.signal}, not saved: {reason}") from error


class Restarts:
    """Decides from which checkpoint a run continues after its trainer has died, and how often."""

    def __init__(self, settings: TrainSettings):
        self._settings, self._left = settings, settings.save.trainer_restarts
        self._first = self._newest = self._tracker()
        self._last_failure: str | None = None

    def next(self, error: TrainerError) -> tuple[TrainSettings, str]:
        """The next attempt's settings and a message for the log; raises `error` if no restart is left."""
        newest = self._tracker()
        if newest != self._newest:  # the run has made progress
            self._newest, self._left = newest, self._settings.save.trainer_restarts
        first_line = str(error).splitlines()[0]
        repeated = not error.died and first_line == self._last_failure  # it would fail again
        self._last_failure = first_line
        if self._left == 0 or repeated:
            raise error
        self._left -= 1
        settings, where = self._settings, "from the beginning, there is no checkpoint yet"
        if newest is not None and newest != self._first:  # this run has saved
            settings = settings.going_on_from(settings.save.save, None)
        if folder := resumed_folder(settings.save):
            where = f"from {folder}"
        return settings, (
            f"RESTART OF THE TRAINER {where} ({self._left} more without a new checkpoint): {first_line}"
        )

    def _tracker(self) -> tuple[Path, int] | None:
        """The newest checkpoint of --save, and when it was named: a run may reuse an old one's name."""
        if self._settings.save.save is None:
            return None
        folder = newest_save(Path(self._settings.save.save))
        return None if folder is None else (folder, (folder.parent / TRACKER_NAME).stat().st_mtime_ns)
