"""What every policy loss gets and gives.

Shape suffixes: T packed tokens of a micro-batch on this rank, S its sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# the sum of a tensor over all ranks that hold parts of the optimizer step; they all get the same
Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch. Entries of a T field where `loss_mask_T` is 0 mean nothing, they may be NaN."""

    log_probs_T: Tensor  # log pi, with gradient
    log_ratio_T: Tensor  # log pi - log of the ratio's denominator, without gradient
    log_w_S: Tensor  # float32, its sum over the whole response, without gradient
    advantages_S: Tensor  # float32
    num_tokens_S: Tensor  # float32, trained tokens of the whole response, on all context-parallel ranks
    loss_mask_T: Tensor  # 1 on trained tokens
    sequence_ids_T: Tensor  # int64, ascending

    def per_token(self, values_S: Tensor) -> Tensor:
        """Each token's own sequence's value, [T]."""
        return values_S.index_select(0, self.sequence_ids_T)

    @property
    def lengths_S(self) -> Tensor:
        """`num_tokens_S` to divide by: a response without trained tokens has sums of 0, not 0 / 0."""
        return self.num_tokens_S.clamp(min=1.0)

    def attached(self, values_T: Tensor) -> Tensor:
        """The values, with the gradient of log pi; 0 without gradient where no token is trained."""
        zero_T = self.log_probs_T - self.log_probs_T.detach()
        return (values_T.detach() + zero_T).masked_fill(self.loss_mask_T == 0, 0.0)


@dataclass(frozen=True)
class TokenLoss:
    """One term a token; the caller masks and aggregates them."""

    loss_T: Tensor  # with gradient
    weight_T: Tensor  # what multiplies A grad log pi in -grad loss_T, without gradient
