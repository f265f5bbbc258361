"""From one loss term a token to one number an optimizer step, the same however the step is cut up.

Each aggregation is a sum of weighted terms over a count, and both add up over micro-batches and ranks:

    token-mean                 sum of all terms / trained tokens of the optimizer step
    sequence-mean-token-mean   sum over responses of the mean of their terms / responses
    sequence-mean-token-sum    sum of all terms / responses
    constant                   sum of all terms / (responses x the longest response allowed)
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_vespo.algorithms.losses.inputs import LossInputs

Aggregation = Literal["token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "constant"]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


def weighted_sum(loss_T: Tensor, inputs: LossInputs, aggregation: Aggregation, longest: int) -> Tensor:
    """The numerator's part of this micro-batch and rank; terms of untrained tokens may be NaN."""
    if aggregation == "sequence-mean-token-mean":
        loss_T = loss_T / inputs.per_token(inputs.lengths_S)
    elif aggregation == "constant":
        loss_T = loss_T / longest
    return loss_T.masked_fill(inputs.loss_mask_T == 0, 0.0).sum()


def count(inputs: LossInputs, aggregation: Aggregation, first_context_rank: bool) -> Tensor:
    """The denominator's part, int64: every trained token, or every response, counted on one rank only."""
    if aggregation == "token-mean":
        return (inputs.loss_mask_T > 0).sum()
    num_sequences = len(inputs.advantages_S) if first_context_rank else 0
    # filled on the device: a copy from the host would wait for it, every micro-batch
    return torch.full((), num_sequences, device=inputs.loss_mask_T.device)
