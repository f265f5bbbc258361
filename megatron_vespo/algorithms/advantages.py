"""Computes advantages from rewards, for G prompts of n completions each. All arithmetic is float64.

With mean_g and std_g over the prompt's own group (std_g with n - 1 in the denominator):

    group-mean       A = R - mean_g
    group-mean-std   A = (R - mean_g) / std_g                      (GRPO, arXiv 2402.03300)
    leave-one-out    A = R - mean of the other n - 1 rewards       (RLOO, arXiv 2402.14740)
                       = n / (n - 1) (R - mean_g)
    global           A = (R - mean) / std over all G n rewards     (REINFORCE++, arXiv 2501.03262)
    equal-length-pairs   A = R - mean of the pair's two rewards, 0 without a pair, see `length_pairs`
                                                                   (after EqLen, arXiv 2604.17328)

`global` is the paper's normalisation over the rollout batch: every response counts once, and std has G n - 1
in the denominator. The paper's KL term inside the reward is --kl-coef's. Only `global` gives groups of equal
rewards an advantage: a prompt that is always solved counts as better than the batch.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from megatron_vespo.algorithms.length_pairs import LENGTH_GAP, length_pairs, relative_gaps

AdvantageEstimator = Literal["group-mean", "group-mean-std", "leave-one-out", "global", "equal-length-pairs"]
ADVANTAGE_ESTIMATORS: tuple[AdvantageEstimator, ...] = get_args(AdvantageEstimator)

# Rewards closer than this are equal, as a share of their group's largest reward, or of 1 if that is smaller.
# Sums like 0.1 + 0.2 and 0.3 differ by 1e-16 of themselves; 0.1 + 0.2 - 0.3 and 0 differ by 1e-16 of their
# terms. Division by such a standard deviation would turn that into an advantage of 1.
ROUNDING = 1e-9


def advantages(
    rewards: np.ndarray,
    estimator: AdvantageEstimator,
    lengths: np.ndarray | None = None,
    length_gap: float = LENGTH_GAP,
    penalties: np.ndarray | float = 0.0,
) -> np.ndarray:
    """The advantage A of every completion: `rewards` [G, n] -> [G, n] float64.

    `lengths` [G, n], in sampled tokens, and `length_gap` are for equal-length-pairs. A group without variance
    (for `global`, a batch without variance) gets exactly 0. `penalties` [G, n] are subtracted first. Where
    the rewards have no variance without them, nothing is divided by a standard deviation: that would turn the
    rounding of penalties into advantages of 1. ValueError names a reward that is not finite.
    """
    rewards = _finite(rewards)
    penalised = _finite(rewards - penalties)
    if estimator == "equal-length-pairs":
        assert lengths is not None, "equal-length-pairs compares lengths"
        return _of_pairs(penalised, _pairs(penalised, lengths, length_gap))
    if estimator == "global":
        by_std = has_variance(rewards.reshape(1, -1))
        return _normalized(penalised.reshape(1, -1), by_std).reshape(rewards.shape)
    if estimator == "leave-one-out":
        n = rewards.shape[1]
        return _normalized(penalised) * (n / max(n - 1, 1))
    return _normalized(penalised, has_variance(rewards) if estimator == "group-mean-std" else None)


def has_variance(rewards: np.ndarray) -> np.ndarray:
    """Which groups have different rewards, beyond rounding: [G, n] -> [G] bool."""
    rewards = _finite(rewards)
    return rewards.max(axis=1) - rewards.min(axis=1) > _rounding(rewards)


def pair_metrics(rewards: np.ndarray, lengths: np.ndarray, length_gap: float) -> dict[str, float]:
    """Of equal-length-pairs, see `advantages`: share of completions in a pair, mean gap of the pairs."""
    pairs = _pairs(_finite(rewards), lengths, length_gap)
    gaps = [
        relative_gaps(of_group[better], of_group[worse])
        for of_group, of_pairs in zip(lengths, pairs, strict=True)
        for better, worse in of_pairs
    ]
    metrics = {"pairs/paired_share": 2 * len(gaps) / rewards.size}
    return metrics | ({"pairs/length_gap_mean": float(np.mean(gaps))} if gaps else {})


def overlong_penalty(lengths: np.ndarray, truncated: np.ndarray, longest: int, buffer: int) -> np.ndarray:
    """DAPO's soft punishment of long responses (arXiv 2503.14476, eq. 13), in [-1, 0].

        0                                  length <= longest - buffer
        (longest - buffer - length) / buffer          up to longest, where it is -1
        -1                                 truncated, at any length

    `lengths` (int), `truncated` (bool) and the result (float64) have the same shape. `buffer` 0 turns it off.
    """
    if buffer == 0:
        return np.zeros(np.shape(lengths))
    linear = np.clip((longest - buffer - np.asarray(lengths, np.float64)) / buffer, -1.0, 0.0)
    return np.where(truncated, -1.0, linear)


def _pairs(rewards: np.ndarray, lengths: np.ndarray, length_gap: float) -> list[list[tuple[int, int]]]:
    """Of each group."""
    return [
        length_pairs(rewards_n, lengths_n, length_gap, rounding)
        for rewards_n, lengths_n, rounding in zip(rewards, lengths, _rounding(rewards), strict=True)
    ]


def _of_pairs(rewards: np.ndarray, pairs: list[list[tuple[int, int]]]) -> np.ndarray:
    result = np.zeros(rewards.shape)
    for row, (of_group, of_pairs) in enumerate(zip(rewards, pairs, strict=True)):
        for better, worse in of_pairs:
            half = (of_group[better] - of_group[worse]) / 2
            result[row, better], result[row, worse] = half, -half
    return result


def _rounding(rewards: np.ndarray) -> np.ndarray:
    """What rewards of a group may differ by and are equal, [G]."""
    return ROUNDING * np.maximum(np.abs(rewards).max(axis=1), 1.0)


def _normalized(rewards: np.ndarray, by_std: np.ndarray | None = None) -> np.ndarray:
    """Rows minus their mean, and over their standard deviation where `by_std`, bool [rows], says so.

    Rows without variance become 0.
    """
    varied = has_variance(rewards)
    centered = np.where(varied[:, None], rewards - rewards.mean(axis=1, keepdims=True), 0.0)
    if by_std is None:
        return centered
    degrees = max(rewards.shape[1] - 1, 1)
    std = np.sqrt(np.square(centered).sum(axis=1, keepdims=True) / degrees)
    return centered / np.where((varied & by_std)[:, None], std, 1.0)


def _finite(rewards: np.ndarray) -> np.ndarray:
    """`rewards` as float64; ValueError unless all are finite. A missing reward (None) counts as NaN."""
    rewards = np.asarray(rewards, np.float64)
    bad = np.argwhere(~np.isfinite(rewards))
    if len(bad):
        group, index = bad[0]
        raise ValueError(
            f"completion {index} of group {group} has the reward {rewards[group, index]}, it must be finite"
        )
    return rewards
