"""What an optimizer step hands back: the loss's outputs of all micro-batches and ranks, put together."""

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
    loss_terms: float  # the same with every term's absolute value: how large what cancels in the loss is
    grad_norm: float
    learning_rate: float
    num_tokens: int
    zero_weight_share: float  # of the tokens, by the loss itself: clipped or masked
    entropy: float  # nats per loss token, of the policy before the step at the sampling temperature
    log_w: np.ndarray
    weight: np.ndarray  # what multiplies A grad log pi, phi(W) for VESPO; its mean over the tokens
    correction: np.ndarray  # weight by --mismatch-correction, its mean over the tokens; a factor of `weight`
    rejected: np.ndarray  # share of the tokens which that correction weighs by 0
    log_mismatch_in_w: np.ndarray  # the part of log(pi_old / mu) that is in log W
    log_mismatch: np.ndarray  # log(pi_old / mu) of the response
    # largest |log pi_old - log mu| of a token; |log pi - log mu| where pi_old is unknown
    log_mismatch_abs_max: np.ndarray
    ratio_sums: TokenSums[float]  # of log pi - log of the ratio's denominator
    log_mismatch_sums: TokenSums[float]  # of log pi_old - log mu; of log pi - log mu where pi_old is unknown
    gradient_norms: np.ndarray  # float64 [len(GRADIENT_GROUPS)]
    clip_bounds: np.ndarray  # [2] float64, of the ratio, as the loss has chosen them; 0 if it chooses none
    padding_share: float
    imbalance: float
    kernel_c2: np.ndarray  # [2] float64, A > 0 then A < 0: used in this step; NaN without --vespo-budget
    expected_w: np.ndarray  # [2] float64, E_Q[W] under it; NaN where too few samples tell


@dataclass(frozen=True)
class ReducedLoss:
    """The loss's outputs of one optimizer step, the same on every rank."""

    columns: dict[str, np.ndarray]  # float32 [num_samples] each, by their names in StepResult
    sums: LossSums[float]
    clip_bounds: np.ndarray  # [2] float64; 0 where no loss has chosen them


def reduced(
    outputs: Sequence[LossOutput],
    mini_batch: MiniBatch,
    packer: Packer,
    groups: ProcessGroupCollection,
    bounds_are_chosen: bool,
) -> ReducedLoss:
    """A collective of all ranks. `outputs` has one entry per micro-batch, none before the last stage."""
    # a cut sequence's largest difference may be on any of the ranks that hold it
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
