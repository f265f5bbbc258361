"""VESPO (arXiv 2602.10693): a soft weight on the full importance weight of a response.

Shape suffixes: T packed tokens of a micro-batch, S its sequences.

    log W  = sum over the response of  log pi(y_t | x, y_<t) - log mu(y_t | x, y_<t)
    phi(W) = W^c1 exp(c2 (1 - W)),          log phi = c1 log W + c2 (1 - W),  phi(1) = 1
    loss   = - phi(W) A log pi,             phi is detached: a coefficient without gradient
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.algorithms import segments
from megatron_vespo.algorithms.segments import boundaries, cached_runs, mask_of_some, segment_sums

RatioDenominator = Literal["recomputed", "rollout", "decoupled", "decoupled-token"]
RATIO_DENOMINATORS: tuple[RatioDenominator, ...] = get_args(RatioDenominator)
# denominators with a truncated part of rho in W
DECOUPLED: tuple[RatioDenominator, ...] = ("decoupled", "decoupled-token")

# exp(20) is 4.9e8. With c2 > 0 phi is already exactly 0 there; with c2 = 0 it stays finite in fp32.
MAX_LOG_W = 20.0
# Reached only with c2 = 0, where phi has no maximum; exp(80) is 5.5e34, still finite.
MAX_LOG_PHI = 80.0
# Finite, so that c1 = 0 times log W is 0 and not NaN; exp(-10,000 c1) is exactly 0 for any c1 in use.
MIN_LOG_W = -1.0e4


@dataclass(frozen=True)
class GammaKernel:
    """Exponents (c1, c2) of phi by the sign of the advantage. The defaults are the paper's values."""

    positive: tuple[float, float] = (2.0, 3.0)
    negative: tuple[float, float] = (3.0, 2.0)

    def log_phi(self, log_w_S: Tensor, advantages_S: Tensor) -> Tensor:
        """log phi(W), [S] float32. A = 0 counts as positive; it has no effect on the loss."""
        log_w_S = log_w_S.float().clamp(MIN_LOG_W, MAX_LOG_W)
        positive_S = advantages_S >= 0
        c1_S = torch.where(positive_S, self.positive[0], self.negative[0])
        c2_S = torch.where(positive_S, self.positive[1], self.negative[1])
        return (c1_S * log_w_S + c2_S * (1.0 - log_w_S.exp())).clamp(max=MAX_LOG_PHI)

    def phi(self, log_w_S: Tensor, advantages_S: Tensor) -> Tensor:
        """phi(W), [S] float32, exponentiated last."""
        return self.log_phi(log_w_S, advantages_S).exp()


