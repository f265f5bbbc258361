"""Advantages of tokens from a teacher, against sums written out."""

import math

import numpy as np
import pytest

from megatron_vespo.algorithms.distillation import distillation_metrics, token_advantages


def logs(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities, np.float32))


def test_a_token_that_the_teacher_likes_better_has_a_positive_advantage():
    found = token_advantages(logs(0.5, 0.1, 0.25), logs(0.25, 0.4, 0.25), coefficient=0.5)
    assert found.dtype == np.float32
    assert found == pytest.approx([0.5 * math.log(2), -0.5 * math.log(4), 0.0], abs=1e-6)


def test_the_clip_is_of_the_log_ratio_before_the_coefficient():
    found = token_advantages(logs(1.0, 0.001, 0.5), logs(0.1, 1.0, 0.4), coefficient=2.0, clip=1.0)
    assert found == pytest.approx([2.0, -2.0, 2.0 * math.log(1.25)], abs=1e-6)


def test_a_policy_like_its_teacher_has_advantages_of_zero():
    rng = np.random.default_rng(0)
    same = np.log(rng.random(100, np.float32))
    assert not token_advantages(same, same, 1.0).any()


def test_the_mean_is_the_reverse_kl():
    """Over tokens that the policy samples, of two distributions of four tokens."""
    rng = np.random.default_rng(0)
    policy, teacher = rng.dirichlet(np.ones(4), 2)
    drawn = rng.choice(4, 200_000, p=policy)
    exact = float((policy * np.log(policy / teacher)).sum())
    found = token_advantages(np.log(teacher)[drawn], np.log(policy)[drawn], coefficient=1.0)
    assert -found.mean() == pytest.approx(exact, rel=0.02)
    metrics = distillation_metrics([np.log(teacher)[drawn]], [np.log(policy)[drawn]])
    assert metrics["distillation/reverse_kl"] == pytest.approx(-found.mean(), rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_what_is_not_finite_is_refused(bad):
    teacher = np.array([-1.0, bad], np.float32)
    with pytest.raises(ValueError, match="token 1 has log-probs"):
        token_advantages(teacher, logs(0.5, 0.5), 1.0)


def test_metrics_are_means_over_tokens():
    metrics = distillation_metrics([logs(0.5), logs(0.999, 0.999, 0.9)], [logs(1.0), logs(0.995, 0.9, 0.999)])
    terms = [math.log(0.5), math.log(0.999 / 0.995), math.log(0.999 / 0.9), math.log(0.9 / 0.999)]
    assert metrics["distillation/reverse_kl"] == pytest.approx(-sum(terms) / 4, abs=1e-6)
    assert metrics["distillation/log_ratio_abs_max"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["distillation/near_deterministic_share"] == 0.25  # both must be certain of the token
