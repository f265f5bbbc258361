"""Divergences of two policies at one token, from the log-probs of the sampled token alone.

The vocabulary becomes two events: the sampled token, and all others. With p and q the probabilities of the
sampled token, the divergences of the two Bernoulli distributions are

    TV(p, q)     |p - q|
    KL(p || q)   p log(p / q) + (1 - p) log((1 - p) / (1 - q))

Neither exceeds the divergence of the whole distributions (the data processing inequality). Sources: DPPO,
arXiv 2602.04879, its "binary" approximations; KPop, arXiv 2606.15079, pages 18 and 19.
"""

from __future__ import annotations

import math

from torch import Tensor

# 1 - p is not taken for less: log-probs are float32, closer to 1 it is rounding
MIN_COMPLEMENT = 1e-6
_MAX_LOG_P = math.log1p(-MIN_COMPLEMENT)


def binary_tv(log_p_T: Tensor, log_q_T: Tensor) -> Tensor:
    """TV(p, q), float64 [T], in [0, 1]; NaN where either is NaN. Log-probs above 0 count as 0."""
    return (log_p_T.double().clamp(max=0.0).exp() - log_q_T.double().clamp(max=0.0).exp()).abs()


def binary_kl(log_p_T: Tensor, log_q_T: Tensor) -> Tensor:
    """KL(p || q) in nats, float64 [T], never negative; NaN where either is NaN."""
    log_p_T, log_q_T = (log_T.double().clamp(max=_MAX_LOG_P) for log_T in (log_p_T, log_q_T))
    complement_T, log_complement_T = _complement(log_p_T)
    log_ratio_T = log_complement_T - _complement(log_q_T)[1]
    kl_T = log_p_T.exp() * (log_p_T - log_q_T) + complement_T * log_ratio_T
    # rounding of equal terms may leave less than 0
    return kl_T.clamp(min=0.0)


def _complement(log_p_T: Tensor) -> tuple[Tensor, Tensor]:
    """1 - p and its logarithm; expm1, as 1 - exp(log p) loses its digits where p is close to 1."""
    complement_T = -log_p_T.expm1()
    return complement_T, complement_T.log()
