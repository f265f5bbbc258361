"""The interval of a mean difference between two runs, from the batches that both have."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

LEAST = 4  # differences, below which there is no interval
LEVEL = 0.95


@dataclass(frozen=True)
class MeanInterval:
    mean: float
    low: float | None  # None: too few values for an interval
    high: float | None
    number: int  # of the values
    effective: float  # number of independent values that tell as much about the mean


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """The 95% t interval of the mean of values that follow each other in time.

        mean +- t(0.975, n' - 1) s / sqrt(n'),   n' = n (1 - r) / (1 + r),   n' <= n

    s is the standard deviation, r the correlation of neighbours. Batches that follow each other are alike,
    so n of them tell less than n independent ones. n' is that of a first-order autoregression: Wilks,
    Statistical Methods in the Atmospheric Sciences, section 5.2.4. The r of few values is too low, on average
    by (1 + 4 r) / n (Kendall, Biometrika 41, 1954), which is put right here. n' is at least 2. Values that
    are all equal have an interval of width 0.

    Share of 3,000 simulated series whose interval held the truth, "plain" with n' = n, "lag" without Kendall:

        r    n    plain   lag    now
        0    20   95.1%  96.0%  96.7%
        0.5  10   75.8%  85.6%  91.3%
        0.5  20   75.4%  88.9%  92.3%
        0.5  100  74.1%  93.2%  94.1%
        0.8  20   46.9%  80.6%  89.7%
        0.8  100  48.2%  91.8%  94.1%
    """
    array = np.asarray(values, np.float64)
    number = len(array)
    mean = float(array.mean()) if number else math.nan
    if number < LEAST:
        return MeanInterval(mean, None, None, number, float(number))
    centered = array - mean
    squares = float(np.square(centered).sum())
    if squares == 0.0:
        return MeanInterval(mean, mean, mean, number, float(number))
    correlation = float((centered[1:] * centered[:-1]).sum()) / squares
    if number > LEAST:
        correlation = (correlation + 1 / number) / (1 - 4 / number)
    correlation = min(1.0, max(0.0, correlation))
    effective = max(2.0, number * (1 - correlation) / (1 + correlation))
    half = t_quantile(0.5 + LEVEL / 2, effective - 1) * math.sqrt(squares / (number - 1) / effective)
    return MeanInterval(mean, mean - half, mean + half, number, effective)


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile, for 0.5 < p < 1, of Student's t with `freedom` > 0 degrees of freedom, also fractions."""
    assert 0.5 < probability < 1.0 and freedom > 0, (probability, freedom)
    high = 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    return _root(lambda t: t_cdf(t, freedom) - probability, 0.0, high)


def t_cdf(t: float, freedom: float) -> float:
    """P(T <= t) of Student's t distribution, t >= 0: 1 - I_x(freedom / 2, 1/2) / 2 with x = v / (v + t^2)."""
    return 1.0 - regularized_beta(freedom / (freedom + t * t), freedom / 2, 0.5) / 2


def regularized_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b) for 0 <= x <= 1, by its continued fraction (DLMF 8.17.22, evaluated by Lentz's method)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly
        return 1.0 - regularized_beta(1 - x, b, a)
    log_front = a * math.log(x) + b * math.log1p(-x)
    log_front += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return math.exp(log_front) / a / _beta_fraction(x, a, b)


def _beta_fraction(x: float, a: float, b: float) -> float:
    """1 + d_1/(1 + d_2/(1 + ...)) with the coefficients of DLMF 8.17.23."""
    tiny = 1e-300
    value, upper, lower = 1.0, 1.0, 0.0
    for step in range(1, 500):
        half = step // 2
        if step % 2:
            coefficient = -(a + half) * (a + b + half) * x / ((a + step - 1) * (a + step))
        else:
            coefficient = half * (b - half) * x / ((a + step - 1) * (a + step))
        lower = 1.0 / (1.0 + coefficient * lower or tiny)
        upper = 1.0 + coefficient / upper or tiny
        value *= upper * lower
        if abs(upper * lower - 1.0) < 1e-14:
            break
    return value


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function is 0, by bisection."""
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2
