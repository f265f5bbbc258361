"""Losses whose gradient is a detached weight times A grad log pi: loss = - sg(weight) A log pi."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_vespo.algorithms.losses.clipped import MAX_LOG_RATIO
from megatron_vespo.algorithms.losses.inputs import LossInputs, TokenLoss
from megatron_vespo.algorithms.vespo import GammaKernel


def weighted(inputs: LossInputs, weight_T: Tensor) -> TokenLoss:
    """- weight A log pi, with a weight per token that is no path for gradient."""
    # an untrained token's weight may be NaN, and NaN times a gradient of 0 is not 0
    weight_T = inputs.masked(weight_T.detach())
    gradient_T = -(weight_T * inputs.advantages_T)
    return TokenLoss(gradient_T * inputs.log_probs_T, weight_T, gradient_T)


def weighted_response(inputs: LossInputs, weight: Callable[[Tensor], Tensor]) -> TokenLoss:
    """The same with the weights of responses, [S], by the sign of A; see `LossInputs.by_sign`."""
    if inputs.token_advantages_T is not None:
        return weighted(inputs, inputs.by_sign(weight))
    weight_S = weight(inputs.advantages_S).detach()
    gradient_T = inputs.masked(inputs.per_token(-(weight_S * inputs.advantages_S)))
    return TokenLoss(
        gradient_T * inputs.log_probs_T, lambda: inputs.masked(inputs.per_token(weight_S)), gradient_T
    )


def vespo(inputs: LossInputs, kernel: GammaKernel) -> TokenLoss:
    """- phi(W) A log pi, phi = W^c1 exp(c2 (1 - W)) (VESPO, arXiv 2602.10693).

    With advantages per token, W is still the response's, and c1 and c2 go by the sign of the token's own A.
    The two pairs differ because phi must fall faster for large W where a token is pushed up, and for small W
    where it is pushed down. Which of them happens to a token, the mean A of its response does not say.
    """
    return weighted_response(inputs, partial(kernel.phi, inputs.log_w_S))


def vespo_mean(inputs: LossInputs, kernel: GammaKernel) -> TokenLoss:
    """VESPO of log W / T, the geometric mean of the token ratios: an ablation of the paper."""
    log_w_S = inputs.log_w_S / inputs.lengths_S
    return weighted_response(inputs, partial(kernel.phi, log_w_S))


def vespo_sqrt(inputs: LossInputs, kernel: GammaKernel) -> TokenLoss:
    """VESPO of log W / sqrt(T): the paper's other ablation."""
    log_w_S = inputs.log_w_S / inputs.lengths_S.sqrt()
    return weighted_response(inputs, partial(kernel.phi, log_w_S))


def reinforce(inputs: LossInputs) -> TokenLoss:
    """- A log pi: no correction for off-policy data."""
    return weighted(inputs, torch.ones_like(inputs.log_probs_T))


def sequence_importance_sampling(inputs: LossInputs) -> TokenLoss:
    """- W A log pi: the unbiased gradient, with nothing against its variance; W stops at exp(20)."""
    return weighted_response(inputs, lambda _: inputs.log_w_S.clamp(max=MAX_LOG_RATIO).exp())


def topr(inputs: LossInputs) -> TokenLoss:
    """Weight 1 where A > 0, min(W, 1) elsewhere (tapered off-policy REINFORCE, arXiv 2503.14286).

    The sign that decides is A's. TOPR's is that of R, which is +1 or -1 there and has no baseline: the same
    where the baseline lies between a right and a wrong answer. Its experiments divide a response's term by
    its length, so that the default aggregation does, too.
    """
    tapered_S = inputs.log_w_S.clamp(max=0.0).exp()
    return weighted_response(inputs, lambda signs_S: torch.where(signs_S > 0, 1.0, tapered_S))


def cispo(inputs: LossInputs, low: float, high: float) -> TokenLoss:
    """Weight clip(r, 1 - low, 1 + high) of each token (MiniMax-M1, arXiv 2506.13585).

    The paper has no lower bound and does not publish its upper one; 1.28 is 1 plus DAPO's 0.28.
    TRL's epsilon_high is the bound itself: its 5 is a `high` of 4 here.
    """
    ratio_T = inputs.log_ratio_T.clamp(max=MAX_LOG_RATIO).exp()
    return weighted(inputs, ratio_T.clamp(1.0 - low, 1.0 + high))
