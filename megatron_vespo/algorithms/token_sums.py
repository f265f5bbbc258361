"""Sums over trained tokens, from which spread and divergence of a whole rollout batch follow.

Shape suffix: T packed tokens of a micro-batch on this rank. For tokens that q drew, and x = log p - log q,
John Schulman's estimators of KL(q || p) (http://joschu.net/blog/kl-approx.html, 2020) are the means of

    k1 = -x                 unbiased, noisy, may be negative
    k2 = x^2 / 2            biased, little noise
    k3 = exp(x) - 1 - x     unbiased, little noise, never negative
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# of x = log pi - log of the ratio's denominator, then of x = log pi_old - log mu
TOKEN_SUMS = ("ratio_x", "ratio_xx", "ratio_k3", "engine_x", "engine_xx", "engine_k3")

MAX_LOG_RATIO = 50.0  # exp of it, and sums of it, are finite in float64


def token_sums(log_ratio_T: Tensor, engine_log_ratio_T: Tensor, loss_mask_T: Tensor) -> Tensor:
    """The sums named by TOKEN_SUMS, float64 [6]; nothing waits for the device. Masked tokens may be NaN."""
    ignored_T = loss_mask_T == 0
    sums = []
    for values_T in (log_ratio_T, engine_log_ratio_T):
        x_T = values_T.detach().double().masked_fill(ignored_T, 0.0)
        k3_T = x_T.clamp(max=MAX_LOG_RATIO).expm1() - x_T
        sums += [x_T.sum(), x_T.square().sum(), k3_T.sum()]
    return torch.stack(sums)


def token_metrics(sums: np.ndarray, num_tokens: float, prefix: str) -> dict[str, float]:
    """`prefix` is "" for the first three sums, "engine_" for the last three; `sums` [3] float64.

    token_sigma is the standard deviation of x over the tokens: sequences of T tokens whose tokens err
    independently have a log ratio that spreads by sigma sqrt(T).
    """
    mean, square, k3 = (float(value) / num_tokens for value in sums)
    return {
        f"ratio/{prefix}token_sigma": max(square - mean * mean, 0.0) ** 0.5,
        f"kl/{prefix}k1": -mean,
        f"kl/{prefix}k2": square / 2,
        f"kl/{prefix}k3": k3,
    }
