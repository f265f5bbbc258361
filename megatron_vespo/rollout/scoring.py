"""Scores completions: the reward function's results, and the length penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from megatron_vespo.algorithms.advantages import overlong_penalty
from megatron_vespo.rewards.pool import RewardItem, RewardPool, RewardResult
from megatron_vespo.types import Completion


class Scorer:
    """Decodes completions and scores them with `rewards`; several threads may use it.

    `longest` is --max-completion-tokens. Over the last `buffer` tokens before it, the penalty falls from 0 to
    -`factor`.
    """

    def __init__(self, tokenizer: Any, rewards: RewardPool, longest: int, buffer: int, factor: float):
        self._tokenizer, self._rewards = tokenizer, rewards
        self._longest, self._buffer, self._factor = longest, buffer, factor

    def score(self, completions: Sequence[Completion]) -> list[RewardResult]:
        """Fills in rewards and penalties; returns the failed results, for example time-outs."""
        texts = self._tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        items = [
            RewardItem(text, c.prompt.answer, c.prompt.metadata, ended=c.finish_reason == "stop")
            for text, c in zip(texts, completions, strict=True)
        ]
        results = self._rewards.score(items)
        penalties = overlong_penalty(
            np.array([len(completion.token_ids) for completion in completions]),
            np.array([completion.finish_reason == "length" for completion in completions]),
            self._longest,
            self._buffer,
        )
        for completion, result, penalty in zip(completions, results, penalties, strict=True):
            completion.overlong_penalty = float(self._factor * penalty)
            completion.reward_status = result.status
            completion.reward = result.value  # last, because a completion with a reward is done
        return [result for result in results if result.status != "ok"]


def score_and_report(
    scorer: Scorer, completions: Sequence[Completion], report: Callable[[str], None]
) -> list[float]:
    """Rewards of all completions, float [len(completions)]; `report` gets one line about those that failed.

    Raises RuntimeError if all of them failed.
    """
    failures = scorer.score(completions)
    if failures:
        report(describe_failures(failures))
        check_some_worked(reward_statuses(completions), describe_failures(failures))
    return [cast(float, completion.reward) for completion in completions]  # filled in by `score`


def describe_failures(failures: Sequence[RewardResult]) -> str:
    """One line about the failures."""
    return f"{len(failures)} rewards failed, the first one: {failures[0].status} {failures[0].detail}"


def reward_statuses(completions: Sequence[Completion]) -> list[str]:
    """Reward statuses of the completions that the reward function has judged."""
    return [completion.reward_status for completion in completions if completion.finish_reason == "stop"]


def check_some_worked(statuses: Sequence[str], why: str = "") -> None:
    """RuntimeError if every reward of a batch failed: training or evaluation cannot use such a batch."""
    if statuses and "ok" not in statuses:
        reason = f" ({why})" if why else ""
        raise RuntimeError(
            f"all {len(statuses)} rewards of a batch failed: the reward function does not work{reason}"
        )
