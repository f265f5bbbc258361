"""Adapts c2 while training, as the multiplier of a budget on W: an extension of VESPO (arXiv 2602.10693).

The paper derives phi from a proposal Q, which for one sign of the advantage minimises

    KL(Q || mu) - alpha E_Q[log W]   subject to   E_Q[W] <= C.

With a multiplier lambda >= 0 of the constraint, the minimiser is Q ~ mu W^alpha exp(-lambda W). That is phi
with c1 = alpha and c2 = lambda. The dual function and its derivatives are

    g(lambda)   = - log E_mu[W^alpha exp(-lambda W)] - lambda C
    g'(lambda)  = E_Q[W] - C,        g''(lambda) = - Var_Q(W) <= 0.

The paper fixes lambda, so C follows from it. Here C is given, and lambda ascends g, which is concave: lambda
rises while E_Q[W] is above the budget, and falls while it is below. The responses of one sign in an optimizer
step estimate E_Q[W] = sum phi W / sum phi; the factor exp(c2) of phi cancels. Where tokens have their own
advantages, a response counts for each sign by the share of its tokens that have it: on these phi acts.

The step is multiplicative. If mu's density of log W is log-concave, as for log-normal W, then Var_Q(W) <=
E_Q[W] / lambda (Brascamp-Lieb: in u = log W, Q's potential has a second derivative >= lambda e^u). So the
update

    log lambda  +=  RATE (E_Q[W] - C) / C

has a slope of at least 1 - RATE in log lambda at the fixed point, and reaches it without overshooting. All
steps count the same. So a run meets the budget on average over its optimizer steps, early and late ones of a
rollout batch together, not in each step.

Steps without an estimate are not random. With few responses they are the steps in which W spreads. Then only
the first step of every rollout batch is left, where W is 1, and it alone would drive lambda to a bound. So
lambda moves only while at least MIN_ESTIMATED_SHARE of the last `window` steps have an estimate.

Bounds on lambda: phi is scaled to phi(1) = 1. Its maximum (c1 / c2)^c1 exp(c2 - c1) grows without limit for
small and for large c2. c2 stays between the two values, one on each side of c1, at which the maximum is
MAX_PHI. The lower bound is above 0. With a slack budget it is stricter than the multiplier's 0, and
E_Q[W] <= C still holds, as E_Q[W] falls with lambda. At the upper bound the budget may be missed: no
reasonable lambda meets it, as with C < 1 on-policy, where every W is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from megatron_vespo.algorithms.vespo import MAX_LOG_W, MIN_LOG_W, GammaKernel

# This averages over about the last 10 optimizer steps if Var_Q(W) is at its bound, and over more if W varies
# less. That is longer than a rollout batch of the paper's 8 steps, within which E_Q[W] drifts.
RATE = 0.1
MAX_STEP = 0.5  # of log c2: limits the effect of one bad estimate
MAX_PHI = 10.0  # one response may count at most as much as this many on-policy ones
MIN_EFFECTIVE_SAMPLES = 4.0  # with fewer, the ratio of sums depends mostly on the largest phi
MIN_ESTIMATED_SHARE = 0.5
MIN_LOG_PHI = -87.0  # the loss uses phi in float32, which has hardly a number below exp of this


def expected_w(log_w: np.ndarray, c1: float, c2: float, counts: np.ndarray | float = 1.0) -> float:
    """E_Q[W] = sum n phi W / sum n phi over `log_w` [num_samples], in float64; n are `counts`, above 0.

    Returns NaN, no estimate, if every phi is 0 for the loss, or if the effective number of samples,
    (sum n phi)^2 / sum (n phi)^2, is below MIN_EFFECTIVE_SAMPLES.
    """
    log_w = np.clip(log_w.astype(np.float64), MIN_LOG_W, MAX_LOG_W)
    w = np.exp(log_w)
    log_phi = c1 * log_w + c2 * (1.0 - w)
    if len(log_w) == 0 or log_phi.max() < MIN_LOG_PHI:
        return float("nan")
    share = counts * np.exp(log_phi - log_phi.max())
    share /= share.sum()
    if 1.0 / np.square(share).sum() < MIN_EFFECTIVE_SAMPLES:
        return float("nan")
    return float(share @ w)


@cache
def c2_bounds(c1: float) -> tuple[float, float]:
    """The two c2, one on each side of c1 >= 1, at which phi's maximum is MAX_PHI.

    With x = c2 / c1 the logarithm of the maximum is c1 (x - 1 - log x): 0 at x = 1, larger elsewhere.
    """
    assert c1 >= 1.0, c1
    excess = np.log(MAX_PHI) / c1
    bounds = []
    for outside in (np.exp(-1.0 - excess), 4.0 + 2.0 * excess):
        inside = 1.0
        for _ in range(100):
            middle = (inside + outside) / 2
            if middle - 1.0 - np.log(middle) > excess:
                outside = middle
            else:
                inside = middle
        bounds.append(float(c1 * inside))
    return bounds[0], bounds[1]


def within_bounds(c1: float, c2: float) -> float:
    return float(np.clip(c2, *c2_bounds(c1)))


def next_c2(c1: float, c2: float, expected: float, budget: float) -> float:
    """c2 after one step of dual ascent; without an estimate (NaN) it does not change."""
    if np.isnan(expected):
        return c2
    step = np.clip(RATE * (expected - budget) / budget, -MAX_STEP, MAX_STEP)
    return within_bounds(c1, c2 * float(np.exp(step)))


def window(mini_batches: int) -> int:
    """Number of recent optimizer steps to check for estimates: whole rollout batches, at least 1 / RATE."""
    return mini_batches * math.ceil(1 / RATE / mini_batches)


def adapted(
    kernel: GammaKernel,
    budget: float,
    log_w: np.ndarray,
    sign_shares: np.ndarray,
    estimated: Sequence[Sequence[bool]] = (),
) -> tuple[GammaKernel, np.ndarray]:
    """The kernel of the next optimizer step, and E_Q[W] of this one: [2] float64, A > 0 then A < 0.

    `log_w` is [num_samples], of all samples of the optimizer step that used `kernel`. `sign_shares`
    [num_samples, 2] are the shares of each sample's tokens with A > 0 and with A < 0: as much it counts for
    either sign. Tokens with A = 0 train nothing and do not count. `estimated` [steps, 2] says which earlier
    steps in the window had an E_Q[W].
    """
    estimates = []
    changed = {}
    for i, sign in enumerate(("positive", "negative")):
        c1, c2 = getattr(kernel, sign)
        chosen = sign_shares[:, i] > 0
        estimates.append(expected_w(log_w[chosen], c1, c2, sign_shares[chosen, i]))
        known = [*(step[i] for step in estimated), not np.isnan(estimates[-1])]
        if np.mean(known) >= MIN_ESTIMATED_SHARE:
            c2 = next_c2(c1, c2, estimates[-1], budget)
        changed[sign] = (c1, c2)
    return replace(kernel, **changed), np.array(estimates)
