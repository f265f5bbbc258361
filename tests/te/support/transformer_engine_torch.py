"""Transformer Engine's compiled extension on the CPU: the functions that a Qwen3-MoE run calls, in torch.

TE's Python imports this module by the extension's name, calls it with the extension's arguments, and does
the rest itself: what is fused, gathered over ranks, saved for the backward pass and accumulated where.
Whatever is not here can be named, as TE does when it is imported, and raises when it is called.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CUDNN_VERSION = 92400


class DType(enum.IntEnum):
    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


TORCH_TYPES = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2


class _Enumeration(type):
    """An enumeration that has every member it is asked for."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = len(vars(cls))
        setattr(cls, name, value)
        return value


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        value: Any = _Enumeration(name, (), {})
    else:

        def value(*_, **__):
            raise NotImplementedError(f"the stand-in for TE's extension has no {name}")

    globals()[name] = value
    return value


def get_cudnn_version() -> int:
    return CUDNN_VERSION


def get_cublasLt_version() -> int:
    return 130000


def get_num_cublas_streams() -> int:
    return 1


# Matrix products. cuBLAS counts columns first, so TE's operands come in reverse: op(B) @ op(A).


def generic_gemm(
    a, transpose_a, b, transpose_b, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_input, grad,
    workspace, workspace_size, accumulate, split_accumulator, *, comm_overlap, comm_type, extra_output,
    bulk_overlap, alpha, beta,
):  # fmt: skip
    _refuse(quantizer, gelu, comm_overlap, extra_output, bias, alpha != 1.0)
    left, right = _operands(a, transpose_a, b, transpose_b)
    if out is None:
        dtype = left.dtype if out_dtype is None else TORCH_TYPES[DType(int(out_dtype))]
        out = left.new_empty(*(left.shape[:1] if transpose_b else b.shape[:-1]), right.shape[1], dtype=dtype)
        accumulate = False
    _product(out, left, right, accumulate)
    return out, None, None, None


def te_general_grouped_gemm(
    a, transpose_a, b, transpose_b, out, out_dtype, m_splits, bias, bias_dtype, single_output, pre_gelu, grad,
    workspaces, workspace_size, accumulate, split_accumulator, sm_count,
) -> list[Tensor]:  # fmt: skip
    _refuse(*(one is not None and one.numel() > 0 for one in (*bias, *pre_gelu)))
    outs = out[0].split(list(m_splits)) if single_output else out
    for one_a, one_b, one_out in zip(a, b, outs, strict=True):
        _product(one_out, *_operands(one_a, transpose_a, one_b, transpose_b), accumulate)
    return bias


def _operands(a: Tensor, transpose_a: bool, b: Tensor, transpose_b: bool) -> tuple[Tensor, Tensor]:
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    return b.t() if transpose_b else b, a.t() if transpose_a else a


def _product(out: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
    if out.dtype != left.dtype:  # the hardware sums in float32 and rounds to the output's type once
        left, right = left.float(), right.float()
    product = (left @ right).view(out.shape)
    out.add_(product) if accumulate else out.copy_(product)


def _refuse(*unexpected: Any) -> None:
    if any(one is not None and one is not False for one in unexpected):
        raise NotImplementedError(f"the stand-in for TE's extension was asked for more: {unexpected}")


# Norms


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered):
    _refuse(quantizer, zero_centered)
    rsigma = torch.rsqrt(x.float().square().mean(-1) + eps)
    y = (x.float() * rsigma[:, None] * weight.float()).to(x.dtype)
    return (y if out is None else out.copy_(y)), None, rsigma


def rmsnorm_bwd(grad, x, rsigma, weight, sm_margin, zero_centered):
    _refuse(zero_centered)
    normalized = x.float() * rsigma[:, None]
    scaled = grad.float() * weight.float()
    grad_x = rsigma[:, None] * (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), (grad.float() * normalized).sum(0).to(weight.dtype)


layernorm_fwd = __getattr__("layernorm_fwd")  # TE looks all of them up to choose one
layernorm_bwd = __getattr__("layernorm_bwd")


# Rotary embeddings and attention over packs: [tokens, heads, width], `cu_seqlens` int32 [sequences + 1]


