"""Packed attention against a naive loop over sequences, for every way the pack can be cut and laid out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_vespo.data.context_parallel import TokenLayout, gathered_order

LENGTHS = [16, 8, 32, 8]
HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One sequence [n, heads, head_dim] by the definition; the last query sees the last key."""
    key, value = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * HEAD_DIM**-0.5
    visible = torch.ones(scores.shape[1:]).tril(len(key) - len(query)).bool()
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def torch_2_11(
    query, key, value, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, *, scale, window_size
) -> Tensor:
    """What the varlen_attn of torch 2.11, which runs on CUDA only, computes: any divisor as keys' heads."""
    assert window_size == (-1, 0) and scale == HEAD_DIM**-0.5
    assert longest_q == cu_seqlens_q.diff().max() and longest_k >= cu_seqlens_k.diff().max()
    cuts_q, cuts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return torch.cat(
        [
            causal(query[q : cuts_q[i + 1]], key[k : cuts_k[i + 1]], value[k : cuts_k[i + 1]])
            for i, (q, k) in enumerate(zip(cuts_q[:-1], cuts_k[:-1], strict=True))
        ]
    )


def torch_2_14(query, key, value, *places, enable_gqa=False, **options) -> Tensor:
    """The same in torch 2.14, which refuses fewer heads of keys unless it is told of them."""
    assert enable_gqa == (key.shape[1] != query.shape[1])
    return torch_2_11(query, key, value, *places, **options)


@pytest.mark.parametrize("kernel", [None, torch_2_11, torch_2_14])
@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [LENGTHS, [16] * 3], ids=["of all lengths", "of one length"])
def test_values_and_gradients_are_those_of_a_loop(lengths, cp_size, kernel, monkeypatch):
    from megatron_vespo.trainer.attention import PackedAttention, PackedSequences

    use_kernel = kernel is not None
    if use_kernel:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    torch.manual_seed(0)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    total = int(bounds[-1])
    query = torch.randn(total, HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(total, GROUPS, HEAD_DIM, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    upstream = torch.randn(total, HEADS, HEAD_DIM, dtype=torch.float64)
    expected = torch.cat(
        [
            causal(query[a:b], key[a:b], value[a:b])
            for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
    )
    results = []
    for rank in range(cp_size):
        layout = TokenLayout(cp_size, rank)
        pack = PackedSequences.of(
            torch.from_numpy(bounds.astype(np.int32)), max(lengths), layout, use_kernel=use_kernel
        )
        groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: cp_size, rank=lambda rank=rank: rank))
        attention = PackedAttention(SimpleNamespace(kv_channels=HEAD_DIM), pg_collection=groups)
        attend = attention._kernel if use_kernel else attention._padded
        # keys and values as the gather over the ranks leaves them, in the pack's order
        results.append(attend(query[layout.local_indices(bounds)], key, value, pack))
    whole = torch.cat(results)[gathered_order(bounds, cp_size)]
    torch.testing.assert_close(whole, expected)
    inputs = (query, key, value)
    for ours, reference in zip(
        torch.autograd.grad(whole, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)
