"""Corrects the engine mismatch rho = pi_old / mu: one weight per token multiplies the policy loss.

Shape suffixes: T packed tokens of a micro-batch on this rank, S its sequences. prod and mean run over the
trained tokens of a response, on all context-parallel ranks. [ ] is 1 if the condition holds, else 0.

    importance         rho_t      decoupled PPO, rho min(r A, clip(r) A), arXiv 2110.00641
    tis                min(max(rho_t, low), high)      truncated importance sampling, arXiv 1802.01561
    sequence-tis       min(max(prod rho, low), high)   the same for the response
    icepop             rho_t [low <= rho_t <= high]    IcePop, arXiv 2510.18855
    token-mask         [low <= rho_t <= high]          masked importance sampling without the weight
    reject-product     [low <= prod rho <= high]
    reject-geometric   [low <= exp(mean log rho) <= high]
    reject-k3          [low <= mean (rho - 1 - log rho) <= high], which estimates KL(mu || pi_old) and is
                       never negative (k3 of J. Schulman, "Approximating KL divergence", 2020)
    kpop               [low <= max(KL(p || q), KL(q || p)) <= high], p and q the token's pi_old and mu against
                       all other tokens, see `divergences` (KPop, arXiv 2606.15079, page 19)
    reject-binary-kl   [low <= mean KL(q || p) <= high], which is at most KL(mu || pi_old)
    opsm               [A >= 0 or mean log(mu / pi) <= high], which estimates KL(mu || pi) (off-policy
                       sequence masking, DeepSeek-V3.2, arXiv 2512.02556, section 3.1); A is the token's own

opsm alone is not of rho. DeepSeek's "pi_old" is what the engine returns, so mismatch and staleness count. Its
threshold is not published: slime has 1e-4, TRL advises 0.5. Ours is that of reject-k3, which estimates the
same divergence of pi_old. KPop's report has no phi either: AReaL has 2, prime-rl 0.1. Its mask has no weight
rho, unlike IcePop's.

The weight carries no gradient, and the loss's denominator does not change: a rejected token still counts in
it, as in IcePop's own objective. So rejection never raises the weight of the other tokens. A batch that is
rejected in full gives a step of 0, not 0 / 0. If rounding crosses a bound at one layout, it moves one term,
not all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.algorithms.divergences import binary_kl
from megatron_vespo.algorithms.losses.inputs import LossInputs
from megatron_vespo.algorithms.vespo import DECOUPLED, LogRatio, RatioDenominator, segment_sum

# exp(20) is 4.9e8: far above any ratio that should be trained on, and far from overflow
MAX_LOG_RHO = 20.0


@dataclass(frozen=True)
class Mismatch:
    """rho of one micro-batch, without gradient. T fields are float64, 0 on untrained tokens."""

    log_rho_T: Tensor  # log pi_old - log mu
    log_mu_T: Tensor
    log_product_S: Tensor  # float32, the sum of log rho over the whole response
    log_pi_over_mu_S: Tensor  # float32, the sum of log pi - log mu over the whole response
    inputs: LossInputs
    group: dist.ProcessGroup | None  # context parallelism: its ranks hold parts of the same sequences

    @classmethod
    def of(
        cls,
        old_log_probs_T: Tensor,
        behavior_log_probs_T: Tensor,
        log_ratio: LogRatio,
        inputs: LossInputs,
        group: dist.ProcessGroup | None = None,
    ) -> Mismatch:
        """Entries of untrained tokens may be NaN."""
        untrained_T = inputs.loss_mask_T == 0
        log_rho_T = old_log_probs_T.detach().double() - behavior_log_probs_T.double()
        return cls(
            log_rho_T.masked_fill(untrained_T, 0.0),
            behavior_log_probs_T.double().masked_fill(untrained_T, 0.0),
            log_ratio.log_mismatch_S,
            log_ratio.log_pi_over_mu_S,
            inputs,
            group,
        )

    def token_means(self, values_T: Tensor) -> Tensor:
        """The mean over each response's trained tokens, [S] float64; `values_T` is 0 on the others."""
        inputs = self.inputs
        sum_S = segment_sum(values_T, inputs.sequence_ids_T, len(inputs.advantages_S), self.group)
        return sum_S.double() / inputs.lengths_S


