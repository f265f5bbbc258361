"""Advantage estimators and the penalty for length, against loops written from their formulas."""

import math
import statistics

import numpy as np
import pytest

from megatron_vespo.algorithms.advantages import (
    ADVANTAGE_ESTIMATORS,
    advantages,
    has_variance,
    overlong_penalty,
    pair_metrics,
)
from tests.support.naive_losses import naive_pairs

OF_REWARDS = ADVANTAGE_ESTIMATORS[:4]  # they do not look at lengths


def by_hand(rewards: list[list[float]], estimator: str) -> list[list[float]]:
    everything = [reward for group in rewards for reward in group]
    mean, std = statistics.fmean, statistics.stdev
    # of the reward, its group and the group's other rewards
    formula = {
        "group-mean": lambda r, group, others: r - mean(group),
        "group-mean-std": lambda r, group, others: (r - mean(group)) / std(group),
        "leave-one-out": lambda r, group, others: r - mean(others),
        "global": lambda r, group, others: (r - mean(everything)) / std(everything),
    }[estimator]
    return [
        [formula(reward, group, group[:i] + group[i + 1 :]) for i, reward in enumerate(group)]
        for group in rewards
    ]


@pytest.mark.parametrize("estimator", OF_REWARDS)
@pytest.mark.parametrize("shape", [(5, 8), (3, 2), (1, 3)])
def test_estimators_equal_the_loops(estimator, shape):
    rewards = np.random.default_rng(0).normal(2.0, 3.0, shape)
    result = advantages(rewards, estimator)
    assert result.dtype == np.float64
    np.testing.assert_allclose(result, by_hand(rewards.tolist(), estimator), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", OF_REWARDS)
@pytest.mark.parametrize(
    "group",
    [
        [0.1] * 6,  # its mean in float64 is not 0.1
        [0.1 + 0.2, 0.3, 0.3, 0.3, 0.3, 0.3],
        [0.0] * 6,
        [-7e9, -7e9 * (1 + 1e-15), -7e9, -7e9, -7e9, -7e9],
        [0.0, 0.1 + 0.2 - 0.3, 0.0, 0.0, 0.0, 0.0],
        [1e-12, 2e-12, 1e-12, 1e-12, 1e-12, 1e-12],
        [0.0, 1e-300, 0.0, 0.0, 0.0, 0.0],
    ],
)
def test_rewards_equal_but_for_rounding_give_exactly_zero(estimator, group):
    if estimator == "global":
        assert (advantages(np.array([group, group]), estimator) == 0.0).all()
        return
    result = advantages(np.array([group, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]), estimator)
    assert (result[0] == 0.0).all() and (result[1] != 0.0).all()


@pytest.mark.parametrize("estimator", OF_REWARDS)
def test_small_rewards_are_not_rounding(estimator):
    rewards = np.array([[1e-6, 2e-6, 3e-6]])
    assert (np.sign(advantages(rewards, estimator)) == [[-1, 0, 1]]).all()


@pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS[:3])
def test_a_group_of_one_teaches_nothing(estimator):
    assert advantages(np.array([[1.0], [0.5]]), estimator).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("estimator", ADVANTAGE_ESTIMATORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_reward_that_is_no_number_is_named(estimator, bad):
    rewards = np.array([[0.0, 1.0], [1.0, bad]])
    shown = "inf" if bad == math.inf else "nan"
    with pytest.raises(ValueError) as error:
        advantages(rewards, estimator, np.ones((2, 2)))
    assert str(error.value) == f"completion 1 of group 1 has the reward {shown}, it must be finite"
    with pytest.raises(ValueError, match="completion 1 of group 1"):
        has_variance(rewards)


@pytest.mark.parametrize("gap", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("binary", [True, False])
def test_pairs_equal_the_loop(gap, size, binary):
    draw = np.random.default_rng(0)
    rewards = draw.integers(0, 2, (50, size)).astype(float) if binary else draw.normal(0.0, 2.0, (50, size))
    lengths = draw.integers(0, 40, (50, size))
    result = advantages(rewards, "equal-length-pairs", lengths, gap)
    expected = [naive_pairs(*row, gap) for row in zip(rewards.tolist(), lengths.tolist(), strict=True)]
    np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-14)
    metrics = pair_metrics(rewards, lengths, gap)
    assert metrics["pairs/paired_share"] == (np.array(expected) != 0).mean()
    assert metrics.get("pairs/length_gap_mean", 0.0) <= gap


def test_pairs_by_hand():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0, 0.0]])
    lengths = np.array([[100, 96, 91, 60, 65]])
    for gap, expected in (
        (0.1, [0.5, -0.5, 0.0, 0.5, -0.5]),
        (0.05, [0.5, -0.5, 0.0, 0.0, 0.0]),
        (0.01, [0.0] * 5),
    ):
        assert advantages(rewards, "equal-length-pairs", lengths, gap).tolist() == [expected]
    metrics = pair_metrics(rewards, lengths, 0.1)
    assert metrics == pytest.approx(
        {"pairs/paired_share": 0.8, "pairs/length_gap_mean": (4 / 100 + 5 / 65) / 2}
    )
    assert pair_metrics(rewards, lengths, 0.01) == {"pairs/paired_share": 0.0}


