"""Builds the source of rollout batches that the flags ask for."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from megatron_vespo.arguments.rollout import RolloutSettings
from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.driver.run_state import RunState
from megatron_vespo.driver.services import Services
from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout.async_collector import AsyncCollector
from megatron_vespo.rollout.background_batches import BackgroundBatches
from megatron_vespo.rollout.batch_source import BatchSource
from megatron_vespo.rollout.buffer import PendingGroup, RolloutBuffer
from megatron_vespo.rollout.buffer_state import unpack_pending
from megatron_vespo.rollout.dynamic_sampling import has_reward_variance
from megatron_vespo.rollout.generation import Generation
from megatron_vespo.rollout.recorded_batches import RecordedBatches
from megatron_vespo.rollout.synchronous_batches import SynchronousBatches
from megatron_vespo.types import Completion

STOP_TIMEOUT_S = 5.0  # for background generation to stop when a run ends early


def make_batch_source(
    settings: TrainSettings,
    services: Services,
    generation: Generation | None,
    state: RunState,
    rollout_buffer: bytes | None,
    on_wait: Callable[[], None],
    stack: ExitStack,
) -> BatchSource:
    """The source of a run that continues from `state` and `rollout_buffer`, a checkpoint's pending groups.

    `on_wait` is called while the training loop waits for a batch from the background thread. `stack` stops
    that thread. Raises ValueError if a synchronous run would lose pending groups.
    """
    if generation is None:
        assert settings.run.train_from is not None
        return RecordedBatches(
            settings.run.train_from,
            steps_per_rollout=settings.rollout.steps_per_rollout,
            consumed_prompts=state.consumed_prompts,
        )
    pending = _pending_groups(settings, services, rollout_buffer)
    rollout, estimator = settings.rollout, settings.loss.advantage_estimator
    if rollout.max_staleness == 0:
        return SynchronousBatches(
            generation,
            batch_size=rollout.rollout_batch_size,
            group_size=rollout.group_size,
            max_batches=rollout.dynamic_sampling_max_batches if rollout.dynamic_sampling else None,
            seed=rollout.seed,
            advantage_estimator=estimator,
            display=services.display,
            preemption=services.preemption,
            length_gap=settings.loss.pair_length_gap,
        )
    buffer = _rollout_buffer(rollout, generation.cursor, state)
    buffer.restore(pending)
    background = _async_collector(settings, services, generation, buffer, on_wait)
    stack.callback(background.stop, STOP_TIMEOUT_S)
    return BackgroundBatches(
        background,
        generation.cursor,
        steps_per_rollout=rollout.steps_per_rollout,
        max_staleness=rollout.max_staleness,
        stop_while_training=rollout.stop_generation,
        advantage_estimator=estimator,
        display=services.display,
        batch_timeout_s=settings.run.train_timeout,
        suspend_timeout_s=settings.sync.weight_sync_timeout,
        stop_timeout_s=rollout.generate_timeout,
        length_gap=settings.loss.pair_length_gap,
    )


def _pending_groups(
    settings: TrainSettings, services: Services, rollout_buffer: bytes | None
) -> list[PendingGroup]:
    if not rollout_buffer:
        return []
    assert services.task.prompts is not None
    by_id = {prompt.prompt_id: prompt for prompt in services.task.prompts.prompts}
    pending = unpack_pending(rollout_buffer, by_id)
    if pending and settings.rollout.max_staleness == 0:
        raise ValueError(
            f"--load {settings.save.load}: {len(pending)} prompts were in flight when this asynchronous run "
            "was saved: continue with --max-staleness above 0"
        )
    return [_for_teachers(group) for group in pending] if services.teachers is not None else pending


def _for_teachers(pending: PendingGroup) -> PendingGroup:
    """The group as a run with teachers continues it, which the run that was saved may not have had.

    What no teacher has scored is not finished yet. What was drawn otherwise than teachers score, from a part
    of the vocabulary or at another temperature, is drawn anew.
    """

    def continued(partial: Completion | None) -> Completion | None:
        if partial is None or partial.teacher_log_probs is not None:
            return partial
        if partial.supports is not None or partial.temperature != 1.0:
            return None
        return replace(partial, reward=None)

    return replace(pending, partials=[continued(partial) for partial in pending.partials])


def _async_collector(
    settings: TrainSettings,
    services: Services,
    generation: Generation,
    buffer: RolloutBuffer,
    on_wait: Callable[[], None],
) -> AsyncCollector:
    trace, scorer = services.trace, generation.scorer
    assert scorer is not None

    def changed(buffer: RolloutBuffer) -> None:
        trace.count("groups", in_flight=buffer.num_in_flight, finished=buffer.num_finished)
        services.display.background(buffer.num_finished, settings.rollout.rollout_batch_size)

    def score(group: list[Completion]) -> Sequence[RewardResult]:
        start = time.time_ns()
        try:
            return scorer.score(group)
        finally:
            trace.phase("score", start, time.time_ns())

    return AsyncCollector(
        generation.collector,
        buffer,
        generation.sampling,
        score,
        num_completions=settings.rollout.group_size,
        seed=settings.rollout.seed,
        scored_at_once=scorer.groups_at_once,
        teachers=generation.teachers,
        on_wait=on_wait,
        on_change=changed,
    )


def _rollout_buffer(settings: RolloutSettings, cursor: PromptCursor, state: RunState) -> RolloutBuffer:
    """An empty buffer, as the flags define it."""
    size, over_subscription = settings.rollout_batch_size, settings.over_subscription
    return RolloutBuffer(
        lambda: cursor.take(1)[0],
        batch_size=size,
        steps_per_rollout=settings.steps_per_rollout,
        max_staleness=settings.max_staleness,
        requeue=settings.stale_groups == "requeue",
        max_attempts=settings.max_attempts,
        policy_version=state.iteration,
        serial=state.consumed_prompts,
        max_held=None if over_subscription is None else int(over_subscription * size),
        has_reward_variance=has_reward_variance,
        max_left_out=(settings.dynamic_sampling_max_batches - 1) * size if settings.dynamic_sampling else 0,
    )
