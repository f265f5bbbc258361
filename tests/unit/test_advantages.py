"""Group-relative advantages."""

import numpy as np
import pytest

from megatron_vespo.algorithms.advantages import group_advantages


def test_the_mean_of_the_group_is_the_baseline():
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 6.0, 8.0]])
    assert group_advantages(rewards, False).tolist() == [[0.75, -0.25, -0.25, -0.25], [-3.0, -1.0, 1.0, 3.0]]


def test_division_by_the_sample_standard_deviation():
    rewards = np.array([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 6.0, 8.0]])
    advantages = group_advantages(rewards, True)
    # sums of squares are 3/4 and 20, over 4 - 1
    assert advantages[0] == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert advantages[1] == pytest.approx(np.array([-3.0, -1.0, 1.0, 3.0]) / np.sqrt(20 / 3))


@pytest.mark.parametrize("by_std", [False, True])
def test_equal_rewards_give_exactly_zero(by_std):
    # the mean of 0.1 six times is not 0.1 in float64
    rewards = np.array([[0.1] * 6, [0.7] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    assert (rewards.mean(axis=1) != rewards[:, 0]).any()
    advantages = group_advantages(rewards, by_std)
    assert (advantages[:2] == 0.0).all()
    assert (advantages[2] != 0.0).all()


@pytest.mark.parametrize("by_std", [False, True])
def test_a_group_of_one_teaches_nothing(by_std):
    assert group_advantages(np.array([[1.0], [0.5]]), by_std).tolist() == [[0.0], [0.0]]


def test_integer_rewards_become_float64():
    advantages = group_advantages(np.array([[0, 1]]), True)
    assert advantages.dtype == np.float64
    assert advantages.tolist() == [[pytest.approx(-np.sqrt(0.5)), pytest.approx(np.sqrt(0.5))]]
