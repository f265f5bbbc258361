"""Core attention for Megatron's local layer spec that understands packed sequences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PackedSDPAttention(MegatronModule):
    """Causal attention inside each packed sequence by torch's scaled_dot_product_attention.

    The pack is laid out as a padded batch [S, heads, longest, head_dim]: padding sits behind the tokens,
    where causality already hides it, so no mask is built and the cost is S * longest^2 instead of
    (sum of lengths)^2.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_unused):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, heads, head_dim], key and value [T, groups, head_dim] -> [T, heads * head_dim]."""
        assert packed_seq_params is not None and attention_bias is None, (
            "this policy only runs packed sequences"
        )
        cu_seqlens = packed_seq_params.cu_seqlens_q.long()
        lengths = cu_seqlens.diff()
        longest = packed_seq_params.max_seqlen_q
        sequence_T = torch.repeat_interleave(torch.arange(len(lengths), device=query.device), lengths)
        position_T = torch.arange(len(sequence_T), device=query.device) - cu_seqlens[sequence_T]
        slot_T = sequence_T * longest + position_T

        def padded(tensor: Tensor) -> Tensor:
            batch = tensor.new_zeros(len(lengths) * longest, *tensor.shape[1:])
            batch = batch.index_copy(0, slot_T, tensor)
            return batch.view(len(lengths), longest, *tensor.shape[1:]).transpose(1, 2)

        context = F.scaled_dot_product_attention(
            padded(query),
            padded(key),
            padded(value),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return context.transpose(1, 2).flatten(0, 1).index_select(0, slot_T).flatten(1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        return {}  # no parameters
