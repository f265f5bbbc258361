"""A mixture of SwiGLU experts in plain torch, of which a rank may have a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def local_experts_forward(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    w13: Sequence[Any] | Tensor,
    w2: Sequence[Any] | Tensor,
    linear: Callable[[Tensor, Any], Tensor] = F.linear,
) -> Tensor:
    """This rank's share of a SwiGLU mixture, in x's dtype, summed in fp32.

    T tokens, H hidden, K experts per token, E local experts, I intermediate: x [T, H], topk_weights and
    topk_ids [T, K] (ids outside 0..E-1 belong to other ranks), w13 [E, 2I, H] (gate, then up), w2 [E, H, I].
    `linear` multiplies x by what w13 and w2 have of an expert.
    """
    output = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(len(w13)):
        tokens, slots = torch.where(topk_ids == expert)
        if tokens.numel() == 0:
            continue
        gate, up = linear(x[tokens], w13[expert]).chunk(2, dim=-1)
        expert_output = linear(F.silu(gate) * up, w2[expert]).float()
        output.index_add_(0, tokens, expert_output * topk_weights[tokens, slots, None].float())
    return output.to(x.dtype)
