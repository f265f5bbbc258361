"""Samples laid end to end: the flat fields one forward pass needs.

Shape suffixes: T packed tokens (padding included), S sequences.
Position t predicts token t + 1, so every per-token field of position t is about token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vespo.types import TrainingSample


@dataclass
class MicroBatch:
    """One packed forward pass. `sample_indices[s]` is the place of sequence s in the mini-batch."""

    tokens_T: Tensor  # int64
    labels_T: Tensor  # int64, the next token; 0 where the mask is 0
    position_ids_T: Tensor  # int64, from 0 in every sequence
    loss_mask_T: Tensor  # float32, 1 on positions that predict a completion token
    sequence_ids_T: Tensor  # int64; padding belongs to the last sequence, masked
    cu_seqlens: Tensor  # int32 [S + 1], or [S + 2] when padding forms a segment of its own
    max_seqlen: int
    temperature_T: Tensor  # float32, of the sampling that made the sequence; 1 on padding
    behavior_log_probs_T: Tensor  # float32, 0 where the mask is 0
    advantages_S: Tensor  # float32
    sample_indices: list[int]
    old_log_probs_T: Tensor | None = None  # float32, set by the trainer

    @property
    def num_sequences(self) -> int:
        return len(self.sample_indices)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask_T.sum())


def build_micro_batch(
    samples: Sequence[TrainingSample], indices: Sequence[int], pad_to_multiple_of: int, device: torch.device
) -> MicroBatch:
    """Pack `samples[i] for i in indices`; the length is padded to a multiple, for sequence parallelism."""
    chosen = [samples[i] for i in indices]
    lengths = [s.num_tokens for s in chosen]
    total = sum(lengths)
    padding = -total % pad_to_multiple_of
    starts = np.concatenate([[0], np.cumsum(lengths)])

    fields = {
        "tokens_T": np.zeros(total + padding, np.int64),
        "labels_T": np.zeros(total + padding, np.int64),
        "position_ids_T": np.zeros(total + padding, np.int64),
        "sequence_ids_T": np.full(total + padding, len(chosen) - 1, np.int64),
        "loss_mask_T": np.zeros(total + padding, np.float32),
        "temperature_T": np.ones(total + padding, np.float32),
        "behavior_log_probs_T": np.zeros(total + padding, np.float32),
    }
    for s, (sample, start, end) in enumerate(zip(chosen, starts[:-1], starts[1:], strict=True)):
        predicting = slice(start + sample.prompt_length - 1, end - 1)
        fields["tokens_T"][start:end] = sample.token_ids
        fields["labels_T"][predicting] = sample.token_ids[sample.prompt_length :]
        fields["position_ids_T"][start:end] = np.arange(end - start)
        fields["sequence_ids_T"][start:end] = s
        fields["loss_mask_T"][predicting] = 1.0
        fields["temperature_T"][start:end] = sample.temperature
        fields["behavior_log_probs_T"][predicting] = sample.behavior_log_probs
    fields["position_ids_T"][total:] = np.arange(padding)
    segments = np.append(starts, total + padding) if padding else starts
    advantages = np.array([s.advantage for s in chosen], np.float32)
    return MicroBatch(
        **{name: torch.from_numpy(array).to(device) for name, array in fields.items()},
        cu_seqlens=torch.from_numpy(segments.astype(np.int32)).to(device),
        max_seqlen=max(*lengths, padding),
        advantages_S=torch.from_numpy(advantages).to(device),
        sample_indices=list(indices),
    )