def no_correction(mismatch: Mismatch, low: float, high: float) -> Tensor:
    return torch.ones_like(mismatch.log_rho_T)


def importance(mismatch: Mismatch, low: float, high: float) -> Tensor:
    """rho_t, at most exp(20)."""
    return mismatch.log_rho_T.clamp(max=MAX_LOG_RHO).exp()


def tis(mismatch: Mismatch, low: float, high: float) -> Tensor:
    return mismatch.log_rho_T.clamp(_log(low), _log(high)).exp()


def sequence_tis(mismatch: Mismatch, low: float, high: float) -> Tensor:
    weight_S = mismatch.log_product_S.double().clamp(_log(low), _log(high)).exp()
    return mismatch.inputs.per_token(weight_S)


def icepop(mismatch: Mismatch, low: float, high: float) -> Tensor:
    return importance(mismatch, low, high) * token_mask(mismatch, low, high)


def token_mask(mismatch: Mismatch, low: float, high: float) -> Tensor:
    return _within(mismatch.log_rho_T, low, high)


def reject_product(mismatch: Mismatch, low: float, high: float) -> Tensor:
    return mismatch.inputs.per_token(_within(mismatch.log_product_S.double(), low, high))


def reject_geometric(mismatch: Mismatch, low: float, high: float) -> Tensor:
    mean_S = mismatch.log_product_S.double() / mismatch.inputs.lengths_S
    return mismatch.inputs.per_token(_within(mean_S, low, high))


def reject_k3(mismatch: Mismatch, low: float, high: float) -> Tensor:
    # expm1, as rho - 1 loses its digits if rho is close to 1
    log_rho_T = mismatch.log_rho_T.clamp(max=MAX_LOG_RHO)
    k3_T = (log_rho_T.expm1() - log_rho_T).clamp(min=0.0)
    return mismatch.inputs.per_token(_between(mismatch.token_means(k3_T), low, high))


def kpop(mismatch: Mismatch, low: float, high: float) -> Tensor:
    log_old_T, log_mu_T = mismatch.log_mu_T + mismatch.log_rho_T, mismatch.log_mu_T
    largest_T = torch.maximum(binary_kl(log_old_T, log_mu_T), binary_kl(log_mu_T, log_old_T))
    return _between(largest_T, low, high)


def reject_binary_kl(mismatch: Mismatch, low: float, high: float) -> Tensor:
    # of untrained tokens, where both log-probs are 0, it is 0
    kl_T = binary_kl(mismatch.log_mu_T, mismatch.log_mu_T + mismatch.log_rho_T)
    return mismatch.inputs.per_token(_between(mismatch.token_means(kl_T), low, high))


def opsm(mismatch: Mismatch, low: float, high: float) -> Tensor:
    inputs = mismatch.inputs
    kl_S = -mismatch.log_pi_over_mu_S.double() / inputs.lengths_S

    def kept_S(advantages_S: Tensor) -> Tensor:
        # one-sided: where A >= 0, and where pi is above mu, it counts as 0, but NaN stays
        one_sided_S = torch.where(advantages_S < 0, kl_S, kl_S.clamp(max=0.0)).clamp(min=0.0)
        return _between(one_sided_S, low, high)

    return inputs.by_sign(kept_S)


def _within(log_ratio: Tensor, low: float, high: float) -> Tensor:
    return _between(log_ratio, _log(low), _log(high))


def _between(values: Tensor, low: float, high: float) -> Tensor:
    """1 inside the bounds, 0 outside, NaN where the value is NaN: a weight of 0 would hide it."""
    return ((values >= low) & (values <= high)).double().masked_fill(values.isnan(), torch.nan)


def _log(bound: float) -> float:
    return math.log(bound) if bound > 0 else -math.inf


@dataclass(frozen=True)
class BoundCorrection:
    """A correction with its bounds. Two with the same name and bounds are equal in any process."""

    function: Callable[[Mismatch, float, float], Tensor]
    low: float
    high: float

    def __call__(self, mismatch: Mismatch) -> Tensor:
        """The weight [T], float64; 0 on untrained tokens."""
        weight_T = self.function(mismatch, self.low, self.high)
        return weight_T.detach().masked_fill(mismatch.inputs.loss_mask_T == 0, 0.0)


