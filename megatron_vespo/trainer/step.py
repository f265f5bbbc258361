"""Runs forward and backward passes over micro-batches in Megatron's pipeline schedule."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_vespo.algorithms.corrections import Mismatch
from megatron_vespo.algorithms.losses.aggregation import count, summed_loss, weighted_sum
from megatron_vespo.algorithms.losses.inputs import LossInputs, TokenLoss
from megatron_vespo.algorithms.losses.output import LossOutput, LossSums
from megatron_vespo.algorithms.losses.settings import BoundLoss, LossSettings
from megatron_vespo.algorithms.token_sums import TokenSums, token_sums
from megatron_vespo.algorithms.vespo import LogRatio, segment_sum, sequence_log_ratio
from megatron_vespo.data.context_parallel import TokenLayout
from megatron_vespo.data.host_memory import to_device
from megatron_vespo.data.micro_batch import MicroBatch
from megatron_vespo.trainer.attention import PackedAttention, PackedSequences, packed
from megatron_vespo.trainer.initialize import device
from megatron_vespo.trainer.log_probs import LogProbContext, output_log_probs
from megatron_vespo.trainer.routing_replay import Routing

# log-probs and entropies [T] of one micro-batch -> (summed loss, number of loss tokens, output)
type LossFunction[Output] = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, Tensor, Output]]


class Schedule:
    """Runs micro-batches through the model chunks of all pipeline stages."""

    def __init__(self, model: list, args: Namespace, layout: TokenLayout):
        self._model, self._args, self._layout = model, args, layout

    def run[Output](
        self,
        micro_batches: Sequence[MicroBatch],
        loss: LossFunction[Output],
        forward_only: bool,
        routing: Routing,
    ) -> list[Output]:
        """The outputs of `loss`, one per micro-batch, on the last pipeline stage; empty on the others."""
        for chunk in self._model:
            chunk.eval() if forward_only else chunk.train()
        # each micro-batch moves to the GPU when its turn comes, once per model chunk of the rank
        iterators = [((pack.on(device()), self._packed(pack)) for pack in micro_batches) for _ in self._model]
        return get_forward_backward_func()(
            forward_step_func=lambda iterator, model: self._forward_step(
                next(iterator), model, loss, routing
            ),
            data_iterator=iterators if len(self._model) > 1 else iterators[0],  # pyright: ignore[reportArgumentType]
            model=self._model,
            num_microbatches=len(micro_batches),
            seq_length=self._args.seq_length,
            micro_batch_size=self._args.micro_batch_size,
            forward_only=forward_only,
        )

    def _forward_step(
        self, packed: tuple[MicroBatch, PackedSeqParams], model, loss: LossFunction, routing: Routing
    ):
        micro_batch, pack = packed
        with routing(unwrap_model(model).vp_stage or 0, micro_batch):  # pyright: ignore[reportAttributeAccessIssue]
            output = model(
                input_ids=micro_batch.tokens_T[None],
                position_ids=micro_batch.position_ids_T[None],
                attention_mask=None,
                packed_seq_params=pack,
                output_processor=output_log_probs,
                output_processor_context=LogProbContext(
                    micro_batch, self._args.vocab_size, self._args.log_prob_chunk_size
                ),
            )
        # the schedule calls the loss only on the last stage
        return output, lambda log_probs_and_entropies: loss(micro_batch, *log_probs_and_entropies)

    def _packed(self, micro_batch: MicroBatch) -> PackedSeqParams:
        """Describes a pack in host memory, with tensors on the GPU."""
        cu_seqlens, longest = micro_batch.cu_seqlens, micro_batch.max_seqlen
        if self._args.transformer_impl == "transformer_engine":
            return packed(PackedSeqParams, to_device(cu_seqlens, device()), longest)
        use_kernel = PackedAttention.uses_kernel(self._args.params_dtype, device())
        return PackedSequences.of(cu_seqlens, longest, self._layout, use_kernel, device())


def log_prob_only(
    micro_batch: MicroBatch, log_probs_T: Tensor, entropies_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """No loss: returns the log-probs [T]."""
    return log_probs_T.new_zeros(()), _num_tokens(micro_batch), log_probs_T.detach()


def ratio_only(
    micro_batch: MicroBatch,
    log_probs_T: Tensor,
    entropies_T: Tensor,
    *,
    settings: LossSettings,
    cp_group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """No loss: returns log W [S]."""
    ratio = _log_ratio(micro_batch, log_probs_T, settings, cp_group)
    return log_probs_T.new_zeros(()), _num_tokens(micro_batch), ratio.log_w_S


def inputs_only(
    micro_batch: MicroBatch,
    log_probs_T: Tensor,
    entropies_T: Tensor,
    *,
    settings: LossSettings,
    cp_group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor, LossInputs]:
    """No loss: returns the inputs of the policy loss, for losses that adapt to them."""
    log_ratio = _log_ratio(micro_batch, log_probs_T, settings, cp_group)
    inputs = _loss_inputs(micro_batch, log_probs_T.detach(), log_ratio, settings)
    return log_probs_T.new_zeros(()), _num_tokens(micro_batch), inputs


def policy_loss(
    micro_batch: MicroBatch,
    log_probs_T: Tensor,
    entropies_T: Tensor,
    *,
    bound: BoundLoss,
    settings: LossSettings,
    longest: int,
    cp_group: dist.ProcessGroup,
    keeps_log_probs: bool = False,
) -> tuple[Tensor, Tensor, LossOutput]:
    """The policy loss on one micro-batch. `longest` is the longest response allowed, in tokens."""
    log_ratio = _log_ratio(micro_batch, log_probs_T, settings, cp_group)
    old_T = _pi_old(micro_batch, log_probs_T)
    inputs = _loss_inputs(micro_batch, log_probs_T, log_ratio, settings)
    correction_T = bound.correction(
        Mismatch.of(old_T, micro_batch.behavior_log_probs_T, log_ratio, inputs, cp_group)
    )
    terms: list[TokenLoss] = []
    loss_sum = summed_loss(bound.loss, inputs, bound.aggregation, longest, correction_T, terms)
    loss_T, weight_T = (
        torch.cat(values) for values in zip(*((term.loss_T, term.weight_T) for term in terms), strict=True)
    )
    unweighted_T = (weight_T == 0.0) & (micro_batch.loss_mask_T > 0)
    sizes_T = (loss_T * correction_T).abs()
    kl_sum = torch.zeros_like(loss_sum)
    if bound.kl is not None:
        assert micro_batch.reference_log_probs_T is not None, "the reference's log-probs are computed first"
        kl_T = bound.kl(inputs, micro_batch.reference_log_probs_T, micro_batch.behavior_log_probs_T)
        kl_sum = weighted_sum(kl_T, inputs, bound.aggregation, longest)
        loss_sum, sizes_T = loss_sum + kl_sum, sizes_T + kl_T.detach().abs()
    loss_count = count(inputs, bound.aggregation, cp_group.rank() == 0)
    weight_S, correction_S, rejected_S = _token_means(
        weight_T * correction_T, correction_T, micro_batch, inputs, cp_group
    )
    log_mismatch_T = old_T - micro_batch.behavior_log_probs_T
    difference_T = log_mismatch_T.abs() * micro_batch.loss_mask_T
    sums = LossSums(
        # the schedule divides the loss in place: keep a copy
        loss=loss_sum.detach().clone(),
        loss_terms=weighted_sum(sizes_T, inputs, bound.aggregation, longest),
        kl_loss=kl_sum.detach(),
        loss_count=loss_count,
        entropy=entropies_T.detach().sum(),
        zero_weights=unweighted_T.sum(),
        num_tokens=_num_tokens(micro_batch),
        ratio=token_sums(inputs.log_ratio_T, micro_batch.loss_mask_T),
        log_mismatch=token_sums(log_mismatch_T, micro_batch.loss_mask_T),
        reference=_reference_sums(micro_batch, log_probs_T),
    )
    output = LossOutput(
        log_w_S=log_ratio.log_w_S,
        weight_S=weight_S,
        correction_S=correction_S,
        rejected_S=rejected_S,
        log_mismatch_in_w_S=log_ratio.log_mismatch_in_w_S,
        log_mismatch_S=log_ratio.log_mismatch_S,
        log_mismatch_abs_max_S=torch.zeros_like(weight_S).scatter_reduce(
            0, micro_batch.sequence_ids_T, difference_T.float(), "amax"
        ),
        sums=sums,
        clip_bounds=bound.loss.clip_bounds,
        log_probs=log_probs_T.detach()[micro_batch.loss_positions].float() if keeps_log_probs else None,
    )
    return loss_sum, loss_count.int(), output


def _token_means(
    weight_T: Tensor, correction_T: Tensor, micro_batch: MicroBatch, inputs: LossInputs, cp_group
) -> tuple[Tensor, ...]:
    """Means over each sequence's trained tokens of the weight, of the correction, and of correction == 0."""
    averaged_T3 = torch.stack([weight_T.double(), correction_T, (correction_T == 0.0).double()], dim=1)
    share_T3 = averaged_T3 / inputs.per_token(inputs.lengths_S)[:, None]
    return segment_sum(
        share_T3.masked_fill(micro_batch.loss_mask_T[:, None] == 0, 0.0),
        micro_batch.sequence_ids_T,
        micro_batch.num_sequences,
        cp_group,
    ).unbind(1)


