"""Combines the loss's outputs of all micro-batches and ranks into the result of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vespo.algorithms.losses.output import MAXIMUM, NUM_SUMS, SEQUENCE_FIELDS, LossOutput, LossSums
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
    kl_loss: float  # the part of `loss` that is the term of --kl-loss-coef
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
    reference_sums: TokenSums[float]  # of log ref - log pi; NaN without a reference policy
    gradient_norms: np.ndarray  # float64 [len(GRADIENT_GROUPS)]
    clip_bounds: np.ndarray  # [2] float64, of the ratio, as chosen by the loss; 0 if it chooses none
    padding_share: float
    imbalance: float
    kernel_c2: np.ndarray  # [2] float64, A > 0 then A < 0, used in this step; NaN without --vespo-budget
    expected_w: np.ndarray  # [2] float64, E_Q[W] under it; NaN where there are too few samples


@dataclass(frozen=True)
class Reduced:
    """What an optimizer step measured, identical on every rank, in host memory."""

    columns: dict[str, np.ndarray]  # float32 [num_samples] each, by their names in StepResult
    sums: LossSums[float]
    clip_bounds: np.ndarray  # [2] float64; 0 if the loss chooses none
    gradient_norms: np.ndarray  # float64 [len(GRADIENT_GROUPS)]


def reduced(
    outputs: Sequence[LossOutput],
    mini_batch: MiniBatch,
    packer: Packer,
    groups: ProcessGroupCollection,
    bounds_are_chosen: bool,
    gradient_norms: Tensor,
) -> Reduced:
    """A collective of all ranks. `outputs` has one entry per micro-batch, none before the last stage.

    `gradient_norms` is on the device. All numbers reach the host in one transfer: a step waits once for it.
    """
    rows = torch.cat([output.per_sequence() for output in outputs], dim=1) if outputs else None
    if rows is not None:
        # context-parallel ranks share a sequence: its largest difference may be on any of them
        dist.all_reduce(rows[SEQUENCE_FIELDS.index(MAXIMUM)], dist.ReduceOp.MAX, group=groups.cp)
    table = packer.gather_sequences(mini_batch, rows, len(SEQUENCE_FIELDS))
    sums = torch.zeros(NUM_SUMS + 2, dtype=torch.float64, device=device())
    for output in outputs:
        sums[:NUM_SUMS] += torch.stack([value.double() for value in output.sums.flat()])
    if bounds_are_chosen and outputs and groups.dp_cp.rank() == 0:
        for i, bound in enumerate(outputs[0].clip_bounds or ()):
            sums[NUM_SUMS + i] = bound
    packer.share(sums, groups.cp)
    values = torch.cat([table.double().flatten(), sums, gradient_norms]).cpu().numpy()
    columns, sums, norms = np.split(values, [table.numel(), table.numel() + len(sums)])
    return Reduced(
        columns=dict(zip(SEQUENCE_FIELDS, columns.reshape(table.shape).astype(np.float32), strict=True)),
        sums=LossSums.of_flat(sums[:NUM_SUMS].tolist()),
        clip_bounds=sums[NUM_SUMS:],
        gradient_norms=norms,
    )