def test_pairs_of_equal_rewards_do_not_exist():
    rewards, lengths = np.array([[0.1 + 0.2, 0.3, 0.3], [7e9, 7e9 * (1 + 1e-15), 0.0]]), np.full((2, 3), 9)
    result = advantages(rewards, "equal-length-pairs", lengths)
    assert (result[0] == 0.0).all() and sorted(np.sign(result[1])) == [-1, 0, 1]


def test_where_length_alone_decides_on_the_reward_pairs_teach_nothing():
    """Long responses are right: other estimators push length, pairs do not."""
    lengths = np.array([[10, 20, 30, 40, 200, 220, 260, 300]])
    rewards = (lengths > 100).astype(float)
    assert not advantages(rewards, "equal-length-pairs", lengths).any()
    assert (advantages(rewards, "group-mean") * lengths).sum() > 100


def test_pairs_push_no_length():
    """The sum of A times length is at most half the gap of each pair."""
    draw = np.random.default_rng(1)
    lengths = draw.integers(50, 2000, (200, 16))
    rewards = (draw.random((200, 16)) < lengths / 2000).astype(float)  # longer is better
    pushed, paired = (
        float((advantages(rewards, estimator, lengths, 0.1) * lengths).mean())
        for estimator in ("group-mean", "equal-length-pairs")
    )
    assert pushed > 50 and abs(paired) < 1


def test_has_variance():
    rewards = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.3, 0.1 + 0.2, 0.3], [-1.0, -1.0, 0.0]])
    assert has_variance(rewards).tolist() == [False, True, False, True]
    assert not has_variance(np.array([[0.0, 0.1 + 0.2 - 0.3], [1e-12, 2e-12], [0.0, 1e-300]])).any()


def penalty_by_hand(length: int, truncated: bool, longest: int, buffer: int) -> float:
    if truncated:
        return -1.0
    if length <= longest - buffer:
        return 0.0
    return -(length - (longest - buffer)) / buffer


@pytest.mark.parametrize("buffer", [1, 4, 10])
def test_overlong_penalty_equals_the_loop(buffer):
    lengths = np.arange(0, 11).repeat(2)
    truncated = np.arange(22) % 2 == 1
    expected = [penalty_by_hand(int(n), bool(t), 10, buffer) for n, t in zip(lengths, truncated, strict=True)]
    result = overlong_penalty(lengths, truncated, 10, buffer)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-15)
    assert result.min() == -1.0 and result.max() == 0.0


def test_no_buffer_no_penalty():
    assert overlong_penalty(np.array([3, 10]), np.array([False, True]), 10, 0).tolist() == [0.0, 0.0]
