"""Computes metrics of log W and of the weights of a rollout batch.

Every input is an array with one entry per sample, [n], in the order of the mini-batches. "Weight" is what
multiplies A grad log pi: phi(W) for VESPO, the mean over the response's tokens for a loss that weighs tokens.
"""

from __future__ import annotations

import numpy as np

DEAD_WEIGHT = 0.01  # below this a sequence no longer teaches anything
FLOOR_TOKEN_SIGMA = "ratio/floor_token_sigma"  # name of the metric that gives the floor at any length
SHORTEST_BUCKET = 64  # tokens; shorter responses are one bucket, and every power of two from it starts one


def floor_metrics(log_w: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """The floor of log W: root mean squares of `log_w`, measured between two passes over the same weights.

    They are given over all responses, by length, and per token. Tokens are rounded independently, so the
    variance of log W grows with the length of the response.
    """
    buckets, squares = length_buckets(lengths), np.square(log_w, dtype=np.float64)
    metrics = {"": float(squares.mean() ** 0.5)} | {
        f"/{bucket_name(bucket)}": float(squares[buckets == bucket].mean() ** 0.5)
        for bucket in np.unique(buckets)
    }
    return {f"ratio/floor_std{part}": value for part, value in metrics.items()} | {
        FLOOR_TOKEN_SIGMA: float(squares.sum() / lengths.sum()) ** 0.5
    }


def ratio_metrics(
    log_w: np.ndarray,
    log_mismatch_in_w: np.ndarray,
    log_mismatch: np.ndarray,
    on_policy: np.ndarray,
    floor: np.ndarray | None = None,
) -> dict[str, float]:
    """Spread of each part of log W = staleness + mismatch + floor, and its share of var(log W).

        share of mismatch = cov(mismatch, log W) / var(log W)

    `floor` is the variance that rounding alone gives each response's log W, None if it was not measured. It
    comes from two passes of the trainer, pi and pi_old. It is subtracted from their difference, staleness,
    except where that is exactly 0, as before the first update. If log W contains only one of the passes, half
    of the floor counts. This is so with a mismatch in W, whose pi_old cancels that of staleness. It is also
    so for `rollout`, where the floor is subtracted from mismatch. Shares sum to 1.

    `log_mismatch` is log(pi_old / mu); `log_mismatch_in_w` is the part of it that is in W. Both are NaN if
    pi_old was not computed (denominator `rollout`). In that case `on_policy` [n] bool marks samples that the
    policy that generated them trains on: pi_old is pi, and their log W is all mismatch. Their variance also
    counts as the mismatch of the other samples, and the rest as staleness.
    """
    metrics = {
        "ratio/log_w_mean": float(log_w.mean()),
        "ratio/log_w_std": float(log_w.std()),
        "ratio/log_w_abs_max": float(np.abs(log_w).max()),
    }
    unknown = np.isnan(log_mismatch_in_w)
    gap = np.where(unknown & on_policy, log_w, log_mismatch)
    measured = gap[~np.isnan(gap)]
    if len(measured):
        metrics["ratio/engine_gap_std"] = float(measured.std())
    total = float(log_w.var(dtype=np.float64))
    rounding = np.zeros(len(log_w)) if floor is None else floor
    shares = {}
    if not unknown.any():
        staleness = log_w - log_mismatch_in_w
        spread = float(staleness.std())
        noise = min(float((rounding * (staleness != 0.0)).mean()), spread * spread)
        metrics["ratio/staleness_std"] = (spread * spread - noise) ** 0.5
        metrics["ratio/mismatch_std"] = float(log_mismatch_in_w.std())
        shares["mismatch"] = float(
            np.mean((log_mismatch_in_w - log_mismatch_in_w.mean()) * (log_w - log_w.mean()), dtype=np.float64)
        )
        if log_mismatch_in_w.any():
            noise = min(noise / 2, max(total - shares["mismatch"], 0.0))
    elif on_policy.any():
        explained = min(float(log_w[on_policy].var(dtype=np.float64)), total)
        noise = min(float(rounding.mean()) / 2, explained)
        metrics["ratio/staleness_std"] = (total - explained) ** 0.5
        metrics["ratio/mismatch_std"] = (explained - noise) ** 0.5
        shares["mismatch"] = explained - noise
    else:
        noise = min(float(rounding.mean()) / 2, total)
    if floor is not None:
        shares["floor"] = noise
    return metrics | {f"ratio/{name}_share": part / total for name, part in shares.items() if total > 0.0}


def weight_metrics(
    weights: np.ndarray, advantages: np.ndarray, lengths: np.ndarray, mini_batches: np.ndarray
) -> dict[str, float]:
    """`weight/mean`, `/ess` and `/dead_share`, overall, by sign of A, and by mini-batch if there are several.

    Mean, dead share and number of samples are also given by sign and length of the response. ESS is Kish's
    effective sample size as a share of the samples, (sum w)^2 / (n sum w^2). A = 0 has no sign. Groups
    without samples are left out.
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
    """(sum w)^2 / (n sum w^2), between 1/n and 1; 0 if every weight is 0."""
    square_sum = float(np.square(weights, dtype=np.float64).sum())
    if square_sum == 0.0:
        return 0.0
    return float(weights.sum(dtype=np.float64)) ** 2 / (len(weights) * square_sum)


def dead_share(weights: np.ndarray) -> float:
    return float((weights < DEAD_WEIGHT).mean())


def share_dead_by(correction: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """The share of dead samples whose `correction`, a factor of the weight, is itself that small."""
    dead = weights < DEAD_WEIGHT
    return {"mismatch/dead_share": dead_share(correction[dead])} if dead.any() else {}


def length_buckets(lengths: np.ndarray) -> np.ndarray:
    """Each length's bucket number: 0 below SHORTEST_BUCKET, k from SHORTEST_BUCKET 2^(k - 1) on."""
    doublings = np.floor(np.log2(np.maximum(lengths, 1) / SHORTEST_BUCKET)).astype(np.int64)
    return np.maximum(doublings + 1, 0)


def bucket_name(bucket: int) -> str:
    """The bucket's first length, and the first length after it: `0-64`, `64-128`, `512-1k`, `4k-8k`."""
    last = SHORTEST_BUCKET * 2 ** int(bucket)
    return f"{_short(last // 2) if bucket else 0}-{_short(last)}"


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)
