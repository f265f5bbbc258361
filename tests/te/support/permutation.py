"""The kernels that move tokens to their experts, in torch: in Triton's interpreter TE's own take minutes.

Shape suffixes: T tokens, E experts, H hidden, R rows of the permuted tokens. A row map, int32 [T, 2 E + 1],
has for each token its rows in descending order, the experts of these rows, and how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAMES = (
    "make_row_id_map",
    "permute_with_mask_map",
    "unpermute_with_mask_map",
    "unpermute_with_mask_map_bwd_with_merging_probs",
    "make_chunk_sort_map",
    "sort_chunks_by_map",
)


def make_row_id_map(routing_map_TE: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    routed_ET = routing_map_TE.bool().t()
    rows_ET = (routed_ET.flatten().cumsum(0) - 1).view(num_experts, num_tokens)
    rows_TE, experts_TE = torch.where(routed_ET, rows_ET, -1).t().sort(1, descending=True)
    return torch.cat([rows_TE, experts_TE, routed_ET.sum(0)[:, None]], 1).int()


def _routes(row_map: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, experts and rows, one of each a route."""
    routed_TE = torch.arange(num_experts) < row_map[:, -1:]
    tokens = routed_TE.nonzero()[:, 0]
    rows, experts = row_map[:, :num_experts][routed_TE], row_map[:, num_experts:-1][routed_TE]
    return tokens, experts.long(), rows.long()


def permute_with_mask_map(
    input_TH, row_map, probs_TE, scale, pad_offsets, num_tokens, num_experts, num_rows, hidden, scale_hidden
):
    assert scale is None and pad_offsets is None, "fp8 only"
    tokens, experts, rows = _routes(row_map, num_experts)
    permuted_RH = input_TH.new_zeros(num_rows, hidden).index_copy(0, rows, input_TH[tokens])
    if probs_TE is None:
        return permuted_RH, None, None
    probs_R = probs_TE.new_zeros(num_rows).index_copy(0, rows, probs_TE[tokens, experts])
    return permuted_RH.masked_fill(probs_R[:, None] == 0, 0.0), None, probs_R


def unpermute_with_mask_map(
    input_RH, row_map, merging_TE, permuted_probs_R, pad_offsets, num_tokens, num_experts, hidden
):
    assert pad_offsets is None, "fp8 only"
    tokens, experts, rows = _routes(row_map, num_experts)
    weighted = input_RH[rows].float()
    if merging_TE is not None:
        weighted = weighted * merging_TE[tokens, experts, None].float()
    output_TH = weighted.new_zeros(num_tokens, hidden).index_add(0, tokens, weighted).to(input_RH.dtype)
    if permuted_probs_R is None:
        return output_TH, None
    probs_TE = permuted_probs_R.new_zeros(num_tokens, num_experts)
    return output_TH, probs_TE.index_put((tokens, experts), permuted_probs_R[rows])


def unpermute_with_mask_map_bwd_with_merging_probs(
    grad_TH, row_map, input_RH, merging_TE, pad_offsets, num_tokens, num_experts, num_rows, hidden
):
    assert pad_offsets is None, "fp8 only"
    tokens, experts, rows = _routes(row_map, num_experts)
    grad = grad_TH[tokens].float()
    weighted = (grad * merging_TE[tokens, experts, None].float()).to(grad_TH.dtype)
    grad_RH = grad_TH.new_zeros(num_rows, hidden).index_copy(0, rows, weighted)
    products = (grad * input_RH[rows].float()).sum(1).to(merging_TE.dtype)
    return grad_RH, torch.zeros_like(merging_TE).index_put((tokens, experts), products)


def make_chunk_sort_map(split_sizes: Tensor, order: Tensor, num_tokens: int, num_chunks: int) -> Tensor:
    """Row of each token once the chunks are in `order`, int32 [T]."""
    chunks = torch.arange(num_tokens).split(split_sizes.tolist())
    sources = torch.cat([chunks[chunk] for chunk in order.tolist()])
    return sources.argsort().int()


def sort_chunks_by_map(input_TH, row_map, probs_T, num_tokens, hidden, is_forward):
    def moved(values: Tensor) -> Tensor:
        rows = row_map.long()
        return torch.empty_like(values).index_copy(0, rows, values) if is_forward else values[rows]

    return moved(input_TH), None if probs_T is None else moved(probs_T)