@dataclass(frozen=True)
class Correction:
    """A correction and its default bounds."""

    function: Callable[[Mismatch, float, float], Tensor]
    bounds: tuple[float, float] | None = None  # (low, high); None: it has no bounds
    kind: Literal["weight", "mask"] = "mask"  # a mask multiplies only by 1 or 0
    agreement: float = 1.0  # the value compared with the bounds if engine and trainer agree
    of_rho: bool = True  # needs pi_old; else it is of pi / mu

    def bind(self, bounds: tuple[float, float] | None) -> BoundCorrection:
        """The correction with `bounds`; None uses its defaults."""
        low, high = bounds or self.bounds or (0.0, math.inf)
        return BoundCorrection(self.function, low, high)


CORRECTIONS: dict[str, Correction] = {
    "none": Correction(no_correction),
    "importance": Correction(importance, kind="weight"),
    "tis": Correction(tis, (0.0, 2.0), kind="weight"),
    "sequence-tis": Correction(sequence_tis, (0.0, 2.0), kind="weight"),
    "icepop": Correction(icepop, (0.5, 5.0), kind="weight"),
    "token-mask": Correction(token_mask, (0.5, 5.0)),
    "reject-product": Correction(reject_product, (0.0, 2.0)),
    "reject-geometric": Correction(reject_geometric, (0.999, 1.002)),
    "reject-k3": Correction(reject_k3, (0.0, 0.01), agreement=0.0),
    "kpop": Correction(kpop, (0.0, 0.1), agreement=0.0),
    "reject-binary-kl": Correction(reject_binary_kl, (0.0, 0.01), agreement=0.0),
    "opsm": Correction(opsm, (0.0, 0.01), agreement=0.0, of_rho=False),
}
MASKS = tuple(
    name for name, correction in CORRECTIONS.items() if correction.bounds and correction.kind == "mask"
)


@dataclass(frozen=True)
class Forbidden:
    """Combinations that are refused, and why. A field that is None matches everything."""

    reason: str
    denominators: tuple[RatioDenominator, ...] | None = None
    kind: str | None = None
    name: str | None = None
    token_ratio: bool | None = None  # the loss's `Method.token_ratio`
    of_rho: bool | None = None

    def matches(self, name: str, denominator: str, token_ratio: bool) -> bool:
        if self.denominators is not None and denominator not in self.denominators:
            return False
        correction = CORRECTIONS[name]
        asked = (correction.kind, name, token_ratio, correction.of_rho)
        rule = (self.kind, self.name, self.token_ratio, self.of_rho)
        return all(mine is None or mine == theirs for mine, theirs in zip(rule, asked, strict=True))


# The first match says why; a combination without a match is allowed. Token weights and masks are allowed on
# losses of a whole response (vespo, gspo, ...), as each is a sum of one term per token. A weight corrects the
# token's own part of the mismatch, as in token losses. A dropped token loses its gradient but stays in W.
FORBIDDEN = (
    Forbidden(
        "rollout compares with mu: all of rho is in the ratio and would be counted twice, and pi_old "
        "is not computed; use recomputed with the correction, or rollout alone or with opsm",
        denominators=("rollout",),
        of_rho=True,
    ),
    Forbidden(
        "decoupled has the truncated rho in W already, a weight would count it twice; use recomputed with "
        f"the weight, or decoupled with a mask ({', '.join(MASKS)})",
        denominators=DECOUPLED,
        kind="weight",
    ),
    Forbidden(
        "importance completes a token's ratio, rho r = pi / mu, and this loss has no token ratios; use tis, "
        "sequence-tis or icepop",
        name="importance",
        token_ratio=False,
    ),
)


def why_forbidden(name: str, denominator: str, token_ratio: bool) -> str | None:
    """Why correction `name` may not be combined with the denominator and the loss; None if it may."""
    if name == "none":
        return None
    return next((rule.reason for rule in FORBIDDEN if rule.matches(name, denominator, token_ratio)), None)