def fused_rope_forward(t, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotate(t, freqs, cu_seqlens, 1.0, start_positions, interleaved, cp_size != 1)


def fused_rope_backward(grad, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank):
    return _rotate(grad, freqs, cu_seqlens, -1.0, start_positions, interleaved, cp_size != 1)


def _rotate(t: Tensor, freqs: Tensor, cu_seqlens: Tensor, direction: float, *unexpected) -> Tensor:
    _refuse(*unexpected)
    lengths = cu_seqlens.diff().tolist()
    assert t.dim() == 3 and sum(lengths) == len(t), (t.shape, lengths)
    position = torch.cat([torch.arange(length) for length in lengths])
    angle = freqs.reshape(len(freqs), 1, -1)[position]
    width = angle.shape[-1]
    turned, kept = t[..., :width].float(), t[..., width:]
    first, second = turned.chunk(2, -1)
    rotated = turned * angle.cos() + torch.cat((-second, first), -1) * angle.sin() * direction
    return torch.cat((rotated.to(t.dtype), kept), -1)


def convert_thd_to_bshd(packed: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    padded = packed.new_zeros(batch, longest, *packed.shape[1:])
    for row, sequence in zip(padded, _sequences(packed, cu_seqlens), strict=True):
        row[: len(sequence)] = sequence
    return padded


def convert_bshd_to_thd(padded: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    packed = padded.new_zeros(num_tokens, *padded.shape[2:])
    for sequence, row in zip(_sequences(packed, cu_seqlens), padded, strict=True):
        sequence.copy_(row[: len(sequence)])
    return packed


def _sequences(packed: Tensor, cu_seqlens: Tensor) -> Sequence[Tensor]:
    """Views of the sequences; what lies behind the last is none."""
    return packed[: cu_seqlens[-1]].split(cu_seqlens.diff().tolist())


def get_fused_attn_backend(params) -> tuple[NVTE_Fused_Attn_Backend, str]:
    """cuDNN's attention takes 16-bit packs; TE then leaves its own, unfused one."""
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def fused_attn_fwd(
    max_seqlen_q, max_seqlen_kv, is_training, scale, dropout, fast_zero_fill, qkv_layout, o_format,
    scale_inv_format, bias_type, mask_type, softmax_type, window, bottom_right, cu_seqlens_q, cu_seqlens_kv,
    q, k, v, dtype, cu_seqlens_q_padded, cu_seqlens_kv_padded, *more,
) -> list[Tensor]:  # fmt: skip
    """The output, softmax statistics that nobody reads here, and the state of a dropout that is off."""
    _refuse(dropout != 0.0, max_seqlen_q != max_seqlen_kv, cu_seqlens_q is not cu_seqlens_kv)
    out = _attention(q, k, v, cu_seqlens_q, cu_seqlens_q_padded, scale)
    return [out, q.new_zeros(0), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, scale, dropout, fast_zero_fill, qkv_layout, o_format, do_format, dqkv_layout,
    scale_inv_format, do_scale_inv_format, bias_type, mask_type, softmax_type, window, bottom_right,
    deterministic, cu_seqlens_q, cu_seqlens_kv, q, k, v, out, grad, dtype, saved, cu_seqlens_q_padded, *more,
) -> list[Tensor]:  # fmt: skip
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    with torch.enable_grad():
        out = _attention(*inputs, cu_seqlens_q, cu_seqlens_q_padded, scale)
    return list(torch.autograd.grad(out, inputs, grad.view(out.shape)))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, cu_seqlens_padded: Tensor | None, scale: float
) -> Tensor:
    """Causal attention inside each sequence; they begin where the padded lengths say."""
    starts = (cu_seqlens if cu_seqlens_padded is None else cu_seqlens_padded)[:-1].tolist()
    out = torch.zeros_like(q)
    for start, length in zip(starts, cu_seqlens.diff().tolist(), strict=True):
        rows = slice(start, start + length)
        one = (tensor[rows].transpose(0, 1)[None] for tensor in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(
            *one, is_causal=True, scale=scale, enable_gqa=True
        )
        out = out.index_copy(0, torch.arange(start, start + length), attended[0].transpose(0, 1))
    return out


# Optimizer: one call for lists of tensors


def multi_tensor_l2norm(chunk_size, overflow, lists, per_tensor=False):
    norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in lists[0]])
    return torch.linalg.vector_norm(norms)[None], norms if per_tensor else norms[:0]


def multi_tensor_scale(chunk_size, overflow, lists, scale):
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * scale)


multi_tensor_scale_tensor = multi_tensor_scale


def multi_tensor_adam(
    chunk_size, overflow, lists, lr, beta1, beta2, eps, step, decoupled_decay, bias_correction, weight_decay
):  # fmt: skip
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, mean, square in zip(*lists, strict=True):
        grad = grad.float() + (0.0 if decoupled_decay else weight_decay * parameter)
        mean.mul_(beta1).add_(grad, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = (mean / first) / ((square / second).sqrt() + eps)
        parameter.sub_(lr * (update + (weight_decay * parameter if decoupled_decay else 0.0)))
