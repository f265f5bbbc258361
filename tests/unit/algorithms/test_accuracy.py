"""avg@k, pass@k and their intervals, against subsets counted one by one and against chance itself."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from megatron_vespo.algorithms.accuracy import mean_interval, pass_at_k, repeat_error, wilson_interval

Z = 1.959963984540054


@pytest.mark.parametrize("num_drawn", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(num_drawn):
    for num_correct in range(num_drawn + 1):
        drawn = [True] * num_correct + [False] * (num_drawn - num_correct)
        for k in range(1, num_drawn + 1):
            subsets = [any(subset) for subset in combinations(drawn, k)]
            expected = sum(subsets) / len(subsets)
            assert pass_at_k(num_correct, num_drawn, k) == pytest.approx(expected, abs=1e-15)


def test_pass_at_k_with_many_draws_against_exact_binomials():
    for num_correct, k in [(1, 1), (3, 64), (10, 500), (1000, 2)]:
        exact = 1 - math.comb(1024 - num_correct, k) / math.comb(1024, k)
        assert pass_at_k(num_correct, 1024, k) == pytest.approx(exact, rel=1e-12)


def test_pass_at_k_is_unbiased():
    """The estimate from n draws, averaged over all outcomes, is 1 - (1 - p)^k."""
    p, n = 0.3, 6
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    for k in range(1, n + 1):
        mean = sum(chance[c] * pass_at_k(c, n, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-14)


def test_wilson_interval_solves_its_defining_equation():
    # The ends are the p with |share - p| = z * sqrt(p (1 - p) / n).
    for share, n in [(0.33, 200), (0.95, 200), (0.5, 3)]:
        for p in wilson_interval(share, n):
            assert abs(share - p) == pytest.approx(Z * math.sqrt(p * (1 - p) / n), rel=1e-12)
        low, high = wilson_interval(share, n)
        assert 0 < low < share < high < 1
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, Z * Z / (10 + Z * Z)), abs=1e-15)
    assert wilson_interval(1.0, 10) == pytest.approx((10 / (10 + Z * Z), 1.0), abs=1e-15)


def test_one_completion_a_prompt_is_wilsons_own():
    values = np.array([1.0] * 7 + [0.0] * 23)
    assert mean_interval(values, 1) == pytest.approx(wilson_interval(7 / 30, 30), rel=1e-12)


def test_prompts_that_agree_count_once_and_prompts_that_do_not_differ_count_all_their_completions():
    always = np.array([1.0] * 12 + [0.0] * 18)  # each prompt all right or all wrong, in 16 completions
    assert mean_interval(always, 16) == pytest.approx(wilson_interval(0.4, 30), rel=1e-12)
    alike = np.full(30, 0.4)
    assert mean_interval(alike, 16) == pytest.approx(wilson_interval(0.4, 30 * 16), rel=1e-12)
    for value in (0.0, 1.0):  # nothing says how prompts differ
        assert mean_interval(np.full(30, value), 16) == pytest.approx(wilson_interval(value, 30), rel=1e-12)


def coverage(values_RP: np.ndarray, truth: float, num_completions: int) -> float:
    bounds = [mean_interval(row, num_completions) for row in values_RP]
    return float(np.mean([low <= truth <= high for low, high in bounds]))


HARD_AND_SOLVED = [
    (0.1, 3.2),
    (3.2, 0.1),
]  # a mean of 3% or 97%: the few prompts that differ are often not drawn
MIXED = [(0.5, 0.5), (2.0, 3.0), (0.3, 2.0)]


@pytest.mark.parametrize(
    ("beta_of_prompts", "num_prompts", "least", "most"),
    [
        *((beta, number, 0.93, 0.99) for beta in HARD_AND_SOLVED for number in (10, 30, 100)),
        *((beta, 30, 0.935, 0.975) for beta in MIXED),
        *(((1.0, 1.0), number, 0.93, 1.0) for number in (3, 10)),
    ],
)
def test_intervals_cover_the_truth_of_other_prompts(beta_of_prompts, num_prompts, least, most):
    """Prompts of different difficulty, 8 completions each: about 95% of the intervals hold the truth."""
    random, trials = np.random.default_rng(0), 3000
    values = random.binomial(8, random.beta(*beta_of_prompts, (trials, num_prompts))) / 8
    truth = beta_of_prompts[0] / sum(beta_of_prompts)
    assert least <= coverage(values, truth, 8) <= most
    if beta_of_prompts in MIXED:  # all 240 completions as if they were independent claim too much
        narrow = [wilson_interval(row.mean(), 240) for row in values]
        assert sum(low <= truth <= high for low, high in narrow) / trials < 0.85


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (2.0, 3.0)])
def test_intervals_of_pass_at_k(alpha, beta):
    """pass@8 from 16 completions of 30 prompts."""
    random = np.random.default_rng(0)
    table = np.array([pass_at_k(correct, 16, 8) for correct in range(17)])
    values = table[random.binomial(16, random.beta(alpha, beta, (3000, 30)))]
    truth = 1 - math.prod((beta + i) / (alpha + beta + i) for i in range(8))  # E[(1 - p)^8] of a beta's p
    assert 0.93 <= coverage(values, truth, 16) <= 0.975


def test_rewards_beyond_0_and_1_get_a_bootstrap():
    random = np.random.default_rng(1)
    values = random.normal(3.0, 2.0, 400)
    low, high = mean_interval(values, 4)
    half = Z * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert mean_interval(values, 4) == (low, high)


def test_repeat_error_is_the_spread_of_repeated_evaluations():
    random = np.random.default_rng(2)
    difficulty = random.uniform(0, 1, 40)
    repeats = random.binomial(1, difficulty[:, None], (4000, 40, 8)).astype(float)
    estimates = [repeat_error(rewards) for rewards in repeats[:200]]
    assert np.mean(estimates) == pytest.approx(repeats.mean(axis=(1, 2)).std(), rel=0.03)
