"""Accuracy of the current policy: one sampled completion a prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_vespo.rollout.collector import Collector
from megatron_vespo.types import Completion, Prompt, SamplingParams


@dataclass
class Evaluation:
    """What one pass over the evaluation prompts gave."""

    accuracy: float  # mean reward
    num_prompts: int
    mean_length: float  # completion tokens
    completions: list[Completion]  # in prompt order, `reward` filled in


def evaluate(
    collector: Collector,
    prompts: list[Prompt],
    sampling: SamplingParams,
    score: Callable[[list[Completion]], list[float]],
    seed: int,
) -> Evaluation:
    """Sample one completion of each prompt and score them; the same seed draws the same seeds."""
    if not prompts:
        raise ValueError("evaluation needs at least one prompt")
    completions = [group[0] for group in collector.collect(prompts, sampling, num_completions=1, seed=seed)]
    rewards = score(completions)
    assert len(rewards) == len(completions), f"{len(rewards)} rewards for {len(completions)} completions"
    for completion, reward in zip(completions, rewards, strict=True):
        completion.reward = reward
    num_tokens = sum(len(completion.token_ids) for completion in completions)
    return Evaluation(
        accuracy=sum(rewards) / len(prompts),
        num_prompts=len(prompts),
        mean_length=num_tokens / len(prompts),
        completions=completions,
    )
