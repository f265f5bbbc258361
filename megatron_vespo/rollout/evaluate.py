"""Evaluates the current policy: avg@K, the mean reward of K completions per prompt, and pass@k."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from megatron_vespo.algorithms.accuracy import mean_interval, passes_at_k, shown_ks
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.types import Completion, Prompt, SamplingParams


@dataclass
class Evaluation:
    """Result of one pass over the evaluation prompts. Intervals are 95% confidence intervals over prompts."""

    accuracy: float  # mean reward, avg@K
    interval: tuple[float, float]
    passes: dict[int, tuple[float, float, float]]  # k > 1 -> pass@k and its interval
    mean_length: float  # sampled tokens

    def metrics(self) -> dict[str, float]:
        low, high = self.interval
        found = {
            "eval/accuracy": self.accuracy,
            "eval/interval_low": low,
            "eval/interval_high": high,
            "eval/length_mean": self.mean_length,
        }
        for k, (share, low, high) in self.passes.items():
            name = f"eval/pass_at_{k}"
            found |= {name: share, f"{name}_interval_low": low, f"{name}_interval_high": high}
        return found


def evaluate(
    collector: Collector,
    prompts: list[Prompt],
    sampling: SamplingParams,
    score: Callable[[list[Completion]], list[float]],
    seed: int,
    num_completions: int,
    temperature: float | None,
    pass_reward: float,
) -> Evaluation:
    """Samples `num_completions` completions of each prompt and scores them.

    The same `seed` gives every completion the same sampling seed. `temperature`, if given, replaces that of
    `sampling`. Completions are drawn from the whole vocabulary, even if those of training are not. For pass@k
    a completion is correct if its reward is at least `pass_reward`.
    Raises ValueError without prompts.
    """
    if not prompts:
        raise ValueError("evaluation needs at least one prompt")
    sampling = sampling.untruncated()
    if temperature is not None:
        sampling = replace(sampling, temperature=temperature)
    groups = collector.collect(
        prompts, sampling, num_completions=num_completions, seed=seed, for_training=False
    )
    completions = [completion for group in groups for completion in group]
    rewards = score(completions)
    rewards_PK = np.array(rewards, np.float64).reshape(len(prompts), num_completions)
    passes = {}
    for k in shown_ks(num_completions)[1:]:
        values_P = passes_at_k(rewards_PK, pass_reward, k)
        passes[k] = float(values_P.mean()), *mean_interval(values_P, num_completions)
    return Evaluation(
        accuracy=float(rewards_PK.mean()),
        interval=mean_interval(rewards_PK.mean(axis=1), num_completions),
        passes=passes,
        mean_length=sum(completion.num_sampled for completion in completions) / len(completions),
    )
