"""Log-probs of given tokens from vocabulary-parallel logits."""

from __future__ import annotations

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_rank
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor


def vocab_parallel_log_probs(
    logits: Tensor, labels_T: Tensor, temperature_T: Tensor, vocab_size: int
) -> Tensor:
    """log softmax(logits / temperature)[label], float32 [T], the same on every tensor-parallel rank.

    `logits` is this rank's slice [1, T, V]. Columns from `vocab_size` on are Megatron's padding: no engine
    knows them, so they get no probability here either.
    """
    scaled = logits.float() / temperature_T[None, :, None]
    num_real = max(0, vocab_size - get_tensor_model_parallel_rank() * scaled.shape[-1])
    if num_real < scaled.shape[-1]:
        scaled[..., num_real:] = torch.finfo(scaled.dtype).min
    # cross entropy over [sequence, batch, vocabulary]; it overwrites fp32 logits in place: `scaled` is ours
    return -vocab_parallel_cross_entropy(scaled.transpose(0, 1).contiguous(), labels_T[:, None])[:, 0]
