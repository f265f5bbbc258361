"""Core attention for Megatron's local layer spec: packed sequences, context parallelism, CPU and GPU.

Shape suffixes: T tokens of the pack on this rank, G all tokens of the pack, S sequences.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vespo.data.context_parallel import TokenLayout, gathered_order
from megatron_vespo.data.host_memory import to_device
from megatron_vespo.trainer.rotary import Rotation


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's description of a pack, plus what `PackedSelfAttention` and `PackedAttention` need.

    Built once per micro-batch; every layer uses the same object.
    """

    position_T: Tensor | None = None  # int64, of each of this rank's tokens in its sequence
    rotation: Rotation | None = None  # of queries and keys; set by the first layer, None without RoPE
    _angles: Tensor | None = None  # those of `rotation`
    # index of each of this rank's tokens in a padded [S, longest] batch; None if the batch has no padding
    query_slot_T: Tensor | None = None
    key_slot_G: Tensor | None = None  # the same for all tokens of the pack
    key_order_G: Tensor | None = None  # index of each token after the gather over context parallelism
    mask: Tensor | None = None  # bool [S, 1, longest / cp_size, longest], None where is_causal suffices
    chunk_cu_seqlens_q: Tensor | None = None  # a query chunk is causal in all keys up to its own end
    chunk_cu_seqlens_k: Tensor | None = None
    chunk_keys: Tensor | None = None  # int64, indices of those keys, chunk after chunk

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        max_seqlen: int,
        layout: TokenLayout,
        use_kernel: bool,
        device: torch.device | None = None,
    ) -> PackedSequences:
        """`cu_seqlens` int32 [S + 1] of the whole pack; `use_kernel`: see `PackedAttention.uses_kernel`.

        All tensors will be on `device`, by default that of `cu_seqlens`. Boundaries in host memory save a
        wait for the device.
        """
        device = cu_seqlens.device if device is None else device
        bounds = cu_seqlens.cpu().numpy()
        indices = {"position_T": _positions(bounds)[layout.local_indices(bounds)]}
        if layout.cp_size > 1:
            indices["key_order_G"] = gathered_order(bounds, layout.cp_size)
        if not use_kernel:
            indices |= _padded_batch(bounds, max_seqlen, layout)
        elif layout.cp_size > 1:
            indices |= _chunks(bounds, layout)
        pack = packed(cls, to_device(cu_seqlens, device), max_seqlen)
        for name, values in indices.items():
            setattr(pack, name, to_device(torch.from_numpy(values), device))
        return pack

    def rotate_by(self, angles: Tensor | None, scale: float, dtype: torch.dtype) -> None:
        """Set `rotation`; layers of one model pass the same `angles`, so only the first one computes it."""
        if angles is not self._angles:
            assert self.position_T is not None
            self._angles = angles
            self.rotation = None if angles is None else Rotation.of(angles, self.position_T, scale, dtype)


