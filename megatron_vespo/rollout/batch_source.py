"""The interface from which the training loop gets rollout batches.

There are three sources:

    synchronous_batches.py   generates a batch on request; the current policy samples it
    background_batches.py    takes batches generated during training; --max-staleness bounds their age
    recorded_batches.py      reads batches that another run recorded; --train-from
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
    consumed_prompts: int  # since the start of the run, this batch included


@dataclass(frozen=True)
class SourceState:
    """State in a checkpoint, with which a resumed run gets the batches that this run would have got."""

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
        """Called once, after the last batch. Nothing is in flight afterwards."""
