"""Turns hidden states into log-probs and entropies of the trained tokens, without holding all logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_vespo.algorithms.linear_log_probs import linear_log_probs
from megatron_vespo.algorithms.supports import Supports
from megatron_vespo.data.micro_batch import MicroBatch


@dataclass(frozen=True)
class LogProbContext:
    """What `output_log_probs` needs beside the arguments that Megatron passes."""

    micro_batch: MicroBatch
    vocab_size: int  # later rows only pad the output layer: no engine knows them
    chunk_size: int  # tokens


def output_log_probs(
    *,
    hidden_states: Tensor,
    output_layer: ColumnParallelLinear,
    output_weight: Tensor | None,
    context: LogProbContext,
    **_unused,
) -> Tensor:
    """Megatron's `output_processor`: hidden_states [T, 1, H] -> float64 [2, T], log-probs and entropies.

    `output_weight` is the embedding if it is also the output layer's weight, else None.

    In the output, T is all tokens that the context-parallel rank holds, the same on every tensor-parallel
    rank. In the input, under sequence parallelism, T is this rank's slice of them. Positions that predict
    nothing hold 0: their logits are not computed.
    """
    group = output_layer.tp_group
    if output_layer.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states, group=group)
    else:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states, group=group)
    hidden_TH = hidden_states[:, 0]
    micro_batch, predicting = context.micro_batch, context.micro_batch.loss_positions
    values = linear_log_probs(
        hidden_TH.index_select(0, predicting),
        output_layer.weight if output_weight is None else output_weight,  # pyright: ignore[reportArgumentType]
        micro_batch.labels_T[predicting],
        micro_batch.temperature_T[predicting],
        vocab_size=context.vocab_size,
        group=group,  # pyright: ignore[reportArgumentType]
        chunk_size=context.chunk_size,
        supports=_supports(micro_batch),
    )
    output = torch.zeros(2, len(hidden_TH), dtype=torch.float64, device=hidden_TH.device)
    return output.index_copy(1, predicting, torch.stack(values))


def _supports(micro_batch: MicroBatch) -> Supports | None:
    """What truncated sampling left to the tokens that `loss_positions` predict."""
    if micro_batch.support_counts is None or micro_batch.support_ids is None:
        return None
    return Supports.of(micro_batch.support_counts, micro_batch.support_ids)
