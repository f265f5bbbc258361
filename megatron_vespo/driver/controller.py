"""The training loop: generate, train, sync, evaluate. The caller passes in every service that it uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from megatron_vespo.algorithms.alarms import Alarm, check, is_news
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.cluster.engine_sync import EngineSync
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.driver.debug_modes import NullEngineSync
from megatron_vespo.driver.learner import Learner, LogProbBound
from megatron_vespo.driver.run_state import RunState
from megatron_vespo.driver.trained_step import StepObserver, TrainedStep
from megatron_vespo.driver.training_samples import lost_routes, penalize, training_sample, training_samples
from megatron_vespo.observability.metrics import MetricsWriter
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.rollout.batch_source import BatchSource, Group, ScoredBatch
from megatron_vespo.rollout.evaluate import evaluate
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.synchronous_batches import batch_seed
from megatron_vespo.system.preemption import Preempted, Preemption
from megatron_vespo.types import Prompt, TrainingSample

NUM_CANARIES = 64  # completions that compare engines and trainer after the last sync


class StoppedByAlarm(RuntimeError):
    """Ends the run at its first alarm, if --on-alarm says so."""


@dataclass
class Controller:
    """One run. `train` is the whole loop; the other methods are its steps."""

    settings: TrainSettings
    source: BatchSource
    learner: Learner
    trainer: TrainerGroup | None  # None with --rollout-only
    generation: Generation | None  # None with --train-from
    eval_prompts: list[Prompt]
    display: RunDisplay
    metrics: MetricsWriter
    engine_sync: EngineSync | NullEngineSync
    log_prob_bound: LogProbBound
    state: RunState = field(default_factory=RunState)
    history: list[dict[str, float]] = field(default_factory=list)  # metrics of all rollout batches so far
    record: Callable[[ScoredBatch], None] | None = None  # gets every rollout batch before it is trained on
    observers: Sequence[StepObserver] = ()
    on_alarm: Callable[[int, Alarm], None] | None = None  # gets the alarms that are reported
    policy_version: int = 0  # of the engines' weights
    preemption: Preemption = field(default_factory=Preemption)

    def train(self) -> RunState:
        started = time.monotonic() - self.state.train_seconds
        self.sync_weights()
        self.evaluate_at_start()
        self.source.start()
        while self.state.iteration < self.settings.run.train_iters:
            metrics = self.train_on_a_batch()
            metrics |= self.maybe_evaluate()
            alarms = self.check_alarms(metrics)
            self.state.train_seconds = time.monotonic() - started
            self.maybe_save(alarms)
            self.report(metrics)
            self.maybe_stop(alarms)
            self.preemption.stop_here()
        self.source.stop()
        self.check_last_sync()
        return self.state

    def train_on_a_batch(self) -> dict[str, float]:
        """Take the steps of the next rollout batch. Nothing of it is kept while the next one is generated."""
        batch = self.next_batch()
        samples, metrics = self.training_samples(batch.groups), batch.metrics
        metrics |= self.penalize(batch.groups, samples)
        # for observers alone: the samples have copies of the tokens
        completions = [one for group in batch.groups for one in group] if self.observers else []
        del batch

        def after_step(part: slice, result: dict[str, Any]) -> dict[str, float]:
            for observe in self.observers:
                observe(TrainedStep(self.state.iteration, completions[part], samples[part], result))
            return self.sync_if_due()

        return metrics | self.learner.update(samples, after_step)

    def next_batch(self) -> ScoredBatch:
        batch = self.source.next_batch(self.state.iteration)
        if self.record is not None:
            self.record(batch)
        return batch

    def training_samples(self, groups: list[Group]) -> list[TrainingSample]:
        loss, replay = self.settings.loss, self.settings.rollout.routing_replay
        samples = training_samples(
            groups, loss.advantage_estimator, replay, loss.pair_length_gap, self.settings.distillation
        )
        if replay == "R3" and (lost := lost_routes(samples)):
            self.display.message(lost)
        return samples

    def penalize(self, groups: list[Group], samples: list[TrainingSample]) -> dict[str, float]:
        """With --kl-coef, take the distance from the reference policy into the advantages."""
        loss = self.settings.loss
        if loss.kl_coef is None or (log_probs := self.learner.reference_log_probs(samples)) is None:
            return {}
        return penalize(samples, groups, log_probs, loss, self.settings.distillation)

    def sync_weights(self) -> dict[str, float]:
        """Send the learner's weights to all engines."""
        version = self.learner.policy_version
        with self.display.phase("sync"):
            metrics = self.engine_sync.sync(version)
        self.policy_version = version
        self.source.weights_synced(version)
        return metrics

    def sync_if_due(self) -> dict[str, float]:
        """Syncs every --sync-interval optimizer steps and after the last one."""
        interval = self.settings.rollout.sync_interval or self.settings.rollout.steps_per_rollout
        due = self.state.iteration - self.policy_version >= interval
        return self.sync_weights() if due or self.state.iteration >= self.settings.run.train_iters else {}

    def on_wait(self, while_others_serve: bool) -> None:
        """Called while generation waits: ends the run after a signal, and syncs restarted engines."""
        self.preemption.stop_here()
        if self.engine_sync.is_wanted(while_others_serve):
            self.sync_weights()

    def evaluate_at_start(self) -> None:
        """Evaluate before the first step of a run, or repeat after a resume what a preemption interrupted."""
        if self.eval_prompts and self.state.eval_before is None:
            self.state.eval_before = self.state.eval_after = self.evaluate()
            self.metrics.write(self.state.iteration, self.state.eval_before)
        if self.state.eval_after is not None:
            self.display.recall(self.state.eval_after)
        if self.state.evaluation_due and (missed := self.maybe_evaluate()):
            self.metrics.write(self.state.iteration, missed)

    def maybe_evaluate(self) -> dict[str, float]:
        rollouts_done = self.state.iteration // self.settings.rollout.steps_per_rollout
        last = self.state.iteration >= self.settings.run.train_iters
        if not self.eval_prompts or (rollouts_done % self.settings.eval.interval and not last):
            return {}
        self.state.evaluation_due = True
        try:
            self.state.eval_after = self.evaluate()
        except Preempted:
            return {}
        self.state.evaluation_due = False
        return self.state.eval_after

    def evaluate(self) -> dict[str, float]:
        assert self.generation is not None, "--train-from does not evaluate"
        collector, sampling = self.generation.collector, self.generation.sampling
        with self.display.phase("evaluate"), self.preemption.interruptible():
            settings, seed = self.settings.eval, self.settings.rollout.seed
            how = seed, settings.completions, settings.temperature, settings.pass_reward
            score = partial(self.generation.score, report=self.display.message)
            return evaluate(collector, self.eval_prompts, sampling, score, *how).metrics()

    def check_last_sync(self) -> None:
        """Checks the weights synced last with a few canary completions, as no training sample uses them."""
        generation = self.generation
        if generation is None or self.trainer is None:
            return  # only one side has weights
        prompts = (self.eval_prompts or generation.cursor.take(NUM_CANARIES))[:NUM_CANARIES]
        seed = batch_seed(self.settings.rollout.seed, self.state.iteration)
        groups = generation.collector.collect(prompts, generation.sampling, num_completions=1, seed=seed)
        replay = self.settings.rollout.routing_replay
        samples = [training_sample(group[0], 0.0, g, replay) for g, group in enumerate(groups)]
        pairs = zip(self.trainer.log_probs(samples), samples, strict=True)
        difference = float(max(np.abs(ours - s.behavior_log_probs).max() for ours, s in pairs))
        self.metrics.write(self.state.iteration, {"check/last_sync_logprob_difference": difference})
        self.log_prob_bound.check(difference)

    def check_alarms(self, metrics: dict[str, float]) -> list[Alarm]:
        """The alarms of this batch, also as metrics. A repeated alarm is reported only now and then."""
        alarms = check(metrics, self.history)
        for alarm in alarms:
            if is_news(alarm, self.history):
                self.display.message(f"alarm {alarm.name} at optimizer step {self.state.iteration}: {alarm}")
                if self.on_alarm is not None:
                    self.on_alarm(self.state.iteration, alarm)
        metrics |= {f"alarm/{alarm.name}": 1.0 for alarm in alarms}
        self.history.append(metrics)
        return alarms

    def maybe_stop(self, alarms: list[Alarm]) -> None:
        on_alarm = self.settings.run.on_alarm
        if alarms and on_alarm != "warn":
            saved = f"; checkpoint in {self.settings.save.save}" if on_alarm == "checkpoint-and-stop" else ""
            raise StoppedByAlarm(
                f"stopped by alarm {alarms[0].name} at optimizer step {self.state.iteration}: "
                f"{alarms[0]}{saved}"
            )

    def maybe_save(self, alarms: list[Alarm]) -> None:
        if self.settings.save.save is None:
            return
        before = self.state.iteration - self.settings.rollout.steps_per_rollout
        interval = self.settings.save.save_interval
        due = self.state.iteration // interval > before // interval
        stopping = bool(alarms) and self.settings.run.on_alarm == "checkpoint-and-stop"
        if due or stopping or self.state.iteration >= self.settings.run.train_iters:
            self.save()

    def save(self) -> None:
        """Save the run's state as of the end of the last rollout batch."""
        assert self.trainer is not None, "--rollout-only does not save"
        with self.display.phase("save"):
            source = self.source.state()
            self.state.consumed_prompts = source.consumed_prompts
            self.trainer.save(asdict(self.state), source.pending)

    def report(self, metrics: dict[str, float]) -> None:
        """Writes and shows the metrics of a rollout batch; throughputs are tokens per second."""
        seconds = self.display.phase_seconds()
        metrics |= {f"time/{name}": value for name, value in seconds.items()}
        if "generate" in seconds:
            generating = sum(seconds.values()) if self.source.in_background else seconds["generate"]
            metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / max(generating, 1e-9)
        if "train" in seconds:
            metrics["train/tokens_per_second"] = metrics["train/tokens"] / max(seconds["train"], 1e-9)
        metrics |= self.engine_sync.metrics() | {"policy/version": float(self.policy_version)}
        self.metrics.write(self.state.iteration, metrics)
        self.display.update(self.state.iteration, metrics)
