"""Forward and backward passes over micro-batches by Megatron's pipeline schedule."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_vespo.algorithms.vespo import GammaKernel, sequence_log_ratio, vespo_loss
from megatron_vespo.data.micro_batch import MicroBatch
from megatron_vespo.trainer.log_probs import vocab_parallel_log_probs

# log_probs_T of one micro-batch -> (summed loss, number of loss tokens, what to hand back)
LossFunction = Callable[[MicroBatch, Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]


def run_schedule(
    model: list, micro_batches: Sequence[MicroBatch], args: Namespace, loss: LossFunction, forward_only: bool
) -> list[dict[str, Tensor]]:
    """What `loss` handed back, one entry a micro-batch, on the last pipeline stage; elsewhere empty."""
    iterators = [iter(micro_batches) for _ in model]
    return get_forward_backward_func()(
        forward_step_func=partial(_forward_step, args=args, loss=loss),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=model,
        num_microbatches=len(micro_batches),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=forward_only,
    )


def _forward_step(iterator, model, *, args: Namespace, loss: LossFunction):
    micro_batch = next(iterator)
    output = model(
        input_ids=micro_batch.tokens_T[None],
        position_ids=micro_batch.position_ids_T[None],
        attention_mask=None,
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=micro_batch.cu_seqlens,
            cu_seqlens_kv=micro_batch.cu_seqlens,
            max_seqlen_q=micro_batch.max_seqlen,
            max_seqlen_kv=micro_batch.max_seqlen,
        ),
    )

    def loss_func(logits: Tensor):
        # the schedule calls it on the last stage only
        log_probs_T = vocab_parallel_log_probs(
            logits, micro_batch.labels_T, micro_batch.temperature_T, args.vocab_size
        )
        return loss(micro_batch, log_probs_T)

    return output, loss_func


def log_prob_only(micro_batch: MicroBatch, log_probs_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """No loss: hands the log-probs back."""
    return log_probs_T.new_zeros(()), _num_tokens(micro_batch), {"log_probs_T": log_probs_T.detach()}


def policy_loss(
    micro_batch: MicroBatch, log_probs_T: Tensor, *, kernel: GammaKernel, args: Namespace
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """VESPO on one micro-batch; hands back per-sequence values [S]."""
    log_ratio = sequence_log_ratio(
        log_probs_T,
        micro_batch.behavior_log_probs_T,
        micro_batch.old_log_probs_T,
        micro_batch.loss_mask_T,
        micro_batch.sequence_ids_T,
        micro_batch.num_sequences,
        args.ratio_denominator,
        args.mismatch_truncation,
    )
    loss_sum, phi_S = vespo_loss(
        log_probs_T,
        log_ratio.log_w_S,
        micro_batch.advantages_S,
        micro_batch.loss_mask_T,
        micro_batch.sequence_ids_T,
        kernel,
    )
    reference_T = log_probs_T.detach() if micro_batch.old_log_probs_T is None else micro_batch.old_log_probs_T
    difference_T = (reference_T - micro_batch.behavior_log_probs_T).abs() * micro_batch.loss_mask_T
    handed_back = {
        "log_w": log_ratio.log_w_S,
        "phi": phi_S,
        "engine_gap": log_ratio.engine_gap_S,
        # the schedule divides the loss in place: keep our own
        "loss_sum": loss_sum.detach().clone(),
        "engine_difference": torch.zeros_like(phi_S).scatter_reduce(
            0, micro_batch.sequence_ids_T, difference_T, "amax"
        ),
    }
    return loss_sum, _num_tokens(micro_batch), handed_back


def _num_tokens(micro_batch: MicroBatch) -> Tensor:
    return micro_batch.loss_mask_T.sum().to(torch.int)
