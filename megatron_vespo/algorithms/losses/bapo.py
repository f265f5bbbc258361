"""BAPO (arXiv 2510.18927): PPO's objective with bounds that adapt to the optimizer step.

Shape suffixes: T packed tokens of a micro-batch on this rank, H upper bounds, L lower bounds.

    while P / (P + N) < target and c_low can still move:
        raise c_high by a step if it can still move, else c_low
    P = sum over A > 0 of min(r, c_high) A,    N = sum over A < 0 of max(r, c_low) |A|

That is the paper's Algorithm 1 with its values: c_low from a- = 0.6 to b- = 0.9 by delta2 = 0.02, c_high from
a+ = 1.2 to b+ = 3.0 by delta1 = 0.05, target rho0 = 0.4. One thing differs: its eq. 8 weighs every token of P
and N by pi_rollout(y_t). Nothing here does, nor in the authors' repository (WooooDyy/BAPO, recipe/bapo). That
has other steps, compares P / N with its target and raises c_low first. Its loss is also capped where A < 0
and r > 3, which is `dual_clip` here: it bounds the loss, not P and N.

Raising c_low takes gradient from tokens with A < 0, but N is of the objective, where they then weigh more:
where c_high cannot reach the target, c_low goes all the way. So does the repository's code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vespo.algorithms.losses.clipped import MAX_LOG_RATIO
from megatron_vespo.algorithms.losses.inputs import LossInputs, Reduce

# bounds of the ratio: first, last, step
LOW, HIGH = (0.6, 0.9, 0.02), (1.2, 3.0, 0.05)


def bounds(
    batch: Sequence[LossInputs], reduce: Reduce, target: float, dual_clip: float = math.inf
) -> dict[str, float]:
    """The step's options of `clipped.grpo`: low and high of 1 - low, 1 + high, and `dual_clip` as it is.

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
    return {"low": 1.0 - lows[low], "high": highs[high] - 1.0, "dual_clip": dual_clip}


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
    advantages_T = inputs.advantages_T.double() * sign
    chosen_T = (inputs.loss_mask_T > 0) & (advantages_T > 0)
    return inputs.log_ratio_T[chosen_T].double().clamp(max=MAX_LOG_RATIO).exp(), advantages_T[chosen_T]
