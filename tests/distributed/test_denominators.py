"""train_step against the formulas, term by term, on one rank."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vespo.algorithms.vespo import RATIO_DENOMINATORS
from tests.support.random_task import split

KERNEL = {True: (2.0, 3.0), False: (3.0, 2.0)}  # of the sign of the advantage


@pytest.fixture(scope="module")
def result(on_task):
    return on_task("denominators.py", 1)[0]


def per_sequence(values, samples, reduce=np.sum):
    return np.array([reduce(one) for one in split(values.astype(np.float64), samples)])


@pytest.mark.parametrize("denominator", RATIO_DENOMINATORS)
def test_train_step_is_the_closed_form(task, result, denominator):
    samples = task.samples
    now, old = result[f"{denominator} log_probs"], result[f"{denominator} old_log_probs"]
    behavior = np.concatenate([sample.behavior_log_probs for sample in samples])
    staleness = per_sequence(now - old, samples)
    gap = per_sequence(old - behavior, samples)
    by_token = per_sequence(np.minimum((old - behavior).astype(np.float64), np.log(2.0)), samples)
    assert np.abs(staleness).max() > 0.05 and (gap > np.log(2.0)).any()
    log_w = {
        "recomputed": staleness,
        "rollout": staleness + gap,
        "decoupled": staleness + np.minimum(gap, np.log(2.0)),
        "decoupled-token": staleness + by_token,
    }[denominator]

    advantages = np.array([sample.advantage for sample in samples])
    c1, c2 = np.array([KERNEL[advantage >= 0] for advantage in advantages]).T
    phi = np.exp(c1 * log_w + c2 * (1 - np.exp(log_w)))
    loss = -(phi * advantages * per_sequence(now, samples)).sum() / len(now)

    np.testing.assert_allclose(result[f"{denominator} log_w"], log_w, rtol=0, atol=1e-4)
    np.testing.assert_allclose(result[f"{denominator} weight"], phi, rtol=0, atol=1e-4)
    np.testing.assert_allclose(result[f"{denominator} loss"], loss, rtol=1e-4)
    assert result[f"{denominator} num_tokens"] == len(now)

    in_w = {"recomputed": 0 * gap, "rollout": np.nan * gap, "decoupled": np.minimum(gap, np.log(2.0))}
    in_w["decoupled-token"] = by_token
    np.testing.assert_allclose(
        result[f"{denominator} log_mismatch_in_w"], in_w[denominator], rtol=0, atol=1e-4
    )

    # without pi_old only the current policy can be compared with the engine
    compared = now if denominator == "rollout" else old
    expected_gap = np.full_like(gap, np.nan) if denominator == "rollout" else gap
    np.testing.assert_allclose(result[f"{denominator} log_mismatch"], expected_gap, rtol=0, atol=1e-4)
    difference = per_sequence(np.abs(compared - behavior), samples, np.max)
    np.testing.assert_allclose(result[f"{denominator} log_mismatch_abs_max"], difference, rtol=0, atol=1e-5)
    sums = [
        sum(values)
        for x in (now - (behavior if denominator == "rollout" else old), compared - behavior)
        for values in (x.astype(np.float64), x.astype(np.float64) ** 2, np.exp(x.astype(np.float64)) - 1 - x)
    ]
    found = [*result[f"{denominator} ratio_sums"], *result[f"{denominator} log_mismatch_sums"]]
    np.testing.assert_allclose(found, sums, rtol=1e-4, atol=1e-3)
