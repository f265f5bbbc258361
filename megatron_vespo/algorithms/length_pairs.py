"""Pairs of a better and a worse response of nearly equal length, so that length does not carry the reward.

Source: EqLen, arXiv 2604.17328: "the length problem is one of the unit of comparison", responses are only
comparable at equal length. EqLen makes such units while it generates: two tracks side by side, equal prefixes
inherited, segments masked. Here they are chosen from the group that was generated anyway, as neither the
engines nor W, the product over the whole response, know segments. What is lost are responses without partner.

Shape suffix: n completions of one prompt.
"""

from __future__ import annotations

import numpy as np

# |a - b| / max(a, b) of a pair's lengths a, b; EqLen's segments have 0, which whole responses rarely reach
LENGTH_GAP = 0.1


def length_pairs(
    rewards_n: np.ndarray, lengths_n: np.ndarray, length_gap: float, rounding: float
) -> list[tuple[int, int]]:
    """(better, worse) indices; each completion is in at most one pair.

    Of all pairs with different rewards and lengths at most `length_gap` apart, the closest is taken first,
    then the closest of those left. Of equally close ones the larger difference of the rewards comes first,
    then the order of the completions. Rewards closer than `rounding` are equal.
    """
    first_p, second_p = np.triu_indices(len(rewards_n), 1)
    difference_p = rewards_n[first_p] - rewards_n[second_p]
    gap_p = relative_gaps(lengths_n[first_p], lengths_n[second_p])
    allowed_p = np.flatnonzero((np.abs(difference_p) > rounding) & (gap_p <= length_gap))
    # the last key is the first to decide
    order_p = allowed_p[np.lexsort((-np.abs(difference_p[allowed_p]), gap_p[allowed_p]))]
    taken, pairs = set(), []
    for p in order_p:
        i, j = int(first_p[p]), int(second_p[p])
        if not taken & {i, j}:
            taken |= {i, j}
            pairs.append((i, j) if difference_p[p] > 0 else (j, i))
    return pairs


def relative_gaps(lengths: np.ndarray, others: np.ndarray) -> np.ndarray:
    """|a - b| / max(a, b), float64; 0 for two empty responses."""
    return np.abs(lengths - others) / np.maximum(np.maximum(lengths, others), 1)
