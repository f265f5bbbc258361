"""KL(pi || reference) as a term of the loss, estimated from the sampled tokens.

With x = log pi - log ref of a token (J. Schulman, http://joschu.net/blog/kl-approx.html, 2020):

    kind    value                   gradient by log pi    its mean over tokens drawn from pi
    k1      x                       1                     0
    k2      x^2 / 2                 x                     that of KL(pi || ref)
    k3      exp(-x) - 1 + x         1 - exp(-x)           that of KL(ref || pi)

The values of k1 and k3 have the mean KL(pi || ref). Gradients: arXiv 2510.01555 and 2512.21852.

Tokens drawn from mu need the ratio rho = pi / mu, and the gradient of rho, too. With `ratio_bound`

    value = min(rho, bound) k            gradient by log pi = min(rho, bound) x

For k3 without a bound this is the estimator of DeepSeek-V3.2 (arXiv 2512.02556, eq. 7), because the gradient
of rho k3 is rho (k3 + 1 - exp(-x)) = rho x. For k1 it is that of rho k1 without its part of mean 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from megatron_vespo.algorithms.losses.inputs import LossInputs

KLKind = Literal["k1", "k2", "k3"]
KL_KINDS: tuple[KLKind, ...] = get_args(KLKind)
MAX_LOG_RATIO = 20.0  # no ratio is taken for more than its exp


@dataclass(frozen=True)
class KLTerm:
    """The term with its options; `ratio_bound` None takes the tokens as drawn from pi."""

    coefficient: float
    kind: KLKind
    ratio_bound: float | None

    def __call__(self, inputs: LossInputs, reference_T: Tensor, behavior_T: Tensor) -> Tensor:
        """The term of every token, float64 [T] with the gradient of log pi; 0 where no token is trained.

        `reference_T` and `behavior_T` are log ref and log mu [T].
        """
        log_pi_T = inputs.log_probs_T.detach()
        x_T = inputs.masked(log_pi_T.double() - reference_T)
        value_T, gradient_T = _estimate(self.kind, x_T)
        if self.ratio_bound is not None:
            bound = min(math.log(self.ratio_bound), MAX_LOG_RATIO)
            rho_T = inputs.masked(log_pi_T.double() - behavior_T).clamp(max=bound).exp()
            value_T, gradient_T = rho_T * value_T, rho_T * x_T
        zero_T = inputs.masked(inputs.log_probs_T - log_pi_T)  # with gradient
        return self.coefficient * (value_T + gradient_T * zero_T)


def _estimate(kind: KLKind, x_T: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient by log pi."""
    if kind == "k1":
        return x_T, x_T.new_ones(x_T.shape)
    if kind == "k2":
        return x_T.square() / 2, x_T
    change_T = (-x_T).clamp(max=MAX_LOG_RATIO).expm1()
    return change_T + x_T, -change_T
