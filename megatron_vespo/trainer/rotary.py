"""Rotary position embedding (RoPE, arXiv 2104.09864) of a pack: one gather of angles for all its sequences.

Megatron's own path for packs without Transformer Engine cuts queries and keys into sequences, in every layer,
and waits for the device to know where. Here the angles of all tokens are gathered once per pack, and a layer
rotates all tokens at once. Values and gradients are Megatron's to the last bit: every element goes through
the same operations in the same order.

Shape suffixes: T tokens of the pack on this rank, N attention heads, D head_dim, R the rotated part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Rotation:
    """By the angles of each token's position in its sequence."""

    cos_T1R: Tensor
    sin_T1R: Tensor  # negative in the first half, see `_rotated`

    @classmethod
    def of(cls, angles: Tensor, position_T: Tensor, scale: float, dtype: torch.dtype) -> Rotation:
        """`angles` [longest, 1, 1, R] are Megatron's: both halves of R are the same.

        `position_T` int64 indexes its rows; `scale` multiplies cos and sin (YaRN's factor, 1 without it).
        """
        # of the table, which has one row per position, not one per token
        cos, sin = (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
        sin[..., : sin.shape[-1] // 2].neg_()
        return cls(*(table[:, 0].index_select(0, position_T) for table in (cos, sin)))

    def __call__(self, values_TND: Tensor) -> Tensor:
        """The rotated queries or keys; their last D - R elements stay as they are."""
        return _Rotate.apply(values_TND, self.cos_T1R, self.sin_T1R)


class _Rotate(torch.autograd.Function):
    """One node where autograd would keep five, and copies of the values: a rotation needs only its angles."""

    @staticmethod
    def forward(ctx, values_TND, cos_T1R, sin_T1R):
        ctx.save_for_backward(cos_T1R, sin_T1R)
        return _rotated(values_TND, cos_T1R, sin_T1R, torch.Tensor.add_)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TND):
        # the transpose of a rotation is the rotation by the opposite angle
        cos_T1R, sin_T1R = ctx.saved_tensors
        return _rotated(grad_TND, cos_T1R, sin_T1R, torch.Tensor.sub_), None, None


def _rotated(values_TND: Tensor, cos_T1R: Tensor, sin_T1R: Tensor, combine) -> Tensor:
    """(x, y) -> (x cos - y sin, y cos + x sin), x and y the halves of R; the sign is in `sin_T1R`."""
    size = cos_T1R.shape[-1]
    x, y = values_TND[..., : size // 2], values_TND[..., size // 2 : size]
    other_TNR = torch.cat((y, x), dim=-1).mul_(sin_T1R)
    rotated_TNR = combine(values_TND[..., :size] * cos_T1R, other_TNR)
    if size == values_TND.shape[-1]:
        return rotated_TNR
    return torch.cat((rotated_TNR, values_TND[..., size:]), dim=-1)
