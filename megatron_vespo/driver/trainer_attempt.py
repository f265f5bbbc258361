"""One attempt of the trainer: its ranks, their connection to the engines, and the state that they start from.

A run without failures has one attempt. If trainer ranks die, the next attempt uses the same services.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vespo.algorithms.alarms import Alarm
from megatron_vespo.arguments.resume import describe
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.run_folder import SaveReport, newest_save, repair_tracker
from megatron_vespo.cluster.colocated import ColocatedTrainer
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.cluster.trainer_worker import Resumed
from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.driver.batch_sources import make_batch_source
from megatron_vespo.driver.controller import Controller
from megatron_vespo.driver.debug_modes import NullLearner, Recorder, check_recorded
from megatron_vespo.driver.learner import Learner, LogProbBound, PolicyLearner
from megatron_vespo.driver.response_recorder import make_recorder
from megatron_vespo.driver.run_state import RunState
from megatron_vespo.driver.sample_responses import SampleResponses
from megatron_vespo.driver.services import Services
from megatron_vespo.driver.trained_step import StepObserver
from megatron_vespo.observability.metrics import MetricsWriter, batch_records, read_metrics
from megatron_vespo.observability.trackers.tracker import sample_text
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.generate_reply import RouteShape
from megatron_vespo.rollout.generation import Generation

FROM_THE_BEGINNING = -1  # no step of the previous attempt is kept


class TrainerAttempt:
    """Entering starts the attempt; leaving ends what it started. `number` 0 is the run's first attempt."""

    def __init__(self, settings: TrainSettings, services: Services, number: int):
        self._settings, self._services, self._number = settings, services, number
        self._stack = ExitStack()
        self._trainer: TrainerGroup | None = None
        self._metrics: MetricsWriter | None = None
        self.controller: Controller | None = None  # None until everything has started

    def __enter__(self) -> TrainerAttempt:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def wait_until_gone(self) -> None:
        """After the end, waits until the processes have freed their GPUs for the next attempt."""
        if self._trainer is not None:
            self._trainer.wait_until_gone()

    def _start(self) -> None:
        settings, services = self._settings, self._services
        if self._number == 0 and settings.sync.colocate:  # an engine takes its share of an empty GPU
            services.wait_for_engines()
        resumed = self._start_trainer()
        if self._number == 0 and not settings.sync.colocate:
            services.wait_for_engines()
        if self._trainer is not None:
            services.engine_sync.attach(self._trainer)
        state = RunState.of(resumed.rollout_state) if resumed else RunState()
        if settings.run.train_from:
            check_recorded(settings, state.iteration)
        goes_back = self._number == 0 and settings.save.ckpt_step is not None
        tracking = services.tracking
        self._metrics = MetricsWriter(
            settings.run.output_dir,
            self._kept_step(resumed),
            keep_cut=goes_back,
            tensorboard=tracking is None or tracking.tensorboard,
            on_record=None if tracking is None else tracking.record,
        )
        self._stack.callback(self._metrics.close)
        if resumed:
            self._log_resumed(state, resumed)
        for line in describe(settings.save, state.iteration):
            services.display.message(line)
        self.controller = self._make_controller(state, resumed.rollout_buffer if resumed else None)
        if tracking is not None:
            tracking.attempt_started(self._number, state.iteration)
        services.display.phase_seconds()  # start-up phases end here

    def _start_trainer(self) -> Resumed | None:
        settings, services = self._settings, self._services
        if settings.run.rollout_only:
            return None
        if settings.save.load and (repaired := repair_tracker(Path(settings.save.load))):
            services.display.message(
                f"{settings.save.load}: a kill has left its tracker empty, {repaired} is complete"
            )
        group = (
            TrainerGroup
            if services.gpu_sharing is None
            else partial(ColocatedTrainer, gpu_sharing=services.gpu_sharing)
        )
        self._trainer = group(
            settings, services.placement, services.log_dir, services.engines.check, services.trace.calls,
            self._on_save, services.task.record, services.display.message,
        )  # fmt: skip
        self._stack.callback(self._trainer.stop)
        with services.display.phase("start Megatron"):
            resumed = self._trainer.start()
            for line in self._trainer.describe() if self._number == 0 else ():
                services.display.message(line)
        return resumed

    def _kept_step(self, resumed: Resumed | None) -> int | None:
        """The last step whose metrics are kept; None if this run has not written any yet."""
        if resumed:
            return resumed.rollout_state["iteration"]
        return FROM_THE_BEGINNING if self._number else None

    def _log_resumed(self, state: RunState, resumed: Resumed) -> None:
        canary = (
            ""
            if resumed.canary_difference is None
            else f"; log-probs saved with it differ by {resumed.canary_difference:.1e} at most"
        )
        self._services.display.message(
            f"resumed at optimizer step {state.iteration}, {state.consumed_prompts} prompts consumed{canary}"
        )

    def _on_save(self, report: SaveReport) -> None:
        assert self._metrics is not None and self._settings.save.save is not None
        if report.problem is None:
            seconds = {"checkpoint/seconds": report.seconds, "checkpoint/bytes": float(report.num_bytes)}
            self._metrics.write(report.iteration, seconds)
            self._services.display.saved(report.iteration)
            return
        newest = newest_save(Path(self._settings.save.save)) or "no checkpoint"
        self._services.display.message(
            f"WARNING: THE CHECKPOINT OF OPTIMIZER STEP {report.iteration} COULD NOT BE SAVED: "
            f"{report.problem}; {newest} stays, the run continues"
        )

    def _make_controller(self, state: RunState, rollout_buffer: bytes | None) -> Controller:
        settings, services = self._settings, self._services
        assert self._metrics is not None
        generation = self._generation(state)
        on_wait = partial(self._on_wait, True)
        source = make_batch_source(
            settings, services, generation, state, rollout_buffer, on_wait, self._stack
        )
        bound = LogProbBound(settings.run.max_logprob_difference, state)
        return Controller(
            settings=settings,
            source=source,
            learner=self._learner(state, bound),
            trainer=self._trainer,
            generation=generation,
            eval_prompts=services.task.eval_prompts,
            display=services.display,
            metrics=self._metrics,
            engine_sync=services.engine_sync,
            log_prob_bound=bound,
            state=state,
            # alarms compare with earlier batches, also with those before a resume into the same folder
            history=batch_records(read_metrics(settings.run.output_dir / "metrics.jsonl")),
            record=self._recorder(state) if settings.run.save_rollouts else None,
            observers=self._observers(state),
            on_alarm=self._on_alarm,
            preemption=services.preemption,
        )

    def _observers(self, state: RunState) -> list[StepObserver]:
        settings, tokenizer = self._settings.run, self._services.task.tokenizer
        if self._trainer is None:
            return []
        observers: list[StepObserver] = []
        kept = state.iteration or None
        if tokenizer is not None:
            told = self._on_sample_rows
            observers.append(
                SampleResponses(settings.output_dir, tokenizer, settings.train_iters, kept, told)
            )
        if settings.record_responses:
            kept = kept or (FROM_THE_BEGINNING if self._number else None)
            recorder = make_recorder(self._settings, tokenizer, kept, self._services.display.message)
            self._stack.callback(recorder.close)
            observers.append(recorder)
        return observers

    def _on_sample_rows(self, step: int, rows: list[dict[str, Any]]) -> None:
        assert self._metrics is not None
        self._metrics.write_text(step, "samples", sample_text(rows))
        if self._services.tracking is not None:
            self._services.tracking.samples(step, rows)

    def _on_alarm(self, step: int, alarm: Alarm) -> None:
        assert self._metrics is not None
        self._metrics.write_text(step, f"alarm/{alarm.name}", str(alarm))
        if self._services.tracking is not None:
            self._services.tracking.alarm(step, alarm.name, str(alarm))

    def _recorder(self, state: RunState) -> Recorder:
        return Recorder(self._settings, state.iteration, self._services.task.tokenizer)

    def _generation(self, state: RunState) -> Generation | None:
        task = self._services.task
        if not self._services.generates:
            return None
        assert task.prompts is not None and task.sampling is not None
        cursor = PromptCursor(task.prompts.prompts, self._settings.rollout.seed, state.consumed_prompts)
        services = self._services
        return Generation(self._collector(), cursor, task.sampling, services.scorer, services.teachers)

    def _learner(self, state: RunState, bound: LogProbBound) -> Learner:
        settings = self._settings
        if self._trainer is None:
            return NullLearner(state, settings.rollout.steps_per_rollout)
        return PolicyLearner(
            trainer=self._trainer,
            state=state,
            display=self._services.display,
            steps_per_rollout=settings.rollout.steps_per_rollout,
            ratio_denominator=settings.loss.ratio_denominator,
            old_policy=settings.loss.old_policy,
            compares_engines=settings.rollout.max_staleness == 0,
            log_prob_bound=bound,
        )

    def _collector(self) -> Collector:
        settings, engines = self._settings, self._services.engines
        routes = RouteShape(settings.trainer.num_layers, settings.trainer.moe_router_topk)
        return Collector(
            engines.urls,
            routes=routes if settings.rollout.routing_replay == "R3" else None,
            request_timeout_s=settings.rollout.generate_timeout,
            max_attempts=1 + settings.rollout.max_request_retries,
            check=self._check,
            on_requests=self._services.trace.requests,
            lost=engines.lost,
            maker=self._services.task.maker,
            api_key=self._services.api_key,
            on_wait=partial(self._on_wait, False),
            on_progress=self._services.display.progress,
            remote=self._services.replies,
        )

    def _on_wait(self, while_others_serve: bool) -> None:
        assert self.controller is not None, "nothing is generated before there is a controller"
        self.controller.on_wait(while_others_serve)

    def _check(self) -> None:
        """Called every second while engines generate."""
        self._services.engines.check()
        if self._trainer is not None:
            self._trainer.poll_save()
