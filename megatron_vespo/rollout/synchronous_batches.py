"""Rollout batches of the current policy: generates and scores a batch before training on it."""

from __future__ import annotations

from megatron_vespo.algorithms.advantages import AdvantageEstimator
from megatron_vespo.algorithms.length_pairs import LENGTH_GAP
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.rollout_metrics import rollout_metrics
from megatron_vespo.rollout.batch_source import Group, ScoredBatch, SourceState
from megatron_vespo.rollout.dynamic_sampling import RolloutBatch
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.teachers import Teachers
from megatron_vespo.system.preemption import Preemption

# Distance between the seeds of a batch's rounds, which may repeat a prompt; larger than a run's steps.
ROUND_SEEDS = 2**40


class SynchronousBatches:
    """Generates a batch when the training loop asks for it.

    This is not BackgroundBatches with a staleness of 0, because the seeds differ. Here a completion's seed
    depends on its batch and round; there on its prompt's place in the run and on the attempt. A synchronous
    run must keep drawing the same completions. Also, a preemption discards a synchronous batch as a whole.

    `max_batches` turns dynamic sampling on: at most that many batches of prompts are generated to fill one.
    """

    in_background = False

    def __init__(
        self,
        generation: Generation,
        *,
        batch_size: int,
        group_size: int,
        max_batches: int | None,
        seed: int,
        advantage_estimator: AdvantageEstimator,
        display: RunDisplay,
        preemption: Preemption,
        length_gap: float = LENGTH_GAP,
    ):
        self._generation = generation
        self._batch_size, self._group_size, self._max_batches = batch_size, group_size, max_batches
        self._seed = seed
        self._advantage_estimator: AdvantageEstimator = advantage_estimator
        self._length_gap = length_gap
        self._display, self._preemption = display, preemption
        self._policy_version = 0
        self._consumed_prompts = generation.cursor.consumed  # after the last complete batch

    def start(self) -> None:
        """Nothing runs between batches."""

    def stop(self) -> None:
        """Nothing runs between batches."""

    def weights_synced(self, policy_version: int) -> None:
        self._policy_version = policy_version

    def state(self) -> SourceState:
        return SourceState(self._consumed_prompts)

    def next_batch(self, iteration: int) -> ScoredBatch:
        """Raises RuntimeError if every reward of the batch failed."""
        size = self._batch_size
        batch = RolloutBatch(size, size * (self._max_batches or 1))
        seed = batch_seed(self._seed, iteration)
        while num_prompts := batch.num_wanted():
            groups = self.generate(num_prompts, seed)
            with self._display.phase("reward"), self._preemption.interruptible():
                completions = [completion for group in groups for completion in group]
                self._display.progress(0, len(completions))
                self._generation.score(completions, self._display.message)
            batch.add(groups)
            seed += ROUND_SEEDS
        if self._generation.teachers is not None:
            self._ask_teachers(self._generation.teachers, batch.groups())
        metrics = rollout_metrics(batch.generated, self._advantage_estimator, self._length_gap)
        if self._max_batches is not None:
            metrics |= batch.metrics()
            self._report_shortfall(batch)
        self._consumed_prompts = self._generation.cursor.consumed
        return ScoredBatch(batch.groups(), metrics, self._consumed_prompts)

    def generate(self, num_prompts: int, seed: int) -> list[Group]:
        """Groups of the next prompts, not scored yet; RuntimeError if another policy version answered."""
        prompts = self._generation.cursor.take(num_prompts)
        with self._display.phase("generate"), self._preemption.interruptible():
            groups = self._generation.collector.collect(
                prompts, self._generation.sampling, num_completions=self._group_size, seed=seed
            )
        for completion in (c for group in groups for c in group):
            for rejection in completion.rejections:
                self._display.message(f"sampled again: {rejection}")
            if not completion.policy_versions.are_all(self._policy_version):
                versions = sorted(set(completion.policy_versions.versions))
                raise RuntimeError(
                    f"prompt {completion.prompt.prompt_id} was answered by policy versions {versions}, "
                    f"the current one is {self._policy_version}"
                )
        return groups

    def _ask_teachers(self, teachers: Teachers, groups: list[Group]) -> None:
        with self._display.phase("teacher"), self._preemption.interruptible():
            completions = [completion for group in groups for completion in group]
            teachers.score(completions, self._display.progress)

    def _report_shortfall(self, batch: RolloutBatch) -> None:
        if batch.shortfall:
            size = self._batch_size
            self._display.message(
                f"dynamic sampling: {len(batch.generated)} prompts gave {size - batch.shortfall} groups of "
                f"different rewards; {batch.shortfall} without fill the batch of {size}"
            )


def batch_seed(seed: int, iteration: int) -> int:
    """Seed of the batch that starts at optimizer step `iteration`; the evaluation uses --seed itself."""
    return seed + 1 + iteration
