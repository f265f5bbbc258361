"""Mean, signs and metrics of advantages per token."""

import numpy as np
import pytest

from megatron_vespo.data.sample_advantages import (
    advantages_per_token,
    mean_advantage,
    sign_shares,
    token_advantage_metrics,
)
from tests.support.builders import make_sample

OWN = np.array([1.0, -2.0, 0.5, -0.25], np.float32)


def test_a_tokens_advantage_is_the_responses_plus_its_own():
    sample = make_sample(2, 4, advantage=0.25, token_advantages=OWN)
    [a, b, c, d] = advantages_per_token([sample])
    assert [a, b, c, d] == [1.25, -1.75, 0.75, 0.0]
    assert mean_advantage(sample) == pytest.approx((a + b + c + d) / 4)
    assert sign_shares(sample) == (0.5, 0.25)  # a token with A = 0 has no sign


@pytest.mark.parametrize(("advantage", "shares"), [(0.5, (1.0, 0.0)), (-0.5, (0.0, 1.0)), (0.0, (0.0, 0.0))])
def test_without_token_advantages_all_is_the_responses(advantage, shares):
    sample = make_sample(2, 4, advantage=advantage)
    assert (mean_advantage(sample), sign_shares(sample)) == (advantage, shares)
    assert advantages_per_token([sample]) is None and token_advantage_metrics([sample]) == {}


def test_samples_without_count_with_zeros_beside_others():
    samples = [make_sample(2, 4, advantage=3.0, token_advantages=OWN), make_sample(2, 2, advantage=-1.0)]
    expected = np.float32([4.0, 1.0, 3.5, 2.75, -1.0, -1.0])
    np.testing.assert_array_equal(advantages_per_token(samples), expected, strict=True)
    assert token_advantage_metrics(samples) == {
        "token_advantage/mean": pytest.approx(-0.75 / 6),
        "token_advantage/abs_mean": pytest.approx(3.75 / 6),
    }
