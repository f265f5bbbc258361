"""The loop: generate, reward, train, sync. Everything it talks to is handed in."""

from __future__ import annotations

import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np

from megatron_vespo.algorithms.alarms import Alarm, check, is_news
from megatron_vespo.algorithms.diagnostics import floor_metrics
from megatron_vespo.cluster.engine_sync import EngineSync
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.driver.training_samples import lost_routes, training_sample, training_samples
from megatron_vespo.observability.metrics import MetricsWriter
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.rollout_metrics import (
    pi_old_is_in_place,
    rollout_metrics,
    staleness_metrics,
    step_metrics,
)
from megatron_vespo.rollout.async_collector import AsyncCollector
from megatron_vespo.rollout.buffer_state import pack_pending
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.dynamic_sampling import RolloutBatch
from megatron_vespo.rollout.evaluate import evaluate
from megatron_vespo.rollout.scoring import Scorer, check_some_worked, describe_failures, judged
from megatron_vespo.system.preemption import Preempted, Preemption
from megatron_vespo.types import Completion, Prompt, RunState, SamplingParams, TrainingSample

NUM_PROBES = 64  # completions that compare the engines with the trainer after the last sync
# The floor of log W is measured every so many rollout batches, by two forward passes over at most so many
# responses and at most one of so many: well below 1% of the time of training.
FLOOR_INTERVAL, FLOOR_RESPONSES, FLOOR_SHARE = 20, 32, 8
# between the rounds of a rollout batch, which may meet a prompt again; more than a run has optimizer steps
ROUND_SEEDS = 2**40


class StoppedByAlarm(RuntimeError):
    """--on-alarm says that a run ends at its first alarm."""


