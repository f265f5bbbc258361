"""BAPO (arXiv 2510.18927): PPO's objective with bounds that adapt to the optimizer step.

Shape suffixes: T packed tokens of a micro-batch on this rank, H upper bounds, L lower bounds.

    while P / (P + N) < target and c_low can still move:
        raise c_high by a step if it can still move, else c_low
    P = sum over A > 0 of min(r, c_high) A,    N = sum over A < 0 of max(r, c_low) |A|

That follows the paper's algorithm, P and N the parts of its clipped objective. From where the numbers are:
the ranges [0.6, 0.9] and [1.2, 3.0] are those of its authors' repository, which has a target of 0.5, other
steps, and raises c_low first; target 0.4, the steps 0.02 and 0.05 and c_high first are as others quote the
paper, and have not been compared with its text.

Raising c_low takes gradient from tokens with A < 0, but N is of the objective, where they then weigh more:
where c_high cannot reach the target, c_low goes all the way. So does the repository's code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vespo.algorithms.losses.clipped import MAX_LOG_RATIO
from megatron_vespo.algorithms.losses.inputs import LossInputs, Reduce

# bounds of the ratio: first, last, step
LOW, HIGH = (0.6, 0.9, 0.02), (1.2, 3.0, 0.05)


def bounds(batch: Sequence[LossInputs], reduce: Reduce, target: float) -> dict[str, float]:
    """The step's clip range as `clipped.grpo` takes it: low and high of 1 - low, 1 + high.

    P and N are over all trained tokens alike, whatever --loss-aggregation makes of them. The sums of all
    candidates travel in one reduction.
    """
    lows, highs = _candidates(*LOW), _candidates(*HIGH)
    parts = [torch.cat([_positive_sums(i, highs), _negative_sums(i, lows)]) for i in batch]
    positive_H, negative_L = reduce(torch.stack(parts).sum(0)).cpu().split([len(highs), len(lows)])
    high = low = 0
    # not as a quotient: without any advantage it is 0 / 0
    while positive_H[high] < target * (positive_H[high] + negative_L[low]) and low < len(lows) - 1:
        if high < len(highs) - 1:
            high += 1
        else:
            low += 1
    return {"low": 1.0 - lows[low], "high": highs[high] - 1.0}


def _candidates(first: float, last: float, step: float) -> list[float]:
    return [first + i * step for i in range(round((last - first) / step) + 1)]


def _positive_sums(inputs: LossInputs, highs: list[float]) -> Tensor:
    """P under every upper bound, [H] float64."""
    ratio_T, size_T = _ratios_and_sizes(inputs, 1)
    return torch.stack([(ratio_T.clamp(max=high) * size_T).sum() for high in highs])


def _negative_sums(inputs: LossInputs, lows: list[float]) -> Tensor:
    """N under every lower bound, [L] float64."""
    ratio_T, size_T = _ratios_and_sizes(inputs, -1)
    return torch.stack([(ratio_T.clamp(min=low) * size_T).sum() for low in lows])


def _ratios_and_sizes(inputs: LossInputs, sign: int) -> tuple[Tensor, Tensor]:
    """r and |A| of the trained tokens whose advantage has this sign, float64."""
    advantages_T = inputs.per_token(inputs.advantages_S).double() * sign
    chosen_T = (inputs.loss_mask_T > 0) & (advantages_T > 0)
    return inputs.log_ratio_T[chosen_T].double().clamp(max=MAX_LOG_RATIO).exp(), advantages_T[chosen_T]
