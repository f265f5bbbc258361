"""Group-relative advantages."""

from __future__ import annotations

import numpy as np


def group_advantages(rewards: np.ndarray, normalize_by_std: bool) -> np.ndarray:
    """A = R - mean(R of the prompt's group); optionally divided by the group's standard deviation.

    `rewards` is [num_groups, group_size]; the result has the same shape, float64. Groups without variance get
    exactly 0.
    """
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    # a mean of equal numbers can differ from them by rounding
    same = (rewards == rewards[:, :1]).all(axis=1, keepdims=True)
    advantages = np.where(same, 0.0, advantages)
    if normalize_by_std and rewards.shape[1] > 1:
        std = rewards.std(axis=1, ddof=1, keepdims=True)
        advantages = np.where(same, 0.0, advantages / np.where(same, 1.0, std))
    return advantages
