"""Writes all responses of every optimizer step with log pi per token: --record-responses.

data/step_records.py says what the files hold. A thread of its own writes them, so that the run waits only if
writing falls two steps behind.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.set_aside import set_aside
from megatron_vespo.data.sample_advantages import advantages_per_token, mean_advantage
from megatron_vespo.data.step_records import (
    COLUMNS,
    FOLDER_NAME,
    StepRecord,
    record_path,
    step_files,
    write_step,
)
from megatron_vespo.data.token_pieces import TokenPieces
from megatron_vespo.data.token_values import TOKENS, joined
from megatron_vespo.data.tokenizer import load_tokenizer
from megatron_vespo.driver.trained_step import TrainedStep
from megatron_vespo.types import Completion

MOST_WAITING = 2  # steps in memory beside the one that is written
DEADLINE_S = 300.0  # for room in the queue, and for the end of the last write
POLL_S = 0.5


@dataclass(frozen=True)
class _Job:
    """A step as the writing thread gets it: without routes, which are much larger than all the rest."""

    step: int
    completions: list[Completion]
    group_ids: np.ndarray
    columns: dict[str, np.ndarray]
    advantages_per_token: np.ndarray | None
    tokens: list[Any]
    settings: dict[str, Any]


class ResponseRecorder:
    """Observes a run's steps. The first error ends the recording, never the run; `log` is told once.

    `settings` is part of every record. Without `tokenizer` records have token ids alone. `close` waits for
    what has not been written.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: Any,
        settings: Mapping[str, Any],
        log: Callable[[str], None] = print,
        deadline_s: float = DEADLINE_S,
    ):
        self._folder, self._settings, self._log = folder, settings, log
        self._pieces = None if tokenizer is None else TokenPieces(tokenizer)
        self._deadline_s = deadline_s
        self._jobs: queue.Queue[_Job | None] = queue.Queue(MOST_WAITING)
        self._failed = False
        self._thread = Thread(target=self._write_all, name="response recorder", daemon=True)
        self._thread.start()

    def __call__(self, step: TrainedStep) -> None:
        if not self._failed:
            self._put(_job(step, self._settings))

    def close(self) -> None:
        """Wait until everything is written, but not for ever."""
        self._put(None)
        self._thread.join(0.0 if self._failed else self._deadline_s)
        if self._thread.is_alive() and not self._failed:
            self._fail(f"the last steps are not written after {self._deadline_s:g} s")

    def _put(self, job: _Job | None) -> None:
        """Wait for room: steps that pile up would fill the memory."""
        deadline = time.monotonic() + self._deadline_s
        while not self._failed:
            try:
                self._jobs.put(job, timeout=POLL_S)
                return
            except queue.Full:
                if time.monotonic() > deadline:
                    self._fail(f"a step is not written after {self._deadline_s:g} s")

    def _write_all(self) -> None:
        while not self._failed and (job := self._jobs.get()) is not None:
            try:
                write_step(record_path(self._folder, job.step), self._record(job))
            except Exception as error:  # whatever it is, the run goes on
                self._fail(f"optimizer step {job.step}: {type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        if self._failed:
            return
        self._failed = True
        while not self._jobs.empty():
            with suppress(queue.Empty):
                self._jobs.get_nowait()
        self._log(
            f"WARNING: RESPONSES ARE NO LONGER RECORDED in {self._folder}: {' '.join(why.split())}; the run "
            "goes on"
        )

    def _record(self, job: _Job) -> StepRecord:
        lengths = sum(one.num_sampled for one in job.completions)
        tokens = joined(job.tokens, lengths)
        pieces = {}
        if self._pieces is not None:
            prompts = {id(one.prompt): one.prompt.token_ids for one in job.completions}
            every = [*(one.token_ids for one in job.completions), *prompts.values()]
            pieces = self._pieces.of(np.concatenate(every))
        return StepRecord(
            step=job.step,
            mini_batch=(job.step - 1) % self._settings["steps_per_rollout"],
            completions=job.completions,
            group_ids=job.group_ids,
            **job.columns,
            pi=tokens.pi,
            pi_old=tokens.pi_old,
            expert_differences=tokens.expert_differences,
            advantages_per_token=job.advantages_per_token,
            settings=job.settings,
            pieces=pieces,
        )


def make_recorder(
    settings: TrainSettings, tokenizer: Any, kept_step: int | None, log: Callable[[str], None]
) -> ResponseRecorder:
    """Return the recorder of an attempt that goes on after `kept_step`; None: a run's first steps.

    Records of later steps are of no use to it: see `make_room`. A run on recorded batches has no tokenizer,
    so that of --hf-checkpoint is taken if there is one.
    """
    folder = settings.run.output_dir / FOLDER_NAME
    make_room(folder, kept_step, settings.save.ckpt_step is not None)
    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(settings.engines.hf_checkpoint, "--hf-checkpoint")
        except ValueError as error:
            log(f"--record-responses keeps token ids without their text: {error}")
    return ResponseRecorder(folder, tokenizer, recorded_settings(settings), log)


def make_room(folder: Path, kept_step: int | None, goes_back: bool) -> None:
    """Remove the records of steps after `kept_step`, which the run writes again.

    Those of another run (`kept_step` None), or of a run that goes back to write different ones, are moved to
    set-aside-NNN in `folder`.
    """
    later = [path for step, path in step_files(folder) if step > max(kept_step or 0, 0)]
    if later and (kept_step is None or goes_back):
        set_aside(folder, later)
        return
    for path in later:
        path.unlink()


def recorded_settings(settings: TrainSettings) -> dict[str, Any]:
    """Return what the weight of a response depends on, with the values of the method's authors filled in."""
    loss: LossSettings = settings.loss
    options = loss.bind().loss.options
    values = {"clip_range": ("low", "high"), "sapo_tau": ("tau_positive", "tau_negative")}
    filled = {name: [options[key] for key in keys] for name, keys in values.items() if keys[0] in options}
    given = {name: str(one) if isinstance(one, Path) else one for name, one in asdict(loss).items()}  # JSON
    return (
        given
        | filled
        | {
            "steps_per_rollout": settings.rollout.steps_per_rollout,
            "routing_replay": settings.rollout.routing_replay,
            "max_staleness": settings.rollout.max_staleness,
        }
    )


def _job(step: TrainedStep, settings: Mapping[str, Any]) -> _Job:
    result, per_token = step.result, advantages_per_token(step.samples)
    return _Job(
        step=step.step,
        completions=[replace(one, routed_experts=None, supports=None) for one in step.completions],
        group_ids=np.array([sample.group_id for sample in step.samples], np.int64),
        columns={
            "advantages": np.array([mean_advantage(sample) for sample in step.samples], np.float32),
            **{name: result[name] for name in COLUMNS[1:]},
        },
        advantages_per_token=per_token,
        tokens=result[TOKENS],
        settings=dict(settings)
        | _of_this_step(settings, result)
        | {"has_advantages_per_token": per_token is not None},
    )


def _of_this_step(settings: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the step has chosen itself: c2 of an adaptive kernel, bounds of an adaptive clipping."""
    chosen: dict[str, Any] = {}
    signs = zip(("vespo_positive", "vespo_negative"), result["kernel_c2"].tolist(), strict=True)
    for name, c2 in signs:
        if np.isfinite(c2):
            chosen[name] = [settings[name][0], c2]
    bounds = result["clip_bounds"].tolist()
    return chosen | {"clip_bounds": bounds if any(bounds) else None}
