"""The result of a simulated run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_vespo.observability.tracing import (
    ENGINE_CAUSES,
    SLOWER_ENGINES,
    TRAINER_CAUSES,
    idle_shares,
)
from megatron_vespo.rollout.buffer import Counts, Group


@dataclass
class Batch:
    """A rollout batch that was trained on."""

    lags: np.ndarray  # [samples] optimizer steps: a sample's own step minus the version of its oldest token
    tokens: int  # of the responses
    prompts: list[int]  # ids
    end: float = math.nan  # seconds

    @classmethod
    def of(cls, groups: list[Group], first_step: int, steps_per_rollout: int, bound: int) -> Batch:
        completions = [completion for group in groups for completion in group]
        oldest = np.array([completion.policy_versions.versions[0] for completion in completions])
        steps = first_step + np.repeat(np.arange(steps_per_rollout), len(completions) // steps_per_rollout)
        lags = steps - oldest
        assert 0 <= lags.min() and lags.max() <= bound, f"lags {lags.min()} to {lags.max()}, bound {bound}"
        tokens = sum(len(completion.token_ids) for completion in completions)
        return cls(lags, tokens, [group[0].prompt.prompt_id for group in groups])


@dataclass(frozen=True)
class Result:
    """Rates and shares cover the batches after the `warm_up`, during which the buffer fills."""

    batches: list[Batch]
    phases: list[tuple[str, float, float]]  # name, start and end in seconds
    engines_busy: list[list[list[float]]]  # start and end of busy intervals, per engine
    tokens_generated: float  # from the start
    seconds: float  # duration of the whole run
    steps_per_rollout: int
    bound: int
    counts: Counts
    pending: list[int]  # prompts

    @property
    def warm_up(self) -> int:
        return min(math.ceil(self.bound / self.steps_per_rollout) + 1, len(self.batches) // 2)

    @property
    def window(self) -> tuple[float, float]:
        """Start and end, in seconds, of the time that rates and shares cover."""
        return (self.batches[self.warm_up - 1].end if self.warm_up else 0.0), self.seconds

    @property
    def step_seconds(self) -> float:
        """Seconds per optimizer step."""
        start, end = self.window
        return (end - start) / (len(self._steady) * self.steps_per_rollout)

    @property
    def tokens_per_second(self) -> float:
        """Response tokens trained on per second."""
        start, end = self.window
        return sum(batch.tokens for batch in self._steady) / (end - start)

    @property
    def samples_per_second(self) -> float:
        start, end = self.window
        return sum(len(batch.lags) for batch in self._steady) / (end - start)

    @property
    def mean_length(self) -> float:
        """Mean response tokens of a trained sample: below the generated mean if long responses expire."""
        return self.tokens_per_second / self.samples_per_second

    @property
    def staleness(self) -> np.ndarray:
        """[bound + 1] share of the samples with each lag."""
        lags = np.concatenate([batch.lags for batch in self._steady])
        return np.bincount(lags, minlength=self.bound + 1) / len(lags)

    @property
    def in_vain(self) -> float:
        """Share of the dispatched prompts that were wasted: failed, expired or dropped."""
        counts = self.counts
        lost = counts.stale_dropped + counts.stale_requeued + counts.expired + counts.failed
        return lost / max(counts.dispatched, 1)

    def phase_seconds(self, name: str) -> float:
        """Seconds of a phase in the whole run."""
        return sum(end - start for phase, start, end in self.phases if phase == name)

    @cached_property
    def trainer_idle(self) -> dict[str, float]:
        """Idle share of the time by cause, as in a run's summary."""
        busy = self._intervals("train", "log-probs")
        return idle_shares([busy], self._causes(TRAINER_CAUSES), *_nanoseconds(self.window).tolist())

    @cached_property
    def engines_idle(self) -> dict[str, float]:
        """The same for the engines, their mean."""
        rows = [_nanoseconds(times).reshape(-1, 2) for times in self.engines_busy]
        causes = {SLOWER_ENGINES: np.concatenate(rows)} | self._causes(ENGINE_CAUSES)
        return idle_shares(rows, causes, *_nanoseconds(self.window).tolist())

    @property
    def _steady(self) -> list[Batch]:
        return self.batches[self.warm_up :]

    def _causes(self, causes: dict[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
        return {cause: self._intervals(*names) for cause, names in causes.items()}

    def _intervals(self, *names: str) -> np.ndarray:
        times = [(start, end) for name, start, end in self.phases if name in names]
        return _nanoseconds(times).reshape(-1, 2)


def _nanoseconds(seconds) -> np.ndarray:
    return (np.array(seconds, np.float64) * 1e9).astype(np.int64)
