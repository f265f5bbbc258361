"""What log W and phi look like over a mini-batch, as plain numbers."""

from __future__ import annotations

import numpy as np

DEAD_PHI = 0.01  # below this a sequence no longer teaches anything


def weight_diagnostics(log_w: np.ndarray, phi: np.ndarray, advantages: np.ndarray) -> dict[str, float]:
    """Metrics of one or more mini-batches; all inputs [num_samples]. An absent sign has no mean.

    `vespo/ess` is Kish's effective sample size of phi as a share of the samples, (sum phi)^2 / (n sum phi^2).
    """
    metrics = {
        "vespo/log_w_mean": float(log_w.mean()),
        "vespo/log_w_std": float(log_w.std()),
        "vespo/log_w_abs_max": float(np.abs(log_w).max()),
        "vespo/phi_mean": float(phi.mean()),
        "vespo/ess": effective_sample_share(phi),
        "vespo/dead_share": float((phi < DEAD_PHI).mean()),
    }
    for name, chosen in (("positive", advantages > 0), ("negative", advantages < 0)):
        if chosen.any():
            metrics[f"vespo/phi_mean_{name}"] = float(phi[chosen].mean())
    return metrics


def effective_sample_share(weights: np.ndarray) -> float:
    """(sum w)^2 / (n sum w^2), between 1/n and 1; 0 when every weight is 0."""
    square_sum = float(np.square(weights, dtype=np.float64).sum())
    if square_sum == 0.0:
        return 0.0
    return float(weights.sum(dtype=np.float64)) ** 2 / (len(weights) * square_sum)
