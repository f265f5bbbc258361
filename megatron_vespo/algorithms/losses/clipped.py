"""Losses of a ratio that is a path for gradient: - A f(r)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_vespo.algorithms.losses.inputs import LossInputs, TokenLoss

# exp(20) is 4.9e8: r A is finite, and so is its gradient
MAX_LOG_RATIO = 20.0


def clipped(
    inputs: LossInputs, log_ratio_T: Tensor, low: float, high: float, dual_clip: float = math.inf
) -> TokenLoss:
    """- min(r A, clip(r, 1 - low, 1 + high) A), where A < 0 never more than - c A, c = `dual_clip`."""
    advantages_T = inputs.advantages_T
    ratio_T = _ratio(inputs, log_ratio_T)
    free_T, bounded_T = ratio_T * advantages_T, ratio_T.clamp(1.0 - low, 1.0 + high) * advantages_T
    floor_T = torch.where(advantages_T < 0, dual_clip * advantages_T, -math.inf)
    # with NaN the condition is false, and it stays visible
    capped_T = free_T < floor_T
    loss_T = -torch.where(capped_T, floor_T, torch.minimum(free_T, bounded_T))
    weight_T = torch.where((free_T <= bounded_T) & ~capped_T, ratio_T, 0.0).detach()
    return TokenLoss(loss_T, weight_T)


def unclipped(inputs: LossInputs, log_ratio_T: Tensor) -> TokenLoss:
    """- r A."""
    ratio_T = _ratio(inputs, log_ratio_T)
    return TokenLoss(-ratio_T * inputs.advantages_T, ratio_T.detach())


def _ratio(inputs: LossInputs, log_ratio_T: Tensor) -> Tensor:
    """exp of the clamped log-ratio, with the gradient of log pi also where it was clamped."""
    return inputs.attached(log_ratio_T.clamp(max=MAX_LOG_RATIO)).exp()


def grpo(inputs: LossInputs, low: float, high: float, dual_clip: float = math.inf) -> TokenLoss:
    """PPO's clipped objective on token ratios (GRPO, arXiv 2402.03300; DAPO's upper bound, 2503.14476).

    As published nothing bounds r where A < 0. `dual_clip` does (dual-clip PPO, arXiv 1912.09729): a
    token with A < 0 and r > c has no gradient. verl's `vanilla` loss always has c = 3, and with it the GRPO
    that the VESPO paper compares with.
    """
    return clipped(inputs, inputs.log_ratio_T, low, high, dual_clip)


def gspo(inputs: LossInputs, low: float, high: float) -> TokenLoss:
    """The same on a response's geometric mean s = exp(log W / T) (GSPO, arXiv 2507.18071).

    Written a token, with the gradient of s shared out equally: the mean over a response's tokens is GSPO's
    term, and has its gradient. With advantages per token it is GSPO-token, of the same paper.
    """
    return clipped(inputs, inputs.per_token(inputs.log_w_S / inputs.lengths_S), low, high)


def sapo(inputs: LossInputs, tau_positive: float, tau_negative: float) -> TokenLoss:
    """- A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A (SAPO, arXiv 2511.20347).

    Its eq. 5 takes the mean of a response's tokens, then that of the responses.
    """
    advantages_T = inputs.advantages_T
    tau_T = torch.where(advantages_T > 0, tau_positive, tau_negative)
    ratio_T = _ratio(inputs, inputs.log_ratio_T)
    gate_T = torch.sigmoid(tau_T * (ratio_T - 1.0))
    weight_T = (4.0 * gate_T * (1.0 - gate_T) * ratio_T).detach()
    return TokenLoss(-advantages_T * (4.0 / tau_T) * gate_T, weight_T)
