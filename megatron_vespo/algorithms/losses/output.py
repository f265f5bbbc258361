"""What the policy loss hands back, and its sums over an optimizer step.

Shape suffixes: T packed tokens of a micro-batch on this rank, S its sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vespo.algorithms.token_sums import TokenSums


class LossSums[Value](NamedTuple):
    """Sums over trained tokens that add up over micro-batches and ranks.

    Each is a scalar: a tensor of one rank's micro-batch where they are made, a float of the whole optimizer
    step where they are read.
    """

    loss: Value  # numerator of the aggregated loss
    loss_terms: Value  # the same with every term's absolute value
    kl_loss: Value  # the part of `loss` that is the term of --kl-loss-coef
    loss_count: Value  # denominator of these three
    entropy: Value  # nats
    zero_weights: Value  # tokens to which the loss itself gives no weight: clipped or masked
    num_tokens: Value
    ratio: TokenSums[Value]  # of log pi - log of the ratio's denominator
    log_mismatch: TokenSums[Value]  # of log pi_old - log mu; of log pi - log mu where pi_old is unknown
    reference: TokenSums[Value]  # of log ref - log pi; NaN without a reference policy

    def flat(self) -> list[Value]:
        return [*self[:-3], *self.ratio, *self.log_mismatch, *self.reference]

    @classmethod
    def of_flat(cls, values: Sequence[Value]) -> LossSums[Value]:
        """The inverse of `flat`."""
        size, first = len(TokenSums._fields), len(values) - 3 * len(TokenSums._fields)
        loss, loss_terms, kl_loss, loss_count, entropy, zero_weights, num_tokens = values[:first]
        sums = [TokenSums(*values[i : i + size]) for i in range(first, len(values), size)]
        return cls(loss, loss_terms, kl_loss, loss_count, entropy, zero_weights, num_tokens, *sums)


NUM_SUMS = len(LossSums._fields) - 3 + 3 * len(TokenSums._fields)


@dataclass(frozen=True)
class LossOutput:
    """Of one micro-batch on one rank of the last pipeline stage, without gradient.

    Fields with the suffix S are [S] float32, of the whole sequence on every context-parallel rank.
    """

    log_w_S: Tensor
    weight_S: Tensor  # what multiplies A grad log pi, correction included: its mean over the tokens
    correction_S: Tensor  # weight by the correction of the engine mismatch, its mean over the tokens
    rejected_S: Tensor  # share of the tokens which that correction weighs by 0
    log_mismatch_in_w_S: Tensor  # the part of log(pi_old / mu) in log W; NaN where pi_old is unknown
    log_mismatch_S: Tensor  # log(pi_old / mu) of the response; NaN where pi_old is unknown
    # largest |log pi_old - log mu| of this rank's tokens; log pi's where pi_old is unknown
    log_mismatch_abs_max_S: Tensor
    sums: LossSums[Tensor]  # this rank's
    clip_bounds: tuple[float, float] | None  # of the ratio; None for a loss that has none
    log_probs: Tensor | None = None  # float32 [num_loss_tokens], log pi of this rank's; None: not recorded

    def per_sequence(self) -> Tensor:
        """The fields with the suffix S as rows [SEQUENCE_FIELDS, S]."""
        return torch.stack([getattr(self, f"{name}_S") for name in SEQUENCE_FIELDS])


SEQUENCE_FIELDS = (
    "log_w", "weight", "correction", "rejected", "log_mismatch_in_w", "log_mismatch", "log_mismatch_abs_max",
)  # fmt: skip
MAXIMUM = "log_mismatch_abs_max"  # the field that context-parallel ranks have of their own tokens only
