"""avg@k and pass@k of a prompt set, and how far off they may be.

Shapes: P prompts, K completions a prompt.
"""

from __future__ import annotations

import math

import numpy as np

Z_95 = 1.959963984540054  # the normal distribution's 97.5% quantile
RESAMPLES = 2000  # of the bootstrap: its bounds are then good to a few percent of their distance
_RESAMPLES_AT_ONCE = 50


def pass_at_k(num_correct: int, num_drawn: int, k: int) -> float:
    """The chance that one of k completions is correct, unbiased, from c correct ones among n >= k drawn:

        1 - C(n - c, k) / C(n, k)

    the share of the n's subsets of size k with a correct one. As a product, without huge binomials: a subset
    without one is all of k places among the n - c. Source: arXiv 2107.03374, section 2.1.
    """
    assert 0 <= num_correct <= num_drawn and 1 <= k <= num_drawn, (num_correct, num_drawn, k)
    wrong = num_drawn - num_correct
    if wrong < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / place for place in range(wrong + 1, num_drawn + 1))


def passes_at_k(rewards_PK: np.ndarray, pass_reward: float, k: int) -> np.ndarray:
    """pass@k of every prompt, float64 [P]; a completion is correct from a reward of `pass_reward` on."""
    num_completions = rewards_PK.shape[1]
    by_number = np.array([pass_at_k(c, num_completions, k) for c in range(num_completions + 1)])
    return by_number[(rewards_PK >= pass_reward).sum(axis=1)]


def shown_ks(num_completions: int) -> list[int]:
    """Powers of two, and K itself."""
    powers = [2**power for power in range(num_completions.bit_length())]
    return sorted({*powers, num_completions})


def wilson_interval(share: float, num_trials: float) -> tuple[float, float]:
    """The 95% Wilson score interval of a success probability: `share` of `num_trials` succeeded."""
    center = share + Z_95 * Z_95 / (2 * num_trials)
    margin = Z_95 * math.sqrt(share * (1 - share) / num_trials + Z_95 * Z_95 / (4 * num_trials**2))
    scale = 1 + Z_95 * Z_95 / num_trials
    return (center - margin) / scale, (center + margin) / scale


def mean_interval(values_P: np.ndarray, num_completions: int, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean over prompts: what other prompts of the same kind would give.

    `values_P`, float64, are independent, one a prompt: its mean reward, or its pass@k. Completions of one
    prompt are not, so that P * K trials would make the interval far too narrow.

    Values within 0 and 1: Wilson's interval with the effective number of trials

        n = P p (1 - p) / var(values),   P <= n <= P K

    (Kish's design effect: a mean of n independent yes-or-no trials would vary as much.) With one completion
    a prompt it is Wilson's own; it stays within 0 and 1, and has a width where all values are equal, which
    neither the normal approximation nor a bootstrap has. If all are 0 or all 1, n = P.
    Other values: the percentile bootstrap over prompts.
    """
    num_prompts = len(values_P)
    assert num_prompts >= 1 and num_completions >= 1, (num_prompts, num_completions)
    if values_P.min() < 0.0 or values_P.max() > 1.0:
        return _bootstrap(values_P, seed)
    mean = float(values_P.mean())
    if mean * (1 - mean) <= 0.0:
        return wilson_interval(mean, num_prompts)
    variance = float(values_P.var())
    most = num_prompts * num_completions
    if variance * most <= num_prompts * mean * (1 - mean):
        return wilson_interval(mean, most)
    return wilson_interval(mean, num_prompts * mean * (1 - mean) / variance)


def repeat_error(rewards_PK: np.ndarray) -> float:
    """Standard error of avg@k among repeated evaluations of the same prompts; needs K >= 2.

        sqrt(sum_p var_p / K) / P,   var_p the unbiased variance of prompt p's rewards

    It is what a difference between two checkpoints on the same prompts must be compared with.
    """
    num_prompts, num_completions = rewards_PK.shape
    assert num_completions >= 2, num_completions
    return math.sqrt(float(rewards_PK.var(axis=1, ddof=1).sum()) / num_completions) / num_prompts


def _bootstrap(values_P: np.ndarray, seed: int) -> tuple[float, float]:
    random, num_prompts = np.random.default_rng(seed), len(values_P)
    means = [
        values_P[random.integers(num_prompts, size=(_RESAMPLES_AT_ONCE, num_prompts))].mean(axis=1)
        for _ in range(RESAMPLES // _RESAMPLES_AT_ONCE)
    ]
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return float(low), float(high)
