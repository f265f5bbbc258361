"""c2 as the multiplier of a budget on W, found while training: VESPO (arXiv 2602.10693) carried on.

The paper derives phi from a proposal Q, which for one sign of the advantage minimises

    KL(Q || mu) - alpha E_Q[log W]   subject to   E_Q[W] <= C.

With a multiplier lambda >= 0 of the constraint the minimiser is Q ~ mu W^alpha exp(-lambda W), that is phi
with c1 = alpha and c2 = lambda, and the dual function and its derivatives are

    g(lambda)   = - log E_mu[W^alpha exp(-lambda W)] - lambda C
    g'(lambda)  = E_Q[W] - C,        g''(lambda) = - Var_Q(W) <= 0.

The paper fixes lambda, so its C is whatever it happens to be. Here C is given and lambda ascends g, which is
concave: up where E_Q[W] is above the budget, down where it is below. An optimizer step's responses of a sign
estimate E_Q[W] = sum phi W / sum phi; the factor exp(c2) of phi cancels.

The step is multiplicative, for Var_Q(W) <= E_Q[W] / lambda whenever mu's density of log W is log-concave
(Brascamp-Lieb: in u = log W, Q's potential has a second derivative >= lambda e^u), log-normal W for example:

    log lambda  +=  RATE (E_Q[W] - C) / C

has a slope of at least 1 - RATE in log lambda at the fixed point: it goes there without overshooting. All
steps count the same, so a run meets the budget on average over its optimizer steps, the early and the late
ones of a rollout batch together, not in each of them.

Steps that have no estimate are no random choice: with few responses they are those in which W spreads, and
what is left is the first one of every rollout batch, where W is 1, which alone drives lambda to a bound. So
it moves only while at least MIN_ESTIMATED_SHARE of the last `window` steps have an estimate.

Bounds on lambda. phi is scaled to phi(1) = 1, and its maximum (c1 / c2)^c1 exp(c2 - c1) grows without limit
for small and for large c2 alike. c2 stays where the maximum is at most MAX_PHI, which lies on both sides of
c2 = c1. The lower bound is above 0: with a slack budget it is stricter than the multiplier's 0, and E_Q[W] <=
C still holds, as E_Q[W] falls with lambda. At the upper bound the budget may be missed: no lambda within
reason meets it, as with C < 1 and a policy that is on-policy, where every W is 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from megatron_vespo.algorithms.vespo import MAX_LOG_W, MIN_LOG_W, GammaKernel

# Averages over about the last 10 optimizer steps where Var_Q(W) is at its bound, over more where W varies
# less: longer than a rollout batch of the paper's 8 steps, within which E_Q[W] drifts.
RATE = 0.1
MAX_STEP = 0.5  # of log c2: one bad estimate cannot throw it away
MAX_PHI = 10.0  # what a response may count, in on-policy ones
MIN_EFFECTIVE_SAMPLES = 4.0  # a ratio of sums over fewer says more about its largest phi than about E_Q[W]
MIN_ESTIMATED_SHARE = 0.5
MIN_LOG_PHI = -87.0  # float32, in which the loss uses phi, has hardly a number below its exponential


def expected_w(log_w: np.ndarray, c1: float, c2: float) -> float:
    """E_Q[W] = sum phi W / sum phi over `log_w` [num_samples], in float64.

    NaN, that is no estimate, where every phi is 0 for the loss or where the effective number of samples,
    (sum phi)^2 / sum phi^2, is below MIN_EFFECTIVE_SAMPLES.
    """
    log_w = np.clip(log_w.astype(np.float64), MIN_LOG_W, MAX_LOG_W)
    w = np.exp(log_w)
    log_phi = c1 * log_w + c2 * (1.0 - w)
    if len(log_w) == 0 or log_phi.max() < MIN_LOG_PHI:
        return float("nan")
    share = np.exp(log_phi - log_phi.max())
    share /= share.sum()
    if 1.0 / np.square(share).sum() < MIN_EFFECTIVE_SAMPLES:
        return float("nan")
    return float(share @ w)


@cache
def c2_bounds(c1: float) -> tuple[float, float]:
    """The c2 on both sides of c1 >= 1 at which phi's maximum is MAX_PHI.

    With x = c2 / c1 the maximum's logarithm is c1 (x - 1 - log x): 0 at x = 1, growing away from it.
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
    """One step of dual ascent; no estimate (NaN) leaves c2 as it is."""
    if np.isnan(expected):
        return c2
    step = np.clip(RATE * (expected - budget) / budget, -MAX_STEP, MAX_STEP)
    return within_bounds(c1, c2 * float(np.exp(step)))


def window(mini_batches: int) -> int:
    """Optimizer steps among which estimates may be missing: whole rollout batches, 1 / RATE steps or more."""
    return mini_batches * math.ceil(1 / RATE / mini_batches)


def adapted(
    kernel: GammaKernel,
    budget: float,
    log_w: np.ndarray,
    advantages: np.ndarray,
    estimated: Sequence[Sequence[bool]] = (),
) -> tuple[GammaKernel, np.ndarray]:
    """The kernel of the next optimizer step, and E_Q[W] of this one: [2] float64, A > 0 then A < 0.

    `log_w` and `advantages` are [num_samples], all of the optimizer step that used `kernel`. Responses with
    A = 0 train nothing and do not count. `estimated` [steps, 2] says which of the steps before it in its
    window had an E_Q[W].
    """
    estimates = []
    changed = {}
    for i, (sign, chosen) in enumerate((("positive", advantages > 0), ("negative", advantages < 0))):
        c1, c2 = getattr(kernel, sign)
        estimates.append(expected_w(log_w[chosen], c1, c2))
        known = [*(step[i] for step in estimated), not np.isnan(estimates[-1])]
        if np.mean(known) >= MIN_ESTIMATED_SHARE:
            c2 = next_c2(c1, c2, estimates[-1], budget)
        changed[sign] = (c1, c2)
    return replace(kernel, **changed), np.array(estimates)
