"""Triton kernels for the elementwise work of linear_log_probs.

The forward reads a tile once; the backward reads and writes it once. The contracts are those of
`_add_to_statistics` and `_write_gradient` there, but the first one does not change the tile. The arithmetic
inside a tile is in the temperatures' dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Columns that a program holds in registers at a time, eight per thread. These are two 16-byte loads of
# float32 and one 16-byte store of bfloat16. They need so few registers that a Hopper multiprocessor runs all
# its threads.
BLOCK = 2048
NUM_WARPS = 8
# A product that is fused with a sum is not rounded, and z - max z would not be 0 at the maximum. Unfused, a
# token that is alone in its support has a log-prob of exactly 0.
FUSION = False


def add_to_statistics(
    statistics_4T: Tensor, logits_TW: Tensor, temperature_T: Tensor, labels_T: Tensor
) -> None:
    """Merge a tile into max z, sum exp(z - max), sum exp(z - max) (z - max) and z at the label, in place."""
    num_tokens, width = logits_TW.shape
    _assert_contiguous(statistics_4T, logits_TW, temperature_T, labels_T)
    block = min(BLOCK, triton.next_power_of_2(width))
    _statistics_kernel[(num_tokens,)](
        statistics_4T,
        logits_TW,
        temperature_T,
        labels_T,
        num_tokens,
        width,
        BLOCK=block,
        num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
        enable_fp_fusion=FUSION,  # pyright: ignore[reportCallIssue]
    )


def write_gradient(
    gradient_TW: Tensor,
    logits_TW: Tensor,
    temperature_T: Tensor,
    labels_T: Tensor,
    log_normalizer_T: Tensor,
    grad_log_probs_T: Tensor,
    *entropy_fields: Tensor,
) -> None:
    """Write the gradient of a tile's logits to `gradient_TW`, which may be the tile itself.

    `entropy_fields` may be empty.
    """
    num_tokens, width = logits_TW.shape
    fields = temperature_T, labels_T, log_normalizer_T, grad_log_probs_T, *entropy_fields
    _assert_contiguous(gradient_TW, logits_TW, *fields)
    block = min(BLOCK, triton.next_power_of_2(width))
    entropy_T, grad_entropy_T = entropy_fields or (None, None)
    _gradient_kernel[(num_tokens, triton.cdiv(width, block))](
        gradient_TW,
        logits_TW,
        temperature_T,
        labels_T,
        log_normalizer_T,
        grad_log_probs_T,
        entropy_T,
        grad_entropy_T,
        width,
        BLOCK=block,
        HAS_ENTROPY_GRADIENT=bool(entropy_fields),
        num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]: Triton takes it beside the parameters
        enable_fp_fusion=FUSION,  # pyright: ignore[reportCallIssue]
    )


def _assert_contiguous(*tensors: Tensor) -> None:
    assert all(tensor.is_contiguous() for tensor in tensors), "the kernels take no strides"


@triton.jit
def _statistics_kernel(
    statistics_ptr, logits_ptr, temperature_ptr, labels_ptr, num_tokens, width, BLOCK: tl.constexpr
):
    """One program per token."""
    token = tl.program_id(0).to(tl.int64)  # a tile may have more than 2^31 logits
    dtype = temperature_ptr.dtype.element_ty
    statistics_ptr += token
    logits_ptr += token * width
    inverse_temperature = 1 / tl.load(temperature_ptr + token)
    max_z = tl.full((), float("-inf"), dtype)
    sum_exp = tl.full((), 0.0, dtype)
    centered = tl.full((), 0.0, dtype)

    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        z = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(dtype) * inverse_temperature
        new_max = tl.maximum(max_z, tl.max(z, 0))
        # -inf before the first logit: both sums are 0 then
        shift = tl.where(max_z == float("-inf"), 0.0, max_z - new_max)
        z -= new_max
        exp = tl.exp(z)
        # outside, z * exp would be -inf times 0
        centered = (centered + shift * sum_exp) * tl.exp(shift) + tl.sum(tl.where(inside, exp * z, 0.0), 0)
        sum_exp = sum_exp * tl.exp(shift) + tl.sum(exp, 0)
        max_z = new_max

    old_max = tl.load(statistics_ptr)
    new_max = tl.maximum(old_max, max_z.to(tl.float64))
    old_shift = tl.where(old_max == float("-inf"), 0.0, old_max - new_max)
    shift = max_z - new_max
    old_sum = tl.load(statistics_ptr + num_tokens)
    old_centered = (tl.load(statistics_ptr + 2 * num_tokens) + old_shift * old_sum) * tl.exp(old_shift)
    tl.store(statistics_ptr, new_max)
    tl.store(statistics_ptr + num_tokens, old_sum * tl.exp(old_shift) + sum_exp * tl.exp(shift))
    tl.store(statistics_ptr + 2 * num_tokens, old_centered + (centered + shift * sum_exp) * tl.exp(shift))
    label = tl.load(labels_ptr + token)
    if (label >= 0) & (label < width):
        tl.store(statistics_ptr + 3 * num_tokens, tl.load(logits_ptr + label).to(dtype) * inverse_temperature)


@triton.jit
def _gradient_kernel(
    gradient_ptr,
    logits_ptr,
    temperature_ptr,
    labels_ptr,
    log_normalizer_ptr,
    grad_log_probs_ptr,
    entropy_ptr,
    grad_entropy_ptr,
    width,
    BLOCK: tl.constexpr,
    HAS_ENTROPY_GRADIENT: tl.constexpr,
):
    """One program per BLOCK columns of a token."""
    token = tl.program_id(0).to(tl.int64)
    dtype = temperature_ptr.dtype.element_ty
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    place = token * width + columns
    inverse_temperature = 1 / tl.load(temperature_ptr + token)
    label = tl.load(labels_ptr + token)
    grad_log_prob = tl.load(grad_log_probs_ptr + token)

    z = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(dtype) * inverse_temperature
    log_p = z - tl.load(log_normalizer_ptr + token)
    factor = grad_log_prob
    if HAS_ENTROPY_GRADIENT:
        factor += tl.load(grad_entropy_ptr + token) * (log_p + tl.load(entropy_ptr + token))
    gradient = tl.where(columns == label, grad_log_prob, 0.0) - tl.exp(log_p) * factor
    gradient *= inverse_temperature
    tl.store(gradient_ptr + place, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
