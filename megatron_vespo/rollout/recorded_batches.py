"""Rollout batches that another run recorded: needs no engines and no reward function."""

from __future__ import annotations

from pathlib import Path

from megatron_vespo.data.rollout_file import batch_path, read_record
from megatron_vespo.rollout.batch_source import ScoredBatch, SourceState


class RecordedBatches:
    """Reads the batches that --save-rollouts has written to `folder`.

    Everything after the rewards is computed again. The same layout, seed and flags give bit-identical
    results. Another loss or advantage estimator can be tried on the same data. Reading begins after
    `consumed_prompts` prompts.
    """

    in_background = False

    def __init__(self, folder: Path, *, steps_per_rollout: int, consumed_prompts: int):
        self._folder, self._steps_per_rollout, self._consumed_prompts = (
            folder,
            steps_per_rollout,
            consumed_prompts,
        )

    def start(self) -> None:
        """Nothing runs."""

    def stop(self) -> None:
        """Nothing runs."""

    def weights_synced(self, policy_version: int) -> None:
        """There are no engines."""

    def next_batch(self, iteration: int) -> ScoredBatch:
        """Raises ValueError if the file is missing or is no recorded batch."""
        record = read_record(batch_path(self._folder, iteration // self._steps_per_rollout))
        self._consumed_prompts = record.consumed_prompts
        return ScoredBatch(record.groups, record.metrics, record.consumed_prompts)

    def state(self) -> SourceState:
        return SourceState(self._consumed_prompts)
