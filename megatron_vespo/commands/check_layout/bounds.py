"""Bounds for the differences between two correct layouts: rounding of a given model on given samples.

With u the unit roundoff (2^-24 in fp32, 2^-9 in bf16), L layers, S sequences, and of log-probs p

    q = u sqrt(L) max over sequences of sqrt(sum over tokens of (1 + |p|)^2)

    log W                       8 q
    loss                        4 q / sqrt(S)
    grad norm, parameter norm   2 q
    experts                     5 u sqrt(L)

Layouts add the same numbers in another order, or split a matrix product elsewhere. Each layer adds an error
of about u, relative to the residual stream. These errors are independent, so their sum grows with sqrt(L).
A log-prob is a difference of logits; its error is u times their size. Samples show |p| of that size; the 1
stands for tokens that are nearly certain. log W is a sum over tokens, whose errors are independent as well:
their squares add up, to sqrt(T) for T equal tokens.

The relative error of a sequence's weight phi(W) is |c1 - c2 W| times the error of log W: the same as that
error at W = 1. In the loss the errors of S sequences average out. In a gradient few sequences may dominate,
with large weights and improbable tokens. A token gets other experts if two of the router's scores differ by
less than their error.

The factors are measured. Largest differences of correct layouts of up to 8 ranks, with bounds in brackets:

                                     log W              loss               grad norm          parameter norm
    random, 4 layers, T <= 40        2.6e-6 (3.6e-5)    3.0e-7 (3.1e-6)    3.4e-7 (8.9e-6)    1.4e-6 (8.9e-6)
    trained, 4 layers, T <= 40       3.4e-5 (8.0e-5)    4.2e-6 (7.1e-6)    1.1e-5 (2.0e-5)    1.1e-5 (2.0e-5)
    random, 8 layers, T <= 430       6.4e-6 (1.6e-4)    2.3e-6 (1.7e-5)    2.0e-6 (4.1e-5)    2.0e-5 (4.1e-5)
    the first in bf16                0.12   (1.2)       7.4e-3 (0.10)      8.5e-3 (0.29)      7.2e-2 (0.29)
    the second in bf16               1.7    (2.6)       6.8e-2 (0.23)      0.26   (0.65)      0.26   (0.65)

The trained model, from examples/tiny, finds random tokens improbable: |p| is 12 in root mean square, and the
logits behind it are larger still. If context or data parallelism is broken on purpose, in one line, a layout
differs in fp32 by 6e-3 or more in log W, loss or gradient norm: a hundred times the bound.

All this holds for the first optimizer step. Adam divides a gradient by its own size, so small elements carry
their rounding into the weights in full. After three steps at a learning rate of 1e-5, correct layouts of the
trained model differ by 2e-4 to 7e-4 in log W. The user must give bounds for later steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from megatron_vespo.observability.layout_report import Differences

UNIT_ROUNDOFF_FP32, UNIT_ROUNDOFF_BF16 = 2.0**-24, 2.0**-9
LOG_W, LOSS, GRADIENTS = 8.0, 4.0, 2.0
# limit of any relative difference: a gradient that is missing or twice as large is wrong despite rounding
MOST = 0.5
NEAR_TIES = 5.0  # density at 0 of the differences between the router's scores


def rounding_bounds(log_probs: Sequence[np.ndarray], num_layers: int, bf16: bool) -> Differences:
    """The bounds for one model and batch; `log_probs` has a floating array [T] for each sequence."""
    step = (UNIT_ROUNDOFF_BF16 if bf16 else UNIT_ROUNDOFF_FP32) * math.sqrt(num_layers)
    sizes = [np.square(1.0 + np.abs(values.astype(np.float64))).sum() for values in log_probs]
    error = step * math.sqrt(max(sizes))
    return Differences(
        log_w=LOG_W * error,
        loss=min(LOSS * error / math.sqrt(len(log_probs)), MOST),
        grad_norm=min(GRADIENTS * error, MOST),
        parameter_norm=min(GRADIENTS * error, MOST),
        experts=NEAR_TIES * step,
    )
