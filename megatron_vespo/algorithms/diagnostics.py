"""What log W and the weights of a rollout batch look like, as plain numbers.

Every input is an array with one entry a sample, [n], in the order of the mini-batches. "Weight" is what
multiplies A grad log pi: phi(W) for VESPO, the mean over the response's tokens for a loss that weighs tokens.
"""

from __future__ import annotations

import numpy as np

DEAD_WEIGHT = 0.01  # below this a sequence no longer teaches anything
SHORTEST_BUCKET = 64  # tokens; shorter responses are one bucket, above it every power of two starts one


def ratio_metrics(
    log_w: np.ndarray, mismatch: np.ndarray, engine_gap: np.ndarray, on_policy: np.ndarray
) -> dict[str, float]:
    """log W = staleness + mismatch: the spread of each, and the share of var(log W) that mismatch explains.

        share = cov(mismatch, log W) / var(log W),  which of staleness and mismatch sums to 1

    `mismatch` is the part of log(pi_old / mu) that is in W, `engine_gap` all of it, in W or not. Both are NaN
    where pi_old was not computed (denominator `rollout`). There, `on_policy` [n] bool marks samples that were
    trained on by the very policy that sampled them: pi_old is pi and their log W is all mismatch. Their
    variance is taken for the mismatch of the others, too, and what exceeds it for staleness.
    """
    metrics = {
        "ratio/log_w_mean": float(log_w.mean()),
        "ratio/log_w_std": float(log_w.std()),
        "ratio/log_w_abs_max": float(np.abs(log_w).max()),
    }
    unknown = np.isnan(mismatch)
    gap = np.where(unknown & on_policy, log_w, engine_gap)
    measured = gap[~np.isnan(gap)]
    if len(measured):
        metrics["ratio/engine_gap_std"] = float(measured.std())
    total = float(log_w.var(dtype=np.float64))
    if not unknown.any():
        metrics["ratio/staleness_std"] = float((log_w - mismatch).std())
        metrics["ratio/mismatch_std"] = float(mismatch.std())
        explained = float(np.mean((mismatch - mismatch.mean()) * (log_w - log_w.mean()), dtype=np.float64))
    elif on_policy.any():
        explained = min(float(log_w[on_policy].var(dtype=np.float64)), total)
        metrics["ratio/staleness_std"] = (total - explained) ** 0.5
        metrics["ratio/mismatch_std"] = explained**0.5
    else:
        return metrics
    return metrics | ({"ratio/mismatch_share": explained / total} if total > 0.0 else {})


def weight_metrics(
    weights: np.ndarray, advantages: np.ndarray, lengths: np.ndarray, mini_batches: np.ndarray
) -> dict[str, float]:
    """`weight/mean`, `/ess` and `/dead_share`: overall, by the sign of A, and by mini-batch where there are
    several; mean, dead share and number of samples also by sign and length of the response.

    ESS is Kish's effective sample size as a share of the samples, (sum w)^2 / (n sum w^2). A = 0 has no sign.
    What no sample belongs to is left out.
    """
    metrics = _of_part(weights, "")
    buckets = length_buckets(lengths)
    for sign, of_sign in (("positive", advantages > 0), ("negative", advantages < 0)):
        if of_sign.any():
            metrics |= _of_part(weights[of_sign], f"/{sign}")
        for bucket in np.unique(buckets[of_sign]):
            chosen = weights[of_sign & (buckets == bucket)]
            name = f"{sign}/{bucket_name(bucket)}"
            metrics[f"weight/mean/{name}"] = float(chosen.mean())
            metrics[f"weight/dead_share/{name}"] = dead_share(chosen)
            metrics[f"weight/count/{name}"] = float(len(chosen))
    indices = np.unique(mini_batches)
    for index in indices if len(indices) > 1 else ():
        metrics |= _of_part(weights[mini_batches == index], f"/mini_batch_{index}")
    return metrics


def _of_part(weights: np.ndarray, part: str) -> dict[str, float]:
    return {
        f"weight/mean{part}": float(weights.mean()),
        f"weight/ess{part}": effective_sample_share(weights),
        f"weight/dead_share{part}": dead_share(weights),
    }


def effective_sample_share(weights: np.ndarray) -> float:
    """(sum w)^2 / (n sum w^2), between 1/n and 1; 0 when every weight is 0."""
    square_sum = float(np.square(weights, dtype=np.float64).sum())
    if square_sum == 0.0:
        return 0.0
    return float(weights.sum(dtype=np.float64)) ** 2 / (len(weights) * square_sum)


def dead_share(weights: np.ndarray) -> float:
    return float((weights < DEAD_WEIGHT).mean())


def share_dead_by(correction: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """Of the dead samples, those whose `correction`, which is a factor of the weight, is as small itself."""
    dead = weights < DEAD_WEIGHT
    return {"mismatch/dead_share": dead_share(correction[dead])} if dead.any() else {}


def length_buckets(lengths: np.ndarray) -> np.ndarray:
    """Number of each length's bucket: 0 below SHORTEST_BUCKET, k from SHORTEST_BUCKET 2^(k - 1) on."""
    doublings = np.floor(np.log2(np.maximum(lengths, 1) / SHORTEST_BUCKET)).astype(np.int64)
    return np.maximum(doublings + 1, 0)


def bucket_name(bucket: int) -> str:
    """From the first length to the one before which it ends: `0-64`, `64-128`, `512-1k`, `4k-8k`."""
    last = SHORTEST_BUCKET * 2 ** int(bucket)
    return f"{_short(last // 2) if bucket else 0}-{_short(last)}"


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)