def segment_sum(
    values_T: Tensor, sequence_ids_T: Tensor, num_sequences: int, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum `values_T` [T, ...] per sequence in float64, [S, ...] float32; `sequence_ids_T` [T] ascend.

    With `group`, whose ranks hold parts of the same sequences, every rank gets the sums over all of them.
    """
    return _over_ranks(segment_sums(values_T, boundaries(sequence_ids_T, num_sequences)), group)


def _over_ranks(sums_S: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(sums_S, group=group)
    return sums_S.float()


@dataclass(frozen=True)
class LogRatio:
    """log W and its parts, each [S] float32 without gradient: log W = staleness + log_mismatch_in_w.

    `log_mismatch_S` is log(pi_old / mu) in full, for every denominator; NaN if pi_old is unknown.
    `log_mismatch_in_w_S` is the part of it in W: all of it for `rollout`, a truncated part for DECOUPLED,
    none for `recomputed`. `log_pi_over_mu_S` is log(pi / mu) in full, for every denominator.
    """

    log_w_S: Tensor
    log_mismatch_in_w_S: Tensor
    log_mismatch_S: Tensor
    log_pi_over_mu_S: Tensor


def sequence_log_ratio(
    log_probs_T: Tensor,
    behavior_log_probs_T: Tensor,
    old_log_probs_T: Tensor | None,
    loss_mask_T: Tensor,
    sequence_ids_T: Tensor,
    num_sequences: int,
    denominator: RatioDenominator,
    mismatch_truncation: float,
    group: dist.ProcessGroup | None = None,
) -> LogRatio:
    """Full, not length-normalised, log importance weight of every sequence.

    recomputed:       log W = log(pi / pi_old)
    rollout:          log W = log(pi / mu)
    decoupled:        log W = log(pi / pi_old) + min(log(pi_old / mu), log(mismatch_truncation))
    decoupled-token:  log W = log(pi / pi_old) + sum_t min(log rho_t, log(mismatch_truncation)), rho_t the
                      token's pi_old / mu

    Truncating the product bounds what engine noise adds to log W: by log 2 with the default of 2. Truncating
    every token's rho, as the VESPO authors and TRL do, bounds only each token. Deviations of rho_t by a few
    percent pass unchanged: 8,192 of them with a standard deviation of 0.02 add one of 1.8 to log W.

    `log_probs_T`, `behavior_log_probs_T` (mu) and `old_log_probs_T` (pi_old) are floating [T]. Entries where
    `loss_mask_T` is 0 are ignored, whatever they hold. `rollout` does not need pi_old. `group` is the
    context-parallel group if sequences are split: one reduction gives its ranks the same values.
    """
    log_probs_T = log_probs_T.detach()
    bounds = boundaries(sequence_ids_T, num_sequences)
    if old_log_probs_T is None:
        if denominator != "rollout":
            raise ValueError(
                f"the ratio denominator {denominator} needs pi_old: call compute_old_log_probs first"
            )
        differences = [(log_probs_T, behavior_log_probs_T, math.inf)]
        [log_w_S] = _over_ranks(_masked_sums(differences, loss_mask_T, bounds), group).unbind(1)
        unknown_S = torch.full_like(log_w_S, torch.nan)
        return LogRatio(log_w_S, unknown_S, unknown_S, log_w_S)
    most = math.log(mismatch_truncation)
    differences = [
        (log_probs_T, old_log_probs_T, math.inf),
        (old_log_probs_T, behavior_log_probs_T, math.inf),
        (old_log_probs_T, behavior_log_probs_T, most),
    ]
    sums_S3 = _over_ranks(_masked_sums(differences, loss_mask_T, bounds), group)
    staleness_S, log_mismatch_S, truncated_S = sums_S3.unbind(1)
    if denominator == "recomputed":
        log_mismatch_in_w_S = torch.zeros_like(log_mismatch_S)
    elif denominator == "decoupled":
        log_mismatch_in_w_S = log_mismatch_S.clamp(max=most)
    elif denominator == "decoupled-token":
        log_mismatch_in_w_S = truncated_S
    else:
        log_mismatch_in_w_S = log_mismatch_S
    return LogRatio(
        staleness_S + log_mismatch_in_w_S, log_mismatch_in_w_S, log_mismatch_S, staleness_S + log_mismatch_S
    )


def _masked_sums(
    differences: Sequence[tuple[Tensor, Tensor, float]], loss_mask_T: Tensor, bounds: Tensor
) -> Tensor:
    """For each (a, b, most) the sum of min(a - b, most) over a sequence's trained tokens, [S, K] float64."""

    def sums(tokens: slice, mask_T: Tensor | None, bounds: Tensor) -> Tensor:
        terms = [one_T[tokens] - other_T[tokens] for one_T, other_T, _ in differences]
        terms = [
            term_T if most == math.inf else term_T.clamp(max=most)
            for term_T, (*_, most) in zip(terms, differences, strict=True)
        ]
        if len(terms) == 1 and mask_T is None:
            return segment_sums(terms[0], bounds)[:, None]
        terms_TK = torch.stack(terms, dim=1)
        # filled, not multiplied: masked entries may be NaN
        return segment_sums(
            terms_TK if mask_T is None else terms_TK.masked_fill(mask_T[:, None] == 0, 0.0), bounds
        )

    if not segments.in_host_memory(loss_mask_T):
        return sums(slice(None), loss_mask_T, bounds)
    parts = [
        sums(
            tokens,
            mask_of_some(loss_mask_T[tokens]),
            bounds[sequences.start : sequences.stop + 1] - tokens.start,
        )
        for sequences, tokens in cached_runs(bounds.tolist())
    ]
    return torch.cat(parts)
