"""What the training loop asks for rollout batches, whatever generates them.

There are three sources:

    synchronous_batches.py   generates a batch when it is asked for; the current policy samples it
    background_batches.py    takes what is generated while training runs; --max-staleness bounds its age
    recorded_batches.py      reads what another run has recorded; --train-from
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_vespo.types import Completion

Group = list[Completion]


@dataclass(frozen=True)
class ScoredBatch:
    """One rollout batch, ready to be trained on.

    Example, 2 groups of 4 completions, the first batch of a run with dynamic sampling:
        ScoredBatch(groups=[[...], [...]], metrics={"reward/mean": 0.25, ...}, consumed_prompts=5)
    """

    groups: list[Group]  # in the order of the mini-batches, every completion with its reward
    metrics: dict[str, float]
    consumed_prompts: int  # since the start of the run, those of this batch included


@dataclass(frozen=True)
class SourceState:
    """What a checkpoint needs so that a resumed run gets the batches that this run would have got."""

    consumed_prompts: int
    pending: bytes | None = None  # groups in flight or finished, see `buffer_state`; None: there are none


class BatchSource(Protocol):
    """Gives the training loop one rollout batch after another."""

    in_background: bool  # whether generation goes on while the trainer works

    def start(self) -> None:
        """Called once, before the first batch and after the first weight sync."""

    def next_batch(self, iteration: int) -> ScoredBatch:
        """The batch that optimizer step `iteration` and the following ones train on."""
        ...

    def weights_synced(self, policy_version: int) -> None:
        """All engines serve this policy version from now on."""

    def state(self) -> SourceState:
        """The state after the last batch. May pause generation for a moment."""
        ...

    def stop(self) -> None:
        """Called once, after the last batch: nothing is in flight afterwards."""
