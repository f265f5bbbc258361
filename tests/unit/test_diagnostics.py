"""Numbers about log W and phi."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.algorithms.diagnostics import DEAD_PHI, effective_sample_share, weight_diagnostics


@pytest.mark.parametrize("value", [1.0, 1e-30, 1.2])
def test_equal_weights_use_every_sample(value):
    assert effective_sample_share(np.full(7, value, np.float32)) == pytest.approx(1.0)


def test_one_weight_alone_is_one_sample():
    assert effective_sample_share(np.array([0, 0, 0.3, 0, 0], np.float32)) == pytest.approx(1 / 5)


def test_zeros_are_no_sample():
    assert effective_sample_share(np.zeros(4, np.float32)) == 0.0


def test_share_of_two_weights():
    assert effective_sample_share(np.array([1.0, 3.0])) == pytest.approx(16 / (2 * 10))


@given(st.lists(st.floats(2**-20, 2.0, width=32), min_size=1, max_size=20))
def test_share_lies_between_one_sample_and_all(weights):
    share = effective_sample_share(np.array(weights, np.float32))
    assert 1 / len(weights) - 1e-9 <= share <= 1 + 1e-9


def test_metrics_of_a_small_batch():
    metrics = weight_diagnostics(
        log_w=np.array([0.0, -3.0, 1.0, -2.0]),
        phi=np.array([1.0, 0.005, 0.5, 0.0]),
        advantages=np.array([1.0, -1.0, 0.0, -0.5]),
    )
    assert metrics == {
        "vespo/log_w_mean": -1.0,
        "vespo/log_w_std": pytest.approx(np.sqrt(2.5)),
        "vespo/log_w_abs_max": 3.0,
        "vespo/phi_mean": pytest.approx(1.505 / 4),
        "vespo/ess": pytest.approx(1.505**2 / (4 * (1 + 0.005**2 + 0.25))),
        "vespo/dead_share": 0.5,
        "vespo/phi_mean_positive": 1.0,
        "vespo/phi_mean_negative": pytest.approx(0.0025),
    }


def test_a_sequence_on_the_threshold_is_alive():
    metrics = weight_diagnostics(np.zeros(2), np.array([DEAD_PHI, DEAD_PHI * 0.999]), np.ones(2))
    assert metrics["vespo/dead_share"] == 0.5


@pytest.mark.parametrize(
    ("advantages", "present"),
    [
        ([1.0, 2.0], {"positive"}),
        ([-1.0, -2.0], {"negative"}),
        ([0.0, 0.0], set()),
        ([1.0, -1.0], {"positive", "negative"}),
    ],
)
def test_an_absent_sign_is_left_out(advantages, present):
    metrics = weight_diagnostics(np.zeros(2), np.ones(2), np.array(advantages))
    found = {name.removeprefix("vespo/phi_mean_") for name in metrics if name.startswith("vespo/phi_mean_")}
    assert found == present
