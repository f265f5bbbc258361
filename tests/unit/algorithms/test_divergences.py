"""Divergences of the sampled token against all others, by hand and against the whole distributions."""

import math

import pytest
import torch

from megatron_vespo.algorithms.divergences import binary_kl, binary_tv
from tests.support.naive_losses import bernoulli_kl

PROBABILITIES = [1e-9, 1e-3, 0.2, 0.5, 0.9, 0.999999, 1.0]


def log(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64).log()


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("q", PROBABILITIES)
def test_they_are_those_of_two_coins(p, q):
    assert binary_tv(log(p), log(q)).item() == pytest.approx(abs(p - q), rel=1e-12)
    assert binary_kl(log(p), log(q)).item() == pytest.approx(bernoulli_kl(p, q), rel=1e-9, abs=1e-15)


def test_they_are_at_most_those_of_the_whole_distributions():
    draw = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(200, 50, generator=draw, dtype=torch.float64).log_softmax(-1) for _ in "pq")
    whole_kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    whole_tv = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    assert (binary_kl(log_p[:, 7], log_q[:, 7]) <= whole_kl).all()
    assert (binary_tv(log_p[:, 7], log_q[:, 7]) <= whole_tv).all()


def test_kl_of_equal_policies_is_zero_and_of_close_ones_never_negative():
    log_p = -torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 5
    assert not binary_kl(log_p, log_p).any() and not binary_tv(log_p, log_p).any()
    close = binary_kl(log_p, log_p - 1e-5)
    assert (close >= 0).all()
    # (log p - log q)^2 p / (2 (1 - p)) to second order: float32 would have lost it
    expected = 1e-10 * log_p.double().exp() / (-2 * log_p.double().expm1())
    torch.testing.assert_close(close, expected, rtol=0.1, atol=1e-16)


@pytest.mark.parametrize("divergence", [binary_kl, binary_tv])
def test_nan_stays_and_far_away_is_finite(divergence):
    nan = torch.tensor([math.nan])
    assert divergence(nan, log(0.5)).isnan() and divergence(log(0.5), nan).isnan()
    far = torch.tensor([-1e4, 0.0, 1e4])
    assert divergence(far, far.flip(0)).isfinite().all()
