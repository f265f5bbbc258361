"""Scores completions: the reward function's results or the environment's, and the length penalty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, get_args

import numpy as np

from megatron_vespo.algorithms.advantages import overlong_penalty
from megatron_vespo.data.transcript import Turn, answer_text, transcripts
from megatron_vespo.rewards.pool import RewardItem, RewardPool, RewardResult
from megatron_vespo.types import Completion

TurnRewards = Literal["sum", "last"]  # how an environment's rewards become one
TURN_REWARDS: tuple[TurnRewards, ...] = get_args(TurnRewards)
TURNS_PART = "turns"  # the environment's reward, where a reward function gives the one to train on


class Scorer:
    """Scores completions with `rewards`; several threads may use it.

    Without `rewards`, the environment's rewards count: `turn_rewards` says how its steps' become one.
    `longest` is --max-completion-tokens. Over the last `buffer` tokens before it, the penalty falls from 0 to
    -`factor`. The length of a response is the number of its sampled tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        rewards: RewardPool | None,
        longest: int,
        buffer: int,
        factor: float,
        turn_rewards: TurnRewards = "sum",
    ):
        self._tokenizer, self._rewards = tokenizer, rewards
        self._longest, self._buffer, self._factor = longest, buffer, factor
        self._turn_rewards: TurnRewards = turn_rewards

    @property
    def groups_at_once(self) -> int:
        """From how many threads groups should be scored."""
        return 1 if self._rewards is None else self._rewards.batches_at_once

    def score(self, completions: Sequence[Completion]) -> list[RewardResult]:
        """Fills in rewards, their parts and penalties; returns the failed results, for example time-outs."""
        results = self._results(completions)
        penalties = overlong_penalty(
            np.array([completion.num_sampled for completion in completions]),
            np.array([completion.finish_reason == "length" for completion in completions]),
            self._longest,
            self._buffer,
        )
        for completion, result, penalty in zip(completions, results, penalties, strict=True):
            completion.overlong_penalty = float(self._factor * penalty)
            completion.reward_status = result.status
            completion.reward_error = "" if result.status == "ok" else result.detail
            completion.reward_parts = dict(result.parts)
            if self._rewards is not None and completion.turn_rewards:
                completion.reward_parts.setdefault(TURNS_PART, self._of_turns(completion))
            completion.reward = result.value  # last, because a completion with a reward is done
        return [result for result in results if result.status != "ok"]

    def _results(self, completions: Sequence[Completion]) -> list[RewardResult]:
        """Results in order. A failed environment has seen half an episode: nothing judges that."""
        if self._rewards is None:
            return [_failed_environment(c) or RewardResult(self._of_turns(c), "ok", "") for c in completions]
        judged = [completion for completion in completions if not completion.environment_error]
        turns = transcripts(self._tokenizer, judged)
        results = iter(self._rewards.score([_item(c, t) for c, t in zip(judged, turns, strict=True)]))
        return [_failed_environment(completion) or next(results) for completion in completions]

    def _of_turns(self, completion: Completion) -> float:
        rewards = completion.turn_rewards or (0.0,)
        return float(sum(rewards) if self._turn_rewards == "sum" else rewards[-1])


def _item(completion: Completion, turns: list[Turn]) -> RewardItem:
    metadata = completion.prompt.metadata | completion.reward_data
    if completion.segments is not None:
        metadata["turns"] = [turn._asdict() for turn in turns]
    ended = completion.finish_reason != "length"
    return RewardItem(answer_text(turns), completion.prompt.answer, metadata, ended)


def _failed_environment(completion: Completion) -> RewardResult | None:
    if not completion.environment_error:
        return None
    return RewardResult(0.0, "error", f"the environment failed: {completion.environment_error}")


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
    """Reward statuses of the completions that were judged: those that the length limit has not cut."""
    return [completion.reward_status for completion in completions if completion.finish_reason != "length"]


def check_some_worked(statuses: Sequence[str], why: str = "") -> None:
    """RuntimeError if every reward of a batch failed: training or evaluation cannot use such a batch."""
    if statuses and "ok" not in statuses:
        reason = f" ({why})" if why else ""
        raise RuntimeError(
            f"all {len(statuses)} rewards of a batch failed: the reward function or the environment does not "
            f"work{reason}"
        )
