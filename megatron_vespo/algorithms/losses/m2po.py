"""M2PO (arXiv 2510.01161): - M r A, M = 0 where the ratio is too far off for the optimizer step as a whole.

Shape suffix: T packed tokens of a micro-batch on this rank.

Only trust region tokens can be masked, those on which PPO's clip could act: A > 0 and r > 1, or A < 0 and
r < 1. Of them the largest (log r)^2 go, equal ones together, until the mean of those left is at most
`target`, 0.04 in the paper. Masked tokens still count in a mean over tokens. The authors' repository takes
the mean of the same tokens, but clips instead of masking, and never closer than to 0.7 and 1.5: not here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vespo.algorithms.losses.clipped import unclipped
from megatron_vespo.algorithms.losses.inputs import LossInputs, Reduce, TokenLoss

# a float64 that is not negative orders like its bits: they are searched byte by byte, the highest first
SHIFTS, VALUES = range(56, -1, -8), 256


def m2po(inputs: LossInputs, bound: float) -> TokenLoss:
    """- r A, and 0 for trust region tokens whose (log r)^2 is `bound` or more."""
    term = unclipped(inputs, inputs.log_ratio_T)
    kept_T = ~(_in_trust_region(inputs) & (_squares(inputs) >= bound))
    # multiplied, not filled: a NaN under the mask must stay visible
    return TokenLoss(term.loss_T * kept_T, term.weight_T * kept_T)


def smallest_masked(batch: Sequence[LossInputs], reduce: Reduce, target: float) -> dict[str, float]:
    """The first (log r)^2 with which the mean, taken from the smallest up, is above `target`; inf for none.

    Exact, and without a sort over ranks: eight reductions of 256 counts and sums, one a byte of the float64.
    """
    squares_T = torch.cat([_squares(inputs)[_in_trust_region(inputs)] for inputs in batch])
    bits_T, prefix = squares_T.view(torch.int64), 0
    below = squares_T.new_zeros(2, 1)  # sum and number of the values smaller than all with this prefix
    for shift in SHIFTS:
        here_T = bits_T >> shift >> 8 == prefix
        byte_T, values_T = (bits_T[here_T] >> shift) & 0xFF, squares_T[here_T]
        table = squares_T.new_zeros(2, VALUES)
        table.index_add_(1, byte_T, torch.stack([values_T, torch.ones_like(values_T)]))
        through = below + reduce(table).cumsum(1)
        num_fitting = int((through[0] <= target * through[1]).sum())
        if num_fitting == VALUES and shift == SHIFTS[0]:
            return {"bound": torch.inf}
        byte = min(num_fitting, VALUES - 1)  # a sum in another order may round to just fitting
        below = through[:, byte - 1 : byte] if byte else below
        prefix = prefix << 8 | byte
    return {"bound": torch.tensor(prefix).view(torch.float64).item()}


def _squares(inputs: LossInputs) -> Tensor:
    return inputs.log_ratio_T.double().square()


def _in_trust_region(inputs: LossInputs) -> Tensor:
    """Where the loss pushes r further away from 1; never where it is NaN."""
    pushed_T = inputs.advantages_T * inputs.log_ratio_T > 0
    return pushed_T & (inputs.loss_mask_T > 0)
