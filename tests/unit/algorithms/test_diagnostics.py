"""Numbers about log W and the weights of a rollout batch, against loops over its samples."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.algorithms.diagnostics import (
    DEAD_WEIGHT,
    bucket_name,
    effective_sample_share,
    floor_metrics,
    length_buckets,
    ratio_metrics,
    weight_metrics,
)

NUM_SAMPLES = 60


@pytest.mark.parametrize(
    ("weights", "share"),
    [
        *(([value] * 7, 1.0) for value in (1.0, 1e-30, 1.2)),
        ([0, 0, 0.3, 0, 0], 1 / 5),
        ([1.0, 3.0], 16 / (2 * 10)),
        ([0, 0, 0, 0], 0.0),
    ],
)
def test_effective_samples(weights, share):
    assert effective_sample_share(np.array(weights, np.float32)) == pytest.approx(share)


@given(st.lists(st.floats(2**-20, 2.0, width=32), min_size=1, max_size=20))
def test_share_lies_between_one_sample_and_all(weights):
    share = effective_sample_share(np.array(weights, np.float32))
    assert 1 / len(weights) - 1e-9 <= share <= 1 + 1e-9


@pytest.mark.parametrize(
    ("length", "name"),
    [
        (0, "0-64"),
        (63, "0-64"),
        (64, "64-128"),
        (127, "64-128"),
        (512, "512-1k"),
        (1023, "512-1k"),
        (1024, "1k-2k"),
        (8191, "4k-8k"),
        (8192, "8k-16k"),
        (15_360, "8k-16k"),
        (131_072, "128k-256k"),
    ],
)
def test_buckets_of_lengths(length, name):
    [bucket] = length_buckets(np.array([length]))
    assert bucket_name(bucket) == name


# Weights


def batch(seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        "weights": draw.choice([0.0, 0.005, DEAD_WEIGHT, 0.5, 1.2], NUM_SAMPLES).astype(np.float32),
        "advantages": draw.choice([-1.0, 0.0, 0.5], NUM_SAMPLES),
        "lengths": draw.integers(1, 5000, NUM_SAMPLES),
        "mini_batches": np.repeat([0, 1, 2], NUM_SAMPLES // 3),
    }


def naive_weights(weights, advantages, lengths, mini_batches) -> dict[str, float]:
    """Every part's samples in a list of its own."""
    parts: dict[str, list[float]] = {}
    cells: dict[str, list[float]] = {}
    for weight, advantage, length, index in zip(weights, advantages, lengths, mini_batches, strict=True):
        parts.setdefault("", []).append(float(weight))
        parts.setdefault(f"/mini_batch_{index}", []).append(float(weight))
        if advantage != 0.0:
            sign = "positive" if advantage > 0 else "negative"
            parts.setdefault(f"/{sign}", []).append(float(weight))
            cells.setdefault(f"/{sign}/{bucket_name(*length_buckets(np.array([length])))}", []).append(
                float(weight)
            )

    def dead(found):
        return sum(weight < np.float32(DEAD_WEIGHT) for weight in found) / len(found)

    metrics = {}
    for part, found in parts.items():
        squares = sum(weight * weight for weight in found)
        metrics[f"weight/mean{part}"] = sum(found) / len(found)
        metrics[f"weight/ess{part}"] = sum(found) ** 2 / (len(found) * squares) if squares else 0.0
        metrics[f"weight/dead_share{part}"] = dead(found)
    for cell, found in cells.items():
        metrics[f"weight/mean{cell}"] = sum(found) / len(found)
        metrics[f"weight/dead_share{cell}"] = dead(found)
        metrics[f"weight/count{cell}"] = len(found)
    return metrics


@pytest.mark.parametrize("seed", range(5))
def test_weights_by_sign_length_and_mini_batch(seed):
    values = batch(seed)
    metrics = weight_metrics(**values)
    assert metrics == pytest.approx(naive_weights(**values), rel=1e-6)
    assert {type(value) for value in metrics.values()} == {float}
    assert "weight/dead_share/negative/2k-4k" in metrics and "weight/ess/mini_batch_2" in metrics


