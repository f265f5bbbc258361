"""From one loss term per token to one number per optimizer step, the same however the step is cut up.

Each aggregation is a sum of weighted terms over a count, and both add up over micro-batches and ranks:

    token-mean                 sum of all terms / trained tokens of the optimizer step
    sequence-mean-token-mean   sum over responses of the mean of their terms / responses
    sequence-mean-token-sum    sum of all terms / responses
    constant                   sum of all terms / (responses x the longest response allowed)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vespo.algorithms.losses.inputs import LossInputs, TokenLoss

if TYPE_CHECKING:
    from megatron_vespo.algorithms.losses.table import PolicyLoss

Aggregation = Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "constant"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


def weighted_sum(loss_T: Tensor, inputs: LossInputs, aggregation: Aggregation, longest: int) -> Tensor:
    """The numerator's part of this micro-batch and rank; terms of untrained tokens may be NaN."""
    return inputs.masked(_scaled(loss_T, inputs, aggregation, longest)).sum()


def _scaled(values_T: Tensor, inputs: LossInputs, aggregation: Aggregation, longest: int) -> Tensor:
    """Terms, or their gradients, as they stand in the numerator."""
    if aggregation == "sequence-mean-token-mean":
        return values_T / inputs.per_token(inputs.lengths_S)
    return values_T / longest if aggregation == "constant" else values_T


def summed_loss(
    loss: PolicyLoss,
    inputs: LossInputs,
    aggregation: Aggregation,
    longest: int,
    correction_T: Tensor | None = None,
    terms: list[TokenLoss] | None = None,
) -> Tensor:
    """`weighted_sum` of the loss, a scalar with the gradient of log pi; computed slice by slice.

    `correction_T` [T] multiplies the terms and is 0 on untrained tokens. `terms` collects the slices' terms,
    not corrected. The gradient is known without autograd, see `TokenLoss`: the backward pass only scales it.
    """
    return _Summed.apply(
        inputs.log_probs_T, lambda: _sum_and_gradient(loss, inputs, aggregation, longest, correction_T, terms)
    )


class _Summed(torch.autograd.Function):
    """A scalar whose gradient was computed with it."""

    @staticmethod
    def forward(ctx, log_probs_T, sum_and_gradient):
        total, ctx.gradient_T = sum_and_gradient()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # scaled in place, as a pack may be long; a second backward pass fails, as it does in autograd
        gradient_T, ctx.gradient_T = ctx.gradient_T, None
        assert gradient_T is not None, "the gradient of a summed loss is taken once"
        return gradient_T.mul_(grad), None


def _sum_and_gradient(
    loss: PolicyLoss,
    inputs: LossInputs,
    aggregation: Aggregation,
    longest: int,
    correction_T: Tensor | None,
    terms: list[TokenLoss] | None,
) -> tuple[Tensor, Tensor]:
    gradient_T = torch.empty_like(inputs.log_probs_T)
    totals = []
    for tokens, part in inputs.slices():
        term = loss(part)
        by_log_prob_T = term.gradient_T
        if by_log_prob_T is None:
            by_log_prob_T = part.masked(-(term.weight_T * part.advantages_T))
        scale_T = None if correction_T is None else correction_T[tokens]
        loss_T = term.loss_T if scale_T is None else term.loss_T * scale_T
        by_log_prob_T = _scaled(by_log_prob_T, part, aggregation, longest)
        gradient_T[tokens] = by_log_prob_T if scale_T is None else by_log_prob_T * scale_T
        totals.append(weighted_sum(loss_T, part, aggregation, longest))
        if terms is not None:
            terms.append(term)
    return sum(totals[1:], totals[0]), gradient_T


def count(inputs: LossInputs, aggregation: Aggregation, first_context_rank: bool) -> Tensor:
    """The denominator's part, int64: every trained token, or every response, counted on one rank only."""
    if aggregation == "token-mean":
        return (inputs.loss_mask_T > 0).sum()
    num_sequences = len(inputs.advantages_S) if first_context_rank else 0
    # filled on the device: a copy from the host would wait for it, every micro-batch
    return torch.full((), num_sequences, device=inputs.loss_mask_T.device)
