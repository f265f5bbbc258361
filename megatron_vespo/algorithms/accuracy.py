"""Computes avg@k and pass@k of a prompt set, and their confidence intervals.

Shapes: P prompts, K completions per prompt.
"""

from __future__ import annotations

import math

import numpy as np

Z_95 = 1.959963984540054  # the normal distribution's 97.5% quantile
RESAMPLES = 2000  # of the bootstrap: its bounds are then accurate to a few percent of the interval's width
_RESAMPLES_AT_ONCE = 50
# The variance of a mean counts this many extra prompts of value 0, and as many of value 1. It is the smallest
# number with which the table in `mean_interval` shows 93% or more everywhere.
UNSEEN_PROMPTS = 0.4


def pass_at_k(num_correct: int, num_drawn: int, k: int) -> float:
    """Unbiased chance that one of k completions is correct, from c correct ones among n >= k drawn:

        1 - C(n - c, k) / C(n, k)

    That is the share of subsets of size k that contain a correct completion. It is computed as a product,
    without huge binomials. Source: arXiv 2107.03374, section 2.1.
    """
    assert 0 <= num_correct <= num_drawn and 1 <= k <= num_drawn, (num_correct, num_drawn, k)
    wrong = num_drawn - num_correct
    if wrong < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / place for place in range(wrong + 1, num_drawn + 1))


def passes_at_k(rewards_PK: np.ndarray, pass_reward: float, k: int) -> np.ndarray:
    """pass@k of every prompt, float64 [P]; a completion with a reward >= `pass_reward` is correct."""
    num_completions = rewards_PK.shape[1]
    by_number = np.array([pass_at_k(c, num_completions, k) for c in range(num_completions + 1)])
    return by_number[(rewards_PK >= pass_reward).sum(axis=1)]


def shown_ks(num_completions: int) -> list[int]:
    """The values of k to show: powers of two, and K itself."""
    powers = [2**power for power in range(num_completions.bit_length())]
    return sorted({*powers, num_completions})


def wilson_interval(share: float, num_trials: float) -> tuple[float, float]:
    """The 95% Wilson score interval of a success probability, if `share` of `num_trials` succeeded."""
    center = share + Z_95 * Z_95 / (2 * num_trials)
    margin = Z_95 * math.sqrt(share * (1 - share) / num_trials + Z_95 * Z_95 / (4 * num_trials**2))
    scale = 1 + Z_95 * Z_95 / num_trials
    return (center - margin) / scale, (center + margin) / scale


def mean_interval(values_P: np.ndarray, num_completions: int, seed: int = 0) -> tuple[float, float]:
    """The 95% interval of a mean over prompts, which covers what other prompts of the same kind would give.

    `values_P`, float64, has one independent value per prompt: its mean reward, or its pass@k. Completions of
    one prompt are not independent, so P * K trials would make the interval far too narrow.

    For values within 0 and 1 it is Wilson's interval with the effective number of trials

        n = P p (1 - p) / v,   P <= n <= P K

    (Kish's design effect: a mean of n independent yes-or-no trials would vary as much.) p and v are mean and
    variance of the values, with UNSEEN_PROMPTS extra values at 0 and as many at 1. These stand for prompts
    that the set could have had. In a hard set most prompts are never solved, and the mean comes from a few.
    Without the extra values, v is too small whenever none of these few was drawn. With one completion per
    prompt n = P, which is Wilson's own interval. It stays within 0 and 1, and has a width even if all values
    are equal, unlike the normal approximation and the bootstrap. For other values it is the percentile
    bootstrap over prompts.

    The table shows the share of 20,000 simulated evaluations whose interval held the truth, and its mean
    width. "before" is UNSEEN_PROMPTS = 0. There are 30 prompts, with a chance of success drawn from a beta
    distribution:

        prompts                            metric             before           now
        Beta(1, 1), mean 50%               avg@8         94.1% 0.221   94.6% 0.225
                                           pass@8 of 16  90.6% 0.175   94.4% 0.183
        Beta(2, 3), mean 40%               avg@8         94.4% 0.176   95.4% 0.182
                                           pass@8 of 16  89.6% 0.140   96.1% 0.153
        Beta(0.3, 2), mean 13%             avg@8         92.9% 0.146   95.8% 0.157
        Beta(0.1, 3.2), mean 3%            avg@8         88.2% 0.071   97.7% 0.104
                                           avg@16        88.1% 0.064   98.2% 0.100
                                           pass@8 of 16  94.3% 0.202   95.5% 0.206
        a tenth Beta(2, 5), others 0       avg@8         89.9% 0.087   97.2% 0.114
        the same, 100 prompts              avg@8         93.5% 0.045   96.9% 0.049
        Beta(1, 1), 10 prompts             avg@8         92.4% 0.349   94.7% 0.369
        Beta(1, 1), 3 prompts              avg@8         81.2% 0.483    100% 0.586

    pass@K of K completions is one yes or no per prompt: Wilson's own, 92 to 99% with 30 prompts, 90% with 3.
    """
    num_prompts = len(values_P)
    assert num_prompts >= 1 and num_completions >= 1, (num_prompts, num_completions)
    if values_P.min() < 0.0 or values_P.max() > 1.0:
        return _bootstrap(values_P, seed)
    weight = num_prompts + 2 * UNSEEN_PROMPTS
    mean = (float(values_P.sum()) + UNSEEN_PROMPTS) / weight
    variance = (float(np.square(values_P).sum()) + UNSEEN_PROMPTS) / weight - mean * mean
    num_trials = num_prompts * min(mean * (1 - mean) / variance, num_completions)
    return wilson_interval(float(values_P.mean()), num_trials)


def repeat_error(rewards_PK: np.ndarray) -> float:
    """Standard error of avg@k among repeated evaluations of the same prompts; needs K >= 2.

        sqrt(sum_p var_p / K) / P,   var_p the unbiased variance of prompt p's rewards

    Compare a difference between two checkpoints on the same prompts with it.
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
