"""The loop: generate, reward, train, sync. Everything it talks to is handed in."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from megatron_vespo.algorithms.advantages import advantages, overlong_penalty
from megatron_vespo.algorithms.alarms import Alarm, check, is_news
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.observability.metrics import MetricsWriter
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.rewards.pool import RewardItem, RewardPool, RewardResult
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.dynamic_sampling import RolloutBatch
from megatron_vespo.rollout.evaluate import Evaluation, evaluate
from megatron_vespo.rollout_metrics import rollout_metrics, step_metrics
from megatron_vespo.types import Completion, Prompt, SamplingParams, TrainingSample

NUM_PROBES = 64  # completions that compare the engines with the trainer after the last sync
# between the rounds of a rollout batch, which may meet a prompt again; more than a run has optimizer steps
ROUND_SEEDS = 2**40


@dataclass
class RunState:
    """What a checkpoint must bring back beside weights and optimizer; `iteration` is the policy version."""

    iteration: int = 0  # optimizer steps done
    consumed_prompts: int = 0
    train_seconds: float = 0.0
    heldout_before: float | None = None
    heldout_after: float | None = None
    max_logprob_difference: float = 0.0


class StoppedByAlarm(RuntimeError):
    """--on-alarm says that a run ends at its first alarm."""


@dataclass
class Controller:
    """One run. `train` is the whole story; the rest are its words."""

    args: Namespace
    trainer: TrainerGroup
    collector: Collector
    rewards: RewardPool
    cursor: PromptCursor
    heldout: list[Prompt]
    tokenizer: Any
    sampling: SamplingParams
    display: RunDisplay
    metrics: MetricsWriter
    state: RunState = field(default_factory=RunState)
    history: list[dict[str, float]] = field(default_factory=list)  # of the rollout batches so far
    # told of every rollout batch: its groups, their metrics, the prompts consumed by then
    record: Callable[[list[list[Completion]], dict[str, float], int], None] | None = None

    def train(self) -> RunState:
        started = time.monotonic() - self.state.train_seconds
        self.sync_weights()
        if self.heldout and self.state.heldout_before is None:
            self.state.heldout_before = self.state.heldout_after = self.evaluate().accuracy
            self.metrics.write(self.state.iteration, {"heldout/accuracy": self.state.heldout_before})
        while self.state.iteration < self.args.train_iters:
            groups, metrics = self.rollout_batch()
            samples = self.training_samples(groups)
            metrics |= self.update(samples)
            metrics |= self.sync_weights()
            metrics |= self.maybe_evaluate()
            alarms = self.check_alarms(metrics)
            self.state.train_seconds = time.monotonic() - started
            self.maybe_save(alarms)
            self.report(metrics)
            self.maybe_stop(alarms)
        self.check_last_sync()
        return self.state

    def sync_weights(self) -> dict[str, float]:
        with self.display.phase("sync"):
            seconds = self.trainer.sync_weights(self.state.iteration)
        return {"sync/weight_check_seconds": seconds}

    def rollout_batch(self) -> tuple[list[list[Completion]], dict[str, float]]:
        """Scored groups to train on; the metrics are of all that were generated for them."""
        size, dynamic = self.args.rollout_batch_size, self.args.dynamic_sampling
        batch = RolloutBatch(size, size * self.args.dynamic_sampling_max_batches if dynamic else size)
        num_errors = 0
        seed = self._seed("rollout")
        while num_prompts := batch.num_wanted():
            groups = self.generate(num_prompts, seed)
            num_errors += self.score(groups)
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
        metrics["reward/error_count"] = float(num_errors)
        if self.record is not None:
            self.record(batch.groups(), metrics, self.state.consumed_prompts)
        return batch.groups(), metrics

    def served_version(self) -> int:
        """The policy version that the engines have."""
        return self.state.iteration

    def generate(self, num_prompts: int, seed: int) -> list[list[Completion]]:
        prompts = self.cursor.take(num_prompts)
        with self.display.phase("generate"):
            groups = self.collector.collect(
                prompts, self.sampling, num_completions=self.args.num_completions, seed=seed
            )
        for completion in (c for group in groups for c in group):
            for rejection in completion.rejections:
                self.display.message(f"drawn anew: {rejection}")
            versions = set(completion.policy_versions.tolist())
            if versions != {self.served_version()}:
                raise RuntimeError(
                    f"prompt {completion.prompt.prompt_id} was answered by policy versions "
                    f"{sorted(versions)}, the current one is {self.served_version()}"
                )
        self.state.consumed_prompts = self.cursor.consumed
        return groups

    def score(self, groups: list[list[Completion]]) -> int:
        """Fills rewards and penalties in; how many rewards failed."""
        with self.display.phase("reward"):
            completions = [completion for group in groups for completion in group]
            results = self._reward(completions)
        penalties = overlong_penalty(
            np.array([len(completion.token_ids) for completion in completions]),
            np.array([completion.finish_reason == "length" for completion in completions]),
            self.args.max_completion_tokens,
            self.args.overlong_buffer,
        )
        for completion, penalty in zip(completions, penalties, strict=True):
            completion.overlong_penalty = float(self.args.overlong_penalty * penalty)
        errors = [result for result in results if result.status != "ok"]
        if errors:
            self.display.message(
                f"{len(errors)} rewards failed, the first one: {errors[0].status} {errors[0].detail}"
            )
        return len(errors)

    def training_samples(self, groups: list[list[Completion]]) -> list[TrainingSample]:
        rewards = np.array([[completion.shaped_reward for completion in group] for group in groups])
        table = advantages(rewards, self.args.advantage_estimator)
        return [
            self._training_sample(completion, float(table[g, i]), group_id=g)
            for g, group in enumerate(groups)
            for i, completion in enumerate(group)
        ]

    def update(self, samples: list[TrainingSample]) -> dict[str, float]:
        """N optimizer steps; whole groups stay together in a mini-batch."""
        size = len(samples) // self.args.mini_batches
        mini_batches = [samples[i : i + size] for i in range(0, len(samples), size)]
        with self.display.phase("log-probs"):
            self.trainer.prepare(mini_batches)
        steps = []
        with self.display.phase("train"):
            for index, mini_batch in enumerate(mini_batches):
                steps.append(self.trainer.train_step(index))
                steps[-1]["lag"] = np.concatenate(
                    [self.state.iteration - s.policy_versions for s in mini_batch]
                ).mean()
                self.state.iteration += 1
        # with pi_old recomputed every mini-batch compares the same policy; otherwise only the first one does
        comparable = steps if self.args.ratio_denominator != "rollout" else steps[:1]
        difference = float(np.concatenate([step["engine_difference"] for step in comparable]).max())
        self._check_logprobs(difference)
        sample_advantages = np.array([sample.advantage for sample in samples], np.float32)
        lengths = np.array([sample.completion_length for sample in samples])
        return step_metrics(steps, sample_advantages, lengths) | {"check/max_logprob_difference": difference}

    def maybe_evaluate(self) -> dict[str, float]:
        rollouts_done = self.state.iteration // self.args.mini_batches
        last = self.state.iteration >= self.args.train_iters
        if not self.heldout or (rollouts_done % self.args.heldout_interval and not last):
            return {}
        evaluation = self.evaluate()
        self.state.heldout_after = evaluation.accuracy
        return {"heldout/accuracy": evaluation.accuracy, "heldout/length_mean": evaluation.mean_length}

    def evaluate(self) -> Evaluation:
        def score(completions: list[Completion]) -> list[float]:
            return [result.value for result in self._reward(completions)]

        with self.display.phase("evaluate"):
            return evaluate(self.collector, self.heldout, self.sampling, score, self._seed("evaluate"))

    def check_last_sync(self) -> None:
        """The weights served last have made no training sample; a few completions compare them as well."""
        prompts = (self.heldout or self.cursor.take(NUM_PROBES))[:NUM_PROBES]
        groups = self.collector.collect(prompts, self.sampling, num_completions=1, seed=self._seed("rollout"))
        samples = [self._training_sample(group[0], 0.0, group_id=g) for g, group in enumerate(groups)]
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
        before = self.state.iteration - self.args.mini_batches
        due = self.state.iteration // self.args.save_interval > before // self.args.save_interval
        stopping = bool(alarms) and self.args.on_alarm == "checkpoint-and-stop"
        if due or stopping or self.state.iteration >= self.args.train_iters:
            with self.display.phase("save"):
                self.trainer.save(asdict(self.state))

    def report(self, metrics: dict[str, float]) -> None:
        seconds = self.display.phase_seconds()
        metrics |= {f"time/{name}": value for name, value in seconds.items()}
        for phase, what in (("generate", "rollout"), ("train", "train")):
            if phase in seconds:  # see debug_modes
                metrics[f"{what}/tokens_per_second"] = metrics[f"{what}/tokens"] / max(seconds[phase], 1e-9)
        metrics["policy/version"] = float(self.served_version())
        self.metrics.write(self.state.iteration, metrics)
        self.display.update(self.state.iteration, metrics)

    def _reward(self, completions: list[Completion]) -> list[RewardResult]:
        texts = self.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        items = [
            RewardItem(text, c.prompt.answer, c.prompt.metadata, ended=c.finish_reason == "stop")
            for text, c in zip(texts, completions, strict=True)
        ]
        results = self.rewards.score(items)
        for completion, result in zip(completions, results, strict=True):
            completion.reward = result.value
        return results

    def _check_logprobs(self, difference: float) -> None:
        self.state.max_logprob_difference = max(self.state.max_logprob_difference, difference)
        bound = self.args.max_logprob_difference
        if bound is not None and not difference <= bound:
            raise RuntimeError(
                f"engine and trainer log-probs differ by {difference:.2e} at version {self.state.iteration}, "
                f"more than --max-logprob-difference {bound:g}: their weights or numerics are not the same"
            )

    def _seed(self, purpose: str) -> int:
        """A new stream every rollout batch; held-out prompts always draw the same one."""
        return self.args.seed if purpose == "evaluate" else self.args.seed + 1 + self.state.iteration

    def _training_sample(self, completion: Completion, advantage: float, group_id: int) -> TrainingSample:
        # routes are by far the largest part of a sample: they travel only where they are used
        replay = self.args.routing_replay == "R3"
        return TrainingSample(
            token_ids=np.array(completion.prompt.token_ids + completion.token_ids, np.int64),
            prompt_length=len(completion.prompt.token_ids),
            behavior_log_probs=completion.log_probs,
            policy_versions=completion.policy_versions,
            advantage=advantage,
            reward=completion.reward,
            temperature=completion.temperature,
            group_id=group_id,
            routed_experts=completion.routed_experts if replay else None,
            routes_version=int(completion.policy_versions[-1]) if replay else None,
        )
