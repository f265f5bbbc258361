"""DPPO (divergence proximal policy optimization, arXiv 2602.04879): a trust region of divergence, not ratio.

    loss = - M sg(min(r, 20)) A log pi,     r = pi / mu
    M = 0 where D > delta and the update would increase D: A > 0 and r > 1, or A < 0 and r < 1; else 1

D is the TV or the KL(mu || pi) of the sampled token against all others, see `divergences`: the paper's
Binary-TV and Binary-KL. Its top-K variants need more log-probs than the sampled token's: not here. A PPO
clip of 0.2 allows a token of probability 1e-4 a change of 2e-5, and a token of 0.8 one of 0.16. DPPO allows
both the same TV.

The paper compares with the policy that has sampled: `--ratio-denominator rollout`. With `recomputed`, mu is
pi_old, the `_recompute` variants of the authors' code (sail-sg/Stable-RL). The thresholds, 0.15 for TV and
0.05 for KL, are those that TRL's DPPOConfig calls the paper's. The bound of r is that of the authors' losses
in verl, `dppo_tv` and `dppo_kl`; their own repository has 10.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_vespo.algorithms.divergences import binary_kl, binary_tv
from megatron_vespo.algorithms.losses.inputs import LossInputs, TokenLoss
from megatron_vespo.algorithms.losses.weighted import weighted

MAX_RATIO = 20.0


def dppo_tv(inputs: LossInputs, delta_low: float, delta_high: float) -> TokenLoss:
    """DPPO-Binary-TV. `delta_low` holds where A < 0, `delta_high` where A > 0."""
    return _masked(inputs, binary_tv(*_log_probs(inputs)), delta_low, delta_high)


def dppo_kl(inputs: LossInputs, delta_low: float, delta_high: float) -> TokenLoss:
    """DPPO-Binary-KL, with KL(mu || pi). `delta_low` holds where A < 0, `delta_high` where A > 0."""
    return _masked(inputs, binary_kl(*_log_probs(inputs)), delta_low, delta_high)


def _log_probs(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """log mu and log pi, float64 without gradient."""
    log_pi_T = inputs.log_probs_T.detach().double()
    return log_pi_T - inputs.log_ratio_T, log_pi_T


def _masked(inputs: LossInputs, divergence_T: Tensor, delta_low: float, delta_high: float) -> TokenLoss:
    log_ratio_T = inputs.log_ratio_T
    up_T = (log_ratio_T > 0) & (divergence_T > delta_high)
    down_T = (log_ratio_T < 0) & (divergence_T > delta_low)
    beyond_T = torch.where(inputs.advantages_T > 0, up_T, down_T)
    # multiplied, not filled: a NaN under the mask must stay visible
    return weighted(inputs, log_ratio_T.clamp(max=math.log(MAX_RATIO)).exp() * ~beyond_T)
