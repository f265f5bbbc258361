"""Rollout batches that are generated in the background while training runs."""

from __future__ import annotations

from megatron_vespo.algorithms.advantages import AdvantageEstimator
from megatron_vespo.algorithms.length_pairs import LENGTH_GAP
from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.rollout_metrics import rollout_metrics, staleness_metrics
from megatron_vespo.rollout.async_collector import AsyncCollector
from megatron_vespo.rollout.batch_source import ScoredBatch, SourceState
from megatron_vespo.rollout.buffer_state import pack_pending
from megatron_vespo.rollout.scoring import check_some_worked, reward_statuses


class BackgroundBatches:
    """Takes batches out of the buffer that `collector` fills.

    With `stop_while_training`, generation pauses when a batch is complete and continues with the next one.
    The time limits, in seconds, are for a batch, for engines to return unfinished responses, and for the end.
    """

    in_background = True

    def __init__(
        self,
        collector: AsyncCollector,
        cursor: PromptCursor,
        *,
        steps_per_rollout: int,
        max_staleness: int,
        stop_while_training: bool,
        advantage_estimator: AdvantageEstimator,
        display: RunDisplay,
        batch_timeout_s: float,
        suspend_timeout_s: float,
        stop_timeout_s: float,
        length_gap: float = LENGTH_GAP,
    ):
        self._collector, self._cursor, self._display = collector, cursor, display
        self._steps_per_rollout, self._max_staleness = steps_per_rollout, max_staleness
        self._stop_while_training = stop_while_training
        self._advantage_estimator: AdvantageEstimator = advantage_estimator
        self._length_gap = length_gap
        self._batch_timeout_s, self._suspend_timeout_s = batch_timeout_s, suspend_timeout_s
        self._stop_timeout_s = stop_timeout_s

    def start(self) -> None:
        self._collector.start()

    def stop(self) -> None:
        self._collector.stop(self._stop_timeout_s)

    def weights_synced(self, policy_version: int) -> None:
        self._collector.weights_synced(policy_version)

    def next_batch(self, iteration: int) -> ScoredBatch:
        """Raises RuntimeError if every reward failed, or if a sample is older than the bound allows."""
        self._collector.resume()
        with self._display.phase("generate"):
            groups = self._collector.take(self._batch_timeout_s)
            if self._stop_while_training:
                self._collector.suspend(self._suspend_timeout_s)
        for message in self._collector.messages():
            self._display.message(message)
        check_some_worked([status for group in groups for status in reward_statuses(group)])
        with self._collector.held() as buffer:
            metrics, consumed = buffer.metrics(), self._cursor.consumed
        metrics |= rollout_metrics(groups, self._advantage_estimator, self._length_gap)
        metrics |= staleness_metrics(groups, iteration, self._steps_per_rollout, self._max_staleness)
        return ScoredBatch(groups, metrics, consumed)

    def state(self) -> SourceState:
        """Makes engines return unfinished responses, so that the state has every token generated so far."""
        self._collector.suspend(self._suspend_timeout_s)
        with self._collector.held() as buffer:
            consumed, pending = self._cursor.consumed, buffer.pending()
        if not self._stop_while_training:
            self._collector.resume()
        return SourceState(consumed, pack_pending(pending))
