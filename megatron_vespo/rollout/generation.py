"""The objects that a run generates and scores completions with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_vespo.data.prompts import PromptCursor
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.scoring import Scorer, score_and_report
from megatron_vespo.rollout.teachers import Teachers
from megatron_vespo.types import Completion, SamplingParams


@dataclass(frozen=True)
class Generation:
    """Prompts, engines and rewards of a run. A run on recorded batches has none of them."""

    collector: Collector
    cursor: PromptCursor
    sampling: SamplingParams
    scorer: Scorer | None  # None: the caller scores the completions
    teachers: Teachers | None = None  # None: nothing is distilled

    def score(self, completions: list[Completion], report: Callable[[str], None]) -> list[float]:
        """Scores `completions`; returns the rewards, see `score_and_report`."""
        assert self.scorer is not None, "nothing scores"
        return score_and_report(self.scorer, completions, report)
