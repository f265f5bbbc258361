"""Builds the source of rollout batches that the flags ask for."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.driver.services import Services
from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout.async_collector import AsyncCollector
from megatron_vespo.rollout.background_batches import BackgroundBatches
from megatron_vespo.rollout.batch_source import BatchSource
from megatron_vespo.rollout.buffer import Pending, RolloutBuffer
from megatron_vespo.rollout.buffer_state import unpack_pending
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.dynamic_sampling import teaches
from megatron_vespo.rollout.recorded_batches import RecordedBatches
from megatron_vespo.rollout.synchronous_batches import SynchronousBatches
from megatron_vespo.types import Completion, RunState

STOP_TIMEOUT_S = 5.0  # of generation in the background, when a run ends early


def make_batch_source(
    args: Namespace,
    services: Services,
    collector: Collector | None,
    cursor: PromptCursor | None,
    state: RunState,
    rollout_buffer: bytes | None,
    on_wait: Callable[[], None],
    stack: ExitStack,
) -> BatchSource:
    """The source of a run that continues from `state` and `rollout_buffer`, a checkpoint's pending groups.

    `on_wait` is called while the training loop waits for a batch from the background. `stack` stops the
    background. Raises ValueError if a synchronous run would lose pending groups.
    """
    if args.train_from:
        return RecordedBatches(
            args.train_from, steps_per_rollout=args.steps_per_rollout, consumed_prompts=state.consumed_prompts
        )
    pending = _pending_groups(args, services, rollout_buffer)
    if args.max_staleness == 0:
        return SynchronousBatches(
            collector,
            services.scorer,
            cursor,
            services.task.sampling,
            batch_size=args.rollout_batch_size,
            group_size=args.group_size,
            max_batches=args.dynamic_sampling_max_batches if args.dynamic_sampling else None,
            seed=args.seed,
            advantage_estimator=args.advantage_estimator,
            display=services.display,
            preemption=services.preemption,
        )
    buffer = _rollout_buffer(args, cursor, state)
    buffer.restore(pending)
    background = _async_collector(args, services, collector, buffer, on_wait)
    stack.callback(background.stop, STOP_TIMEOUT_S)
    return BackgroundBatches(
        background,
        cursor,
        steps_per_rollout=args.steps_per_rollout,
        max_staleness=args.max_staleness,
        stop_while_training=args.stop_generation,
        advantage_estimator=args.advantage_estimator,
        display=services.display,
        batch_timeout_s=args.train_timeout,
        suspend_timeout_s=args.weight_sync_timeout,
        stop_timeout_s=args.generate_timeout,
    )


def _pending_groups(args: Namespace, services: Services, rollout_buffer: bytes | None) -> list[Pending]:
    by_id = {prompt.prompt_id: prompt for prompt in services.task.prompts.prompts}
    pending = unpack_pending(rollout_buffer, by_id) if rollout_buffer else []
    if pending and args.max_staleness == 0:
        raise ValueError(
            f"--load {args.load}: {len(pending)} prompts were in flight when this asynchronous run "
            "was saved: go on with --max-staleness above 0"
        )
    return pending


def _async_collector(
    args: Namespace,
    services: Services,
    collector: Collector,
    buffer: RolloutBuffer,
    on_wait: Callable[[], None],
) -> AsyncCollector:
    trace = services.trace

    def score(group: list[Completion]) -> Sequence[RewardResult]:
        start = time.time_ns()
        try:
            return services.scorer.score(group)
        finally:
            trace.phase("score", start, time.time_ns())

    return AsyncCollector(
        collector,
        buffer,
        services.task.sampling,
        score,
        num_completions=args.group_size,
        seed=args.seed,
        on_wait=on_wait,
        on_change=lambda buffer: trace.count(
            "groups", in_flight=buffer.num_in_flight, finished=buffer.num_finished
        ),
    )


def _rollout_buffer(args: Namespace, cursor: PromptCursor, state: RunState) -> RolloutBuffer:
    """Empty; as the flags say."""
    size = args.rollout_batch_size
    return RolloutBuffer(
        lambda: cursor.take(1)[0],
        batch_size=size,
        steps_per_rollout=args.steps_per_rollout,
        max_staleness=args.max_staleness,
        requeue=args.stale_groups == "requeue",
        max_dispatches=args.max_attempts,
        version=state.iteration,
        serial=state.consumed_prompts,
        max_held=args.over_subscription and int(args.over_subscription * size),
        teaches=teaches,
        max_left_out=(args.dynamic_sampling_max_batches - 1) * size if args.dynamic_sampling else 0,
    )
