"""Sums over trained tokens, which give the spread and divergence of a whole rollout batch.

Shape suffix: T packed tokens of a micro-batch on this rank. For tokens drawn from q, with x = log p - log q,
John Schulman's estimators of KL(q || p) (http://joschu.net/blog/kl-approx.html, 2020) are the means of

    k1 = -x                 unbiased, noisy, may be negative
    k2 = x^2 / 2            biased, little noise
    k3 = exp(x) - 1 - x     unbiased, little noise, never negative
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MAX_LOG_RATIO = 50.0  # its exp, and sums of these, are finite in float64


class TokenSums[Value](NamedTuple):
    """Sums over tokens, each a scalar: a float64 tensor when computed, a float when read."""

    x: Value
    xx: Value  # of x^2
    k3: Value


def token_sums(log_ratio_T: Tensor, loss_mask_T: Tensor) -> TokenSums[Tensor]:
    """Sums of x = `log_ratio_T` [T] where `loss_mask_T` is not 0; masked entries may be NaN.

    It does not wait for the device.
    """
    x_T = log_ratio_T.detach().double().masked_fill(loss_mask_T == 0, 0.0)
    k3_T = x_T.clamp(max=MAX_LOG_RATIO).expm1() - x_T
    return TokenSums(x_T.sum(), x_T.square().sum(), k3_T.sum())


def token_metrics(sums: TokenSums[float], num_tokens: float, prefix: str) -> dict[str, float]:
    """`prefix` is part of the metrics' names: "" for pi against the denominator, "engine_" for the mismatch.

    token_sigma is the standard deviation of x over the tokens. If tokens err independently, the log ratio of
    sequences of T tokens spreads by sigma sqrt(T).
    """
    mean, square, k3 = (float(value) / num_tokens for value in sums)
    return {
        f"ratio/{prefix}token_sigma": max(square - mean * mean, 0.0) ** 0.5,
        f"kl/{prefix}k1": -mean,
        f"kl/{prefix}k2": square / 2,
        f"kl/{prefix}k3": k3,
    }
