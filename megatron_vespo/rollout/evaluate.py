"""Accuracy of the current policy: the mean reward of one or more completions a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megatron_vespo.algorithms.accuracy import mean_interval
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.types import Completion, Prompt, SamplingParams


@dataclass
class Evaluation:
    """What one pass over the evaluation prompts gave."""

    accuracy: float  # mean reward, avg@k
    interval: tuple[float, float]  # 95%, over prompts
    num_prompts: int
    mean_length: float  # completion tokens
    completions: list[Completion]  # in prompt order, each one's together, `reward` filled in

    def metrics(self) -> dict[str, float]:
        low, high = self.interval
        return {
            "heldout/accuracy": self.accuracy,
            "heldout/interval_low": low,
            "heldout/interval_high": high,
            "heldout/length_mean": self.mean_length,
        }


def evaluate(
    collector: Collector,
    prompts: list[Prompt],
    sampling: SamplingParams,
    score: Callable[[list[Completion]], list[float]],
    seed: int,
    num_completions: int,
    temperature: float | None,
) -> Evaluation:
    """Sample completions of each prompt and score them; the same seed draws the same seeds.

    `temperature` in the place of that of `sampling`, if it is given.
    """
    if not prompts:
        raise ValueError("evaluation needs at least one prompt")
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)
    groups = collector.collect(prompts, sampling, num_completions=num_completions, seed=seed)
    completions = [completion for group in groups for completion in group]
    rewards = score(completions)
    assert len(rewards) == len(completions), f"{len(rewards)} rewards for {len(completions)} completions"
    for completion, reward in zip(completions, rewards, strict=True):
        completion.reward = reward
    rewards_PK = np.array(rewards, np.float64).reshape(len(prompts), num_completions)
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    return Evaluation(
        accuracy=float(rewards_PK.mean()),
        interval=mean_interval(rewards_PK.mean(axis=1), num_completions),
        num_prompts=len(prompts),
        mean_length=num_tokens / len(completions),
        completions=completions,
    )
