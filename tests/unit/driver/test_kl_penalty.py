"""--kl-coef: rewards minus the distance from the reference policy, and the advantages made of them."""

import numpy as np
import pytest

from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.driver.training_samples import penalize, training_samples
from tests.support.builders import make_group, make_prompt

REWARDS = ([1.0, 0.0], [1.0, 1.0])
# the engine's log-probs of the responses minus the reference's, token by token
GAPS = ([[0.5, -0.1], [0.2]], [[0.0, 0.0, 0.3], [-0.4]])


def groups_and_reference():
    groups, reference = [], []
    for number, (rewards, gaps) in enumerate(zip(REWARDS, GAPS, strict=True)):
        group = make_group(make_prompt(number), [len(gap) for gap in gaps])
        for completion, reward, gap in zip(group, rewards, gaps, strict=True):
            completion.reward = reward
            reference.append((completion.log_probs - np.array(gap)).astype(np.float32))
        groups.append(group)
    return groups, reference


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # R' = 1 - 0.04, 0 - 0.02; 1 - 0.03, 1 + 0.04
        ("group-mean", [0.49, -0.49, -0.035, 0.035]),
        ("leave-one-out", [0.98, -0.98, -0.07, 0.07]),
        # the second group's rewards are equal: a penalty is not divided by the penalties' deviation
        ("group-mean-std", [0.5**0.5, -(0.5**0.5), -0.035, 0.035]),
    ],
)
def test_advantages_are_of_penalised_rewards(estimator, expected):
    groups, reference = groups_and_reference()
    loss = LossSettings(kl_coef=0.1, advantage_estimator=estimator)
    samples = training_samples(groups, estimator, None)
    metrics = penalize(samples, groups, reference, loss)
    np.testing.assert_allclose([sample.advantage for sample in samples], expected, atol=1e-7)
    assert metrics == {"reference/penalty_mean": pytest.approx((0.04 + 0.02 + 0.03 - 0.04) / 4, abs=1e-7)}
    # the task's own
    assert [sample.reward for sample in samples] == [1.0, 0.0, 1.0, 1.0]
    for sample, values in zip(samples, reference, strict=True):
        assert sample.reference_log_probs is values


@pytest.mark.parametrize("estimator", ["group-mean-std", "global"])
def test_rounding_of_an_engine_is_no_advantage(estimator):
    """Before the first step the penalties are what engine and trainer compute differently."""
    groups, reference = groups_and_reference()
    for group in groups:
        for completion in group:
            completion.reward = 1.0
    rounded = [
        completion.log_probs + np.float32(1e-6) * number
        for number, completion in enumerate(completion for group in groups for completion in group)
    ]
    samples = training_samples(groups, estimator, None)
    penalize(samples, groups, rounded, LossSettings(kl_coef=0.1, advantage_estimator=estimator))
    assert max(abs(sample.advantage) for sample in samples) < 1e-5


def test_no_distance_changes_nothing():
    groups, _ = groups_and_reference()
    samples = training_samples(groups, "group-mean", None)
    before = [sample.advantage for sample in samples]
    same = [sample.behavior_log_probs for sample in samples]
    assert penalize(samples, groups, same, LossSettings(kl_coef=0.1)) == {"reference/penalty_mean": 0.0}
    assert [sample.advantage for sample in samples] == before