@dataclass
class Controller:
    """One run. `train` is the whole story; the rest are its words."""

    args: Namespace
    trainer: TrainerGroup
    collector: Collector
    scorer: Scorer
    cursor: PromptCursor
    eval_prompts: list[Prompt]
    sampling: SamplingParams
    display: RunDisplay
    metrics: MetricsWriter
    engine_sync: EngineSync
    state: RunState = field(default_factory=RunState)
    history: list[dict[str, float]] = field(default_factory=list)  # of the rollout batches so far
    # told of every rollout batch: its groups, their metrics, the prompts consumed by then
    record: Callable[[list[list[Completion]], dict[str, float], int], None] | None = None
    stream: AsyncCollector | None = None  # generates in the background, with --max-staleness
    policy_version: int = 0  # of the engines
    preemption: Preemption = field(default_factory=Preemption)

    def train(self) -> RunState:
        started = time.monotonic() - self.state.train_seconds
        self.sync_weights()
        if self.eval_prompts and self.state.eval_before is None:
            self.state.eval_before = self.state.eval_after = self.evaluate()
            self.metrics.write(self.state.iteration, self.state.eval_before)
        if self.state.eval_after is not None:
            self.display.recall(self.state.eval_after)
        if self.state.evaluation_due and (missed := self.maybe_evaluate()):
            self.metrics.write(self.state.iteration, missed)
        if self.stream is not None:
            self.stream.start()
        while self.state.iteration < self.args.train_iters:
            groups, metrics = self.rollout_batch()
            samples = training_samples(groups, self.args.advantage_estimator, self.args.routing_replay)
            if self.args.routing_replay == "R3" and (lost := lost_routes(samples)):
                self.display.message(lost)
            metrics |= self.update(samples)
            metrics |= self.maybe_evaluate()
            alarms = self.check_alarms(metrics)
            self.state.train_seconds = time.monotonic() - started
            self.maybe_save(alarms)
            self.report(metrics)
            self.maybe_stop(alarms)
            self.preemption.stop_here()
        if self.stream is not None:
            self.stream.stop(self.args.generate_timeout)
        self.check_last_sync()
        return self.state

    def sync_weights(self) -> dict[str, float]:
        with self.display.phase("sync"):
            seconds = self.engine_sync.sync(self.state.iteration)
        self.policy_version = self.state.iteration
        if self.stream is not None:
            self.stream.serve(self.policy_version)
        return {"sync/weight_check_seconds": seconds}

    def on_wait(self, while_others_serve: bool) -> None:
        """While generation waits: a signal, or the last weights to engines that were started again."""
        self.preemption.stop_here()
        if self.engine_sync.is_wanted(while_others_serve):
            self.sync_weights()

    def sync_is_due(self) -> bool:
        interval = self.args.sync_interval or self.args.steps_per_rollout
        return (
            self.state.iteration - self.policy_version >= interval
            or self.state.iteration >= self.args.train_iters
        )

    def rollout_batch(self) -> tuple[list[list[Completion]], dict[str, float]]:
        """Scored groups to train on; the metrics are of all that were generated for them."""
        if self.stream is not None:
            return self.stream_batch(self.stream)
        size, dynamic = self.args.rollout_batch_size, self.args.dynamic_sampling
        batch = RolloutBatch(size, size * self.args.dynamic_sampling_max_batches if dynamic else size)
        seed = self._seed()
        while num_prompts := batch.num_wanted():
            groups = self.generate(num_prompts, seed)
            with self.display.phase("reward"), self.preemption.interruptible():
                self.score([completion for group in groups for completion in group])
            batch.add(groups)
            seed += ROUND_SEEDS
        if dynamic and batch.shortfall:
            self.display.message(
                f"dynamic sampling: {len(batch.generated)} prompts gave {size - batch.shortfall} groups of "
                f"different rewards; {batch.shortfall} without fill the batch of {size}"
            )
        metrics = rollout_metrics(batch.generated, self.args.advantage_estimator) | (
            batch.metrics() if dynamic else {}
        )
        self.state.consumed_prompts = self.cursor.consumed
        if self.record is not None:
            self.record(batch.groups(), metrics, self.state.consumed_prompts)
        return batch.groups(), metrics

    def stream_batch(self, stream: AsyncCollector) -> tuple[list[list[Completion]], dict[str, float]]:
        """The same from the background; generation goes on, unless it is to stop while there is training."""
        stream.resume()
        with self.display.phase("generate"):
            groups = stream.take(self.args.train_timeout)
            if self.args.stop_generation:
                stream.suspend(self.args.weight_sync_timeout)
        for message in stream.messages():
            self.display.message(message)
        check_some_worked([status for group in groups for status in judged(group)])
        with stream.held() as buffer:
            metrics, consumed = buffer.metrics(), self.cursor.consumed
        metrics |= rollout_metrics(groups, self.args.advantage_estimator)
        metrics |= staleness_metrics(
            groups, self.state.iteration, self.args.steps_per_rollout, self.args.max_staleness
        )
        if self.record is not None:
            self.record(groups, metrics, consumed)
        return groups, metrics

    def generate(self, num_prompts: int, seed: int) -> list[list[Completion]]:
        prompts = self.cursor.take(num_prompts)
        with self.display.phase("generate"), self.preemption.interruptible():
            groups = self.collector.collect(
                prompts, self.sampling, num_completions=self.args.group_size, seed=seed
            )
        for completion in (c for group in groups for c in group):
            for rejection in completion.rejections:
                self.display.message(f"drawn anew: {rejection}")
            versions = set(completion.policy_versions.tolist())
            if versions != {self.policy_version}:
                raise RuntimeError(
                    f"prompt {completion.prompt.prompt_id} was answered by policy versions "
                    f"{sorted(versions)}, the current one is {self.policy_version}"
                )
        return groups

    def score(self, completions: list[Completion]) -> list[float]:
        failures = self.scorer.score(completions)
        if failures:
            self.display.message(describe_failures(failures))
            check_some_worked(judged(completions), describe_failures(failures))
        return [completion.reward for completion in completions]

    def update(self, samples: list[TrainingSample]) -> dict[str, float]:
        """N optimizer steps; whole groups stay together in a mini-batch."""
        size = len(samples) // self.args.steps_per_rollout
        mini_batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        with self.display.phase("log-probs"):
            self.trainer.prepare(mini_batches)
            floor = self.measure_floor(samples)
        version = self.state.iteration
        older = any((sample.policy_versions != version).any() for sample in samples)
        steps, sync_seconds = [], Counter()
        for index, mini_batch in enumerate(mini_batches):
            with self.display.phase("train"):
                steps.append(self.trainer.train_step(index))
            lags = [self.state.iteration - sample.policy_versions for sample in mini_batch]
            steps[-1]["lag"] = np.concatenate(lags).mean()
            self.state.iteration += 1
            if self.sync_is_due():
                sync_seconds.update(self.sync_weights())
        sample_advantages = np.array([sample.advantage for sample in samples], np.float32)
        lengths = np.array([sample.completion_length for sample in samples])
        metrics = step_metrics(steps, sample_advantages, lengths, floor) | dict(sync_seconds)
        if pi_old_is_in_place(self.args, mini_batches[0], version):
            metrics["check/unchanged_log_w_abs_max"] = float(np.abs(steps[0]["log_w"]).max())
        if older or self.stream is not None:
            return metrics  # older policies have sampled: only the last sync's completions compare
        # with pi_old recomputed every mini-batch compares the same policy; otherwise only the first one does
        comparable = steps if self.args.ratio_denominator != "rollout" else steps[:1]
        difference = float(np.concatenate([step["engine_difference"] for step in comparable]).max())
        self._check_logprobs(difference)
        return metrics | {"check/max_logprob_difference": difference}

    def measure_floor(self, samples: list[TrainingSample]) -> dict[str, float]:
        """What rounding alone puts into log W, of a few responses of all lengths; anew now and then.

        The last one is in the checkpoint, so that a resumed run goes on with it.
        """
        if self.state.log_w_floor is None or not self.state.iteration % (
            FLOOR_INTERVAL * self.args.steps_per_rollout
        ):
            lengths = np.array([sample.completion_length for sample in samples])
            number = min(FLOOR_RESPONSES, max(len(samples) // FLOOR_SHARE, 2), len(samples))
            ranks = np.linspace(0, len(samples) - 1, number).round().astype(int)
            chosen = np.argsort(lengths, kind="stable")[ranks]
            log_w = self.trainer.log_w_floor([samples[i] for i in chosen])
            self.state.log_w_floor = floor_metrics(log_w, lengths[chosen])
        return self.state.log_w_floor

    def maybe_evaluate(self) -> dict[str, float]:
        rollouts_done = self.state.iteration // self.args.steps_per_rollout
        last = self.state.iteration >= self.args.train_iters
        if not self.eval_prompts or (rollouts_done % self.args.eval_interval and not last):
            return {}
        self.state.evaluation_due = True
        try:
            self.state.eval_after = self.evaluate()
        except Preempted:
            return {}
        self.state.evaluation_due = False
        return self.state.eval_after

    def evaluate(self) -> dict[str, float]:
        with self.display.phase("evaluate"), self.preemption.interruptible():
            args = self.args
            how = args.seed, args.eval_completions, args.eval_temperature, args.eval_pass_reward
            return evaluate(self.collector, self.eval_prompts, self.sampling, self.score, *how).metrics()

    def check_last_sync(self) -> None:
        """The weights served last have made no training sample; a few completions compare them as well."""
        prompts = (self.eval_prompts or self.cursor.take(NUM_PROBES))[:NUM_PROBES]
        groups = self.collector.collect(prompts, self.sampling, num_completions=1, seed=self._seed())
        samples = [
            training_sample(group[0], 0.0, g, self.args.routing_replay) for g, group in enumerate(groups)
        ]
        ours = self.trainer.log_probs(samples)
        pairs = zip(ours, samples, strict=True)
        difference = float(max(np.abs(o - s.behavior_log_probs).max() for o, s in pairs))
        self.metrics.write(self.state.iteration, {"check/last_sync_logprob_difference": difference})
        self._check_logprobs(difference)

    def check_alarms(self, metrics: dict[str, float]) -> list[Alarm]:
        """What is wrong with this batch, in words and as metrics; said once and then only now and then."""
        alarms = check(metrics, self.history)
        for alarm in alarms:
            if is_news(alarm, self.history):
                self.display.message(f"alarm {alarm.name} at optimizer step {self.state.iteration}: {alarm}")
        metrics |= {f"alarm/{alarm.name}": 1.0 for alarm in alarms}
        self.history.append(metrics)
        return alarms

    def maybe_stop(self, alarms: list[Alarm]) -> None:
        if alarms and self.args.on_alarm != "warn":
            saved = f"; checkpoint in {self.args.save}" if self.args.on_alarm == "checkpoint-and-stop" else ""
            raise StoppedByAlarm(
                f"stopped by alarm {alarms[0].name} at optimizer step {self.state.iteration}: "
                f"{alarms[0]}{saved}"
            )

    def maybe_save(self, alarms: list[Alarm]) -> None:
        if self.args.save is None:
            return
        before = self.state.iteration - self.args.steps_per_rollout
        due = self.state.iteration // self.args.save_interval > before // self.args.save_interval
        stopping = bool(alarms) and self.args.on_alarm == "checkpoint-and-stop"
        if due or stopping or self.state.iteration >= self.args.train_iters:
            self.save()

    def save(self) -> None:
        """Everything as of the end of the last rollout batch."""
        with self.display.phase("save"):
            pending = None if self.stream is None else self.pending(self.stream)
            self.trainer.save(asdict(self.state), pending)

    def pending(self, stream: AsyncCollector) -> bytes:
        """All that the stream has, unfinished responses too; generation goes on with it."""
        stream.suspend(self.args.weight_sync_timeout)
        with stream.held() as buffer:
            self.state.consumed_prompts = self.cursor.consumed
            pending = buffer.pending()
        if not self.args.stop_generation:
            stream.resume()
        return pack_pending(pending)

    def report(self, metrics: dict[str, float]) -> None:
        seconds = self.display.phase_seconds()
        metrics |= {f"time/{name}": value for name, value in seconds.items()}
        if self.collector is not None:  # see debug_modes
            generating = seconds["generate"] if self.stream is None else sum(seconds.values())
            metrics["rollout/tokens_per_second"] = metrics["rollout/tokens"] / max(generating, 1e-9)
        if "train" in seconds:
            metrics["train/tokens_per_second"] = metrics["train/tokens"] / max(seconds["train"], 1e-9)
        metrics |= self.engine_sync.metrics() | {"policy/version": float(self.policy_version)}
        self.metrics.write(self.state.iteration, metrics)
        self.display.update(self.state.iteration, metrics)

    def _check_logprobs(self, difference: float) -> None:
        self.state.max_logprob_difference = max(self.state.max_logprob_difference, difference)
        bound = self.args.max_logprob_difference
        if bound is not None and not difference <= bound:
            raise RuntimeError(
                f"engine and trainer log-probs differ by {difference:.2e} at version {self.state.iteration}, "
                f"more than --max-logprob-difference {bound:g}: their weights or numerics are not the same"
            )

    def _seed(self) -> int:
        """A new stream every rollout batch; --seed itself is the held-out prompts', always."""
        return self.args.seed + 1 + self.state.iteration