def _reference_sums(micro_batch: MicroBatch, log_probs_T: Tensor) -> TokenSums[Tensor]:
    if micro_batch.reference_log_probs_T is None:
        return TokenSums(*log_probs_T.new_full((len(TokenSums._fields),), torch.nan).double())
    return token_sums(
        micro_batch.reference_log_probs_T - log_probs_T.detach().double(), micro_batch.loss_mask_T
    )


def _loss_inputs(
    micro_batch: MicroBatch, log_probs_T: Tensor, log_ratio: LogRatio, settings: LossSettings
) -> LossInputs:
    rollout = settings.ratio_denominator == "rollout"
    denominator_T = micro_batch.behavior_log_probs_T if rollout else _pi_old(micro_batch, log_probs_T)
    return LossInputs(
        log_probs_T=log_probs_T,
        log_ratio_T=log_probs_T.detach() - denominator_T,
        log_w_S=log_ratio.log_w_S,
        advantages_S=micro_batch.advantages_S,
        num_tokens_S=micro_batch.num_tokens_S,
        loss_mask_T=micro_batch.loss_mask_T,
        sequence_ids_T=micro_batch.sequence_ids_T,
        token_advantages_T=micro_batch.token_advantages_T,
    )


def _pi_old(micro_batch: MicroBatch, log_probs_T: Tensor) -> Tensor:
    """log pi_old, or log pi itself where pi_old is unknown."""
    return log_probs_T.detach() if micro_batch.old_log_probs_T is None else micro_batch.old_log_probs_T


def _log_ratio(
    micro_batch: MicroBatch, log_probs_T: Tensor, settings: LossSettings, cp_group: dist.ProcessGroup
) -> LogRatio:
    return sequence_log_ratio(
        log_probs_T,
        micro_batch.behavior_log_probs_T,
        micro_batch.old_log_probs_T,
        micro_batch.loss_mask_T,
        micro_batch.sequence_ids_T,
        micro_batch.num_sequences,
        settings.ratio_denominator,
        settings.mismatch_truncation,
        cp_group,
    )


def _num_tokens(micro_batch: MicroBatch) -> Tensor:
    # filled on the device: a copy from the host would make every micro-batch wait for the device
    return torch.full((), micro_batch.num_loss_tokens, dtype=torch.int, device=micro_batch.tokens_T.device)