@pytest.mark.parametrize("advantages", [[1.0, 2.0], [-1.0, -2.0], [0.0, 0.0], [1.0, -1.0]])
def test_an_absent_sign_is_left_out(advantages):
    metrics = weight_metrics(np.ones(2), np.array(advantages), np.ones(2), np.zeros(2, np.int64))
    present = {"positive" if advantage > 0 else "negative" for advantage in advantages if advantage}
    assert {name.split("/")[2] for name in metrics if name.count("/") > 1} == present


# log W

NOWHERE = np.zeros(NUM_SAMPLES, bool)
UNKNOWN = np.full(NUM_SAMPLES, np.nan, np.float32)


def parts(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Staleness and mismatch, correlated."""
    draw = np.random.default_rng(seed)
    staleness = draw.normal(-0.2, 0.7, NUM_SAMPLES)
    return staleness.astype(np.float32), (0.3 * staleness + draw.normal(0.1, 0.4, NUM_SAMPLES)).astype(
        np.float32
    )


def mean(values) -> float:
    return sum(map(float, values)) / len(values)


def covariance(a, b) -> float:
    return mean([(float(x) - mean(a)) * (float(y) - mean(b)) for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("seed", range(3))
def test_log_w_is_split_into_its_parts(seed):
    staleness, mismatch = parts(seed)
    log_w = staleness + mismatch
    metrics = ratio_metrics(log_w, mismatch, mismatch, NOWHERE)
    assert metrics == pytest.approx(
        {
            "ratio/log_w_mean": mean(log_w),
            "ratio/log_w_std": math.sqrt(covariance(log_w, log_w)),
            "ratio/log_w_abs_max": max(abs(float(value)) for value in log_w),
            "ratio/engine_gap_std": math.sqrt(covariance(mismatch, mismatch)),
            "ratio/staleness_std": math.sqrt(covariance(staleness, staleness)),
            "ratio/mismatch_std": math.sqrt(covariance(mismatch, mismatch)),
            "ratio/mismatch_share": covariance(mismatch, log_w) / covariance(log_w, log_w),
        },
        rel=1e-5,
    )
    # the other part's share is the rest
    other = covariance(staleness, log_w) / covariance(log_w, log_w)
    assert metrics["ratio/mismatch_share"] + other == pytest.approx(1.0, rel=1e-5)


def test_a_mismatch_that_is_not_in_w_explains_nothing_and_is_still_reported():
    staleness, gap = parts(0)
    metrics = ratio_metrics(staleness, np.zeros_like(gap), gap, NOWHERE)
    assert metrics["ratio/mismatch_std"] == metrics["ratio/mismatch_share"] == 0.0
    assert metrics["ratio/staleness_std"] == metrics["ratio/log_w_std"]
    assert metrics["ratio/engine_gap_std"] == pytest.approx(math.sqrt(covariance(gap, gap)), rel=1e-5)


def test_without_pi_old_the_samples_still_on_policy_measure_the_mismatch():
    staleness, mismatch = parts(1)
    on_policy = np.arange(NUM_SAMPLES) < 20
    log_w = np.where(on_policy, mismatch, 3 * staleness + mismatch)
    metrics = ratio_metrics(log_w, UNKNOWN, UNKNOWN, on_policy)
    var_mismatch, var_all = covariance(log_w[:20], log_w[:20]), covariance(log_w, log_w)
    assert 0 < var_mismatch < var_all
    assert metrics["ratio/engine_gap_std"] == pytest.approx(math.sqrt(var_mismatch), rel=1e-5)
    assert metrics["ratio/mismatch_std"] == pytest.approx(math.sqrt(var_mismatch), rel=1e-5)
    assert metrics["ratio/staleness_std"] == pytest.approx(math.sqrt(var_all - var_mismatch), rel=1e-5)
    assert metrics["ratio/mismatch_share"] == pytest.approx(var_mismatch / var_all, rel=1e-5)


def test_what_is_not_known_is_not_said():
    of_log_w = {"ratio/log_w_mean", "ratio/log_w_std", "ratio/log_w_abs_max"}
    assert ratio_metrics(parts(2)[0], UNKNOWN, UNKNOWN, NOWHERE).keys() == of_log_w
    # nothing explains a log W that does not vary
    zeros = np.zeros(NUM_SAMPLES, np.float32)
    assert "ratio/mismatch_share" not in ratio_metrics(zeros, zeros, zeros, NOWHERE)
    assert "ratio/mismatch_share" not in ratio_metrics(zeros, UNKNOWN, UNKNOWN, ~NOWHERE)


# The floor


def test_floor_by_length_and_per_token():
    log_w, lengths = np.array([3.0, -4.0, 0.0, 1.0], np.float32), np.array([600, 700, 900, 10])
    assert floor_metrics(log_w, lengths) == pytest.approx(
        {
            "ratio/floor_std": math.sqrt(26 / 4),
            "ratio/floor_std/512-1k": math.sqrt(25 / 3),
            "ratio/floor_std/0-64": 1.0,
            "ratio/floor_token_sigma": math.sqrt(26 / 2210),
        }
    )


def test_floor_is_taken_from_staleness():
    """Half of the responses are as before the first update: rounding is not in their log W."""
    draw = np.random.default_rng(0)
    moved = np.arange(4000) % 2 == 0
    staleness, noise = draw.normal(0, 0.3, 4000) * moved, draw.normal(0, 0.4, 4000) * moved
    log_w, zeros, floor = staleness + noise, np.zeros(4000), np.full(4000, 0.4**2)
    metrics = ratio_metrics(log_w, zeros, zeros, np.zeros(4000, bool), floor)
    assert metrics["ratio/staleness_std"] == pytest.approx(0.3 * 0.5**0.5, rel=0.05)
    assert metrics["ratio/floor_share"] == pytest.approx(0.16 / 0.25, rel=0.05)
    assert metrics["ratio/mismatch_share"] == 0.0
    assert "ratio/floor_share" not in ratio_metrics(log_w, zeros, zeros, np.zeros(4000, bool))


@pytest.mark.parametrize("denominator", ["recomputed", "rollout", "rollout, never on policy"])
def test_floor_above_what_varies_explains_all_and_leaves_nothing_negative(denominator):
    log_w, floor = np.random.default_rng(0).normal(0, 0.1, NUM_SAMPLES), np.full(NUM_SAMPLES, 9.0)
    mismatch = np.zeros(NUM_SAMPLES) if denominator == "recomputed" else UNKNOWN
    on_policy = NOWHERE if "never" in denominator else ~NOWHERE
    metrics = ratio_metrics(log_w, mismatch, mismatch, on_policy, floor)
    assert metrics["ratio/floor_share"] == pytest.approx(1.0)
    assert metrics.get("ratio/staleness_std", 0.0) == metrics.get("ratio/mismatch_std", 0.0) == 0.0


def test_equal_rounding_of_pi_pi_old_and_mu_is_half_rounding_and_half_mismatch():
    """Nothing has moved; the floor is measured with two passes of the trainer, log W holds one."""
    pi, pi_old, mu = np.random.default_rng(2).normal(0, 0.3, (3, 200_000))
    floor = np.full(200_000, 2 * 0.3**2)
    metrics = ratio_metrics(pi - mu, pi_old - mu, pi_old - mu, np.ones(200_000, bool), floor)
    unknown = np.full(200_000, np.nan)
    of_rollout = ratio_metrics(pi - mu, unknown, unknown, np.ones(200_000, bool), floor)
    for found in (metrics, of_rollout):
        assert found["ratio/mismatch_share"] == pytest.approx(0.5, abs=0.01)
        assert found["ratio/floor_share"] == pytest.approx(0.5, abs=0.01)


def test_floor_is_taken_from_mismatch_where_mu_is_the_denominator():
    draw = np.random.default_rng(1)
    on_policy = np.arange(4000) < 2000
    log_w = draw.normal(0, 0.5, 4000) + draw.normal(0, 0.4, 4000) * ~on_policy
    unknown = np.full(4000, np.nan)
    metrics = ratio_metrics(log_w, unknown, unknown, on_policy, np.full(4000, 2 * 0.3**2))
    assert metrics["ratio/mismatch_std"] == pytest.approx(0.4, rel=0.05)
    assert metrics["ratio/staleness_std"] == pytest.approx(0.4 * 0.5**0.5, rel=0.1)
    assert metrics["ratio/floor_share"] + metrics["ratio/mismatch_share"] == pytest.approx(
        log_w[:2000].var() / log_w.var()
    )
