"""Combines the loss's outputs of all micro-batches and ranks into the result of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vespo.algorithms.losses.output import NUM_SUMS, SEQUENCE_FIELDS, LossOutput, LossSums
from megatron_vespo.algorithms.token_sums import TokenSums
from megatron_vespo.trainer.initialize import device
from megatron_vespo.trainer.mini_batch import MiniBatch, Packer


@dataclass
class StepResult:
    """One optimizer step, identical on every rank.

    An array without a shape is float32 [num_samples] in sample order, NaN where it needs a pi_old that was
    not computed.
    """

    loss: float  # of the whole mini-batch, as --loss-aggregation says
    loss_terms: float  # the same with every term's absolute value: the size of what cancels in the loss
    grad_norm: float
    learning_rate: float
    num_tokens: int
    zero_weight_share: float  # share of tokens whose weight the loss itself set to 0: clipped or masked
    entropy: float  # nats per loss token, of the policy before the step at the sampling temperature
    log_w: np.ndarray
    weight: np.ndarray  # mean over the tokens of what multiplies A grad log pi, phi(W) for VESPO
    correction: np.ndarray  # mean over the tokens of --mismatch-correction's weight, a factor of `weight`
    rejected: np.ndarray  # share of tokens whose correction is 0
    log_mismatch_in_w: np.ndarray  # the part of log(pi_old / mu) that is in log W
    log_mismatch: np.ndarray  # log(pi_old / mu) of the response
    # largest |log pi_old - log mu| of a token; |log pi - log mu| where pi_old is unknown
    log_mismatch_abs_max: np.ndarray
    ratio_sums: TokenSums[float]  # of log pi - log of the ratio's denominator
    log_mismatch_sums: TokenSums[float]  # of log pi_old - log mu; of log pi - log mu where pi_old is unknown
    gradient_norms: np.ndarray  # float64 [len(GRADIENT_GROUPS)]
    clip_bounds: np.ndarray  # [2] float64, of the ratio, as chosen by the loss; 0 if it chooses none
    padding_share: float
    imbalance: float
    kernel_c2: np.ndarray  # [2] float64, A > 0 then A < 0, used in this step; NaN without --vespo-budget
    expected_w: np.ndarray  # [2] float64, E_Q[W] under it; NaN where there are too few samples


@dataclass(frozen=True)
class ReducedLoss:
    """The loss's outputs of one optimizer step, identical on every rank."""

    columns: dict[str, np.ndarray]  # float32 [num_samples] each, by their names in StepResult
    sums: LossSums[float]
    clip_bounds: np.ndarray  # [2] float64; 0 if the loss chooses none


def reduced(
    outputs: Sequence[LossOutput],
    mini_batch: MiniBatch,
    packer: Packer,
    groups: ProcessGroupCollection,
    bounds_are_chosen: bool,
) -> ReducedLoss:
    """A collective of all ranks. `outputs` has one entry per micro-batch, none before the last stage."""
    # context-parallel ranks share a sequence: its largest difference may be on any of them
    for output in outputs:
        dist.all_reduce(output.log_mismatch_abs_max_S, dist.ReduceOp.MAX, group=groups.cp)
    parts = [output.per_sequence() for output in outputs]
    rows = packer.gather_sequences(mini_batch, parts, len(SEQUENCE_FIELDS))
    sums = torch.zeros(NUM_SUMS + 2, dtype=torch.float64, device=device())
    for output in outputs:
        for i, value in enumerate(output.sums.flat()):
            sums[i] += value
    if bounds_are_chosen and outputs and groups.dp_cp.rank() == 0:
        sums[NUM_SUMS:] = torch.tensor(outputs[0].clip_bounds or (0.0, 0.0), dtype=torch.float64)
    packer.share(sums, groups.cp)
    values = sums.tolist()
    return ReducedLoss(
        columns=dict(zip(SEQUENCE_FIELDS, rows, strict=True)),
        sums=LossSums.of_flat(values[:NUM_SUMS]),
        clip_bounds=np.array(values[NUM_SUMS:]),
    )