def packed[Params: PackedSeqParams](kind: type[Params], cu_seqlens: Tensor, max_seqlen: int) -> Params:
    """Fills Megatron's own fields. Padding at a sequence's end counts as part of it: causality hides it."""
    return kind(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


def _positions(bounds: np.ndarray) -> np.ndarray:
    """Position of each token of the whole pack in its sequence, int64."""
    return np.arange(bounds[-1]) - np.repeat(bounds[:-1].astype(np.int64), np.diff(bounds))


def _padded_batch(bounds: np.ndarray, longest: int, layout: TokenLayout) -> dict[str, np.ndarray]:
    """One row per sequence. Padding comes after the tokens, where causality hides it."""
    lengths = np.diff(bounds)
    sequence_G = np.repeat(np.arange(len(lengths)), lengths)
    position_G = _positions(bounds)
    key_slot_G = sequence_G * longest + position_G
    has_padding = bounds[-1] < len(lengths) * longest
    if layout.cp_size == 1:
        return {"query_slot_T": key_slot_G, "key_slot_G": key_slot_G} if has_padding else {}
    local_longest = longest // layout.cp_size
    held_T = layout.local_indices(bounds)
    offset_T = np.arange(len(held_T)) - bounds[sequence_G[held_T]] // layout.cp_size
    query_slot_T = sequence_G[held_T] * local_longest + offset_T
    # padding rows see only the first key, which keeps their softmax finite
    query_position = np.zeros(len(lengths) * local_longest, np.int64)
    query_position[query_slot_T] = position_G[held_T]
    mask = query_position.reshape(len(lengths), 1, local_longest, 1) >= np.arange(longest)
    slots = {"query_slot_T": query_slot_T, "key_slot_G": key_slot_G} if has_padding else {}
    return slots | {"mask": mask}


def _chunks(bounds: np.ndarray, layout: TokenLayout) -> dict[str, np.ndarray]:
    """Each sequence's two zig-zag chunks as separate sequences, with the keys they may see."""
    query_lengths, keys = [], []
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        chunk = (end - start) // (2 * layout.cp_size)
        for index in (layout.cp_rank, 2 * layout.cp_size - 1 - layout.cp_rank):
            query_lengths.append(chunk)
            keys.append(np.arange(start, start + (index + 1) * chunk, dtype=np.int64))

    def boundaries(lengths: list) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    return {
        "chunk_cu_seqlens_q": boundaries(query_lengths),
        "chunk_cu_seqlens_k": boundaries([len(k) for k in keys]),
        "chunk_keys": np.concatenate(keys),
    }


class PackedSelfAttention(SelfAttention):
    """Megatron's self-attention, which leaves the rotation of queries and keys to `PackedAttention`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
        **others,
    ) -> tuple[Tensor, Tensor | None]:
        """Megatron's arguments; `rotary_pos_emb` [longest, 1, 1, R] are the angles by position."""
        assert isinstance(packed_seq_params, PackedSequences), "only packed sequences run here"
        assert not self.config.rotary_interleaved, "the rotation is of halves of a head"
        packed_seq_params.rotate_by(rotary_pos_emb, self._yarn_concentration_factor, hidden_states.dtype)
        return super().forward(
            hidden_states,
            attention_mask,  # pyright: ignore[reportArgumentType]
            packed_seq_params=packed_seq_params,
            **others,
        )


class PackedAttention(MegatronModule):
    """Causal attention inside each packed sequence, never across sequence boundaries.

    Half precision on CUDA runs torch's variable-length flash attention. Otherwise the pack becomes a
    padded batch for scaled_dot_product_attention, which costs S * longest^2 instead of (sum of lengths)^2.
    Under context parallelism every rank gathers all keys and values; queries stay on their rank.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_unused,
    ):
        super().__init__(config=config)
        self.softmax_scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5  # pyright: ignore[reportOptionalOperand]
        assert pg_collection is not None
        self.cp_group = pg_collection.cp

    @staticmethod
    def uses_kernel(dtype: torch.dtype, device: torch.device) -> bool:
        """Whether such tensors run through variable-length flash attention."""
        return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query [T, heads, head_dim], key and value [T, groups, head_dim] -> [T, heads * head_dim]."""
        pack = packed_seq_params
        assert isinstance(pack, PackedSequences) and attention_bias is None, "only packed sequences run here"
        if pack.rotation is not None:
            query, key = pack.rotation(query), pack.rotation(key)
        if self.cp_group.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(t.contiguous(), group=self.cp_group)[pack.key_order_G]
                for t in (key, value)
            )
        attend = self._kernel if self.uses_kernel(query.dtype, query.device) else self._padded
        return attend(query, key, value, pack).flatten(1)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences) -> Tensor:
        num_sequences, longest = len(pack.cu_seqlens_q) - 1, pack.max_seqlen_q

        def padded(tensor: Tensor, slot: Tensor | None, length: int) -> Tensor:
            if slot is not None:
                batch = tensor.new_zeros(num_sequences * length, *tensor.shape[1:])
                tensor = batch.index_copy(0, slot, tensor)
            return tensor.view(num_sequences, length, *tensor.shape[1:]).transpose(1, 2)

        context = F.scaled_dot_product_attention(
            padded(query, pack.query_slot_T, longest // self.cp_group.size()),
            padded(key, pack.key_slot_G, longest),
            padded(value, pack.key_slot_G, longest),
            attn_mask=pack.mask,
            is_causal=pack.mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        context = context.transpose(1, 2).flatten(0, 1)
        return context if pack.query_slot_T is None else context.index_select(0, pack.query_slot_T)

    def _kernel(self, query: Tensor, key: Tensor, value: Tensor, pack: PackedSequences) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # not in every torch; CUDA only

        cu_seqlens_q, cu_seqlens_k, longest_q = pack.cu_seqlens_q, pack.cu_seqlens_kv, pack.max_seqlen_q
        if pack.chunk_keys is not None:
            cu_seqlens_q, cu_seqlens_k = pack.chunk_cu_seqlens_q, pack.chunk_cu_seqlens_k
            key, value = key[pack.chunk_keys], value[pack.chunk_keys]
            longest_q = pack.max_seqlen_q // (2 * self.cp_group.size())
        # torch 2.11 has no such flag: it accepts keys with fewer heads than the queries
        grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
        # a window without a right side is causal; with fewer queries than keys it aligns to the last key
        return varlen_attn(  # pyright: ignore[reportReturnType]
            query,
            key,
            value,
            cu_seqlens_q,  # pyright: ignore[reportArgumentType]
            cu_seqlens_k,
            longest_q,
            pack.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),
            **({"enable_gqa": True} if grouped else {}),  # pyright: ignore[reportArgumentType]
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict:
        return {}  # no parameters
