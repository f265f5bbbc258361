"""Torch's variable-length attention, which packs go through on a GPU, against the padded batch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from megatron_vespo.data.context_parallel import TokenLayout, gathered_order
from tests.gpu.items.context import Context, Figures, Skip, teraflops

HEAD_DIM = 128
# lengths of the sequences of a pack, for the times; Qwen3-30B-A3B has 32 heads and 4 groups
PACKS = {"16 x 1,024": [1024] * 16, "one long": [8192] + [512] * 16}
HEADS, GROUPS = 32, 4


def attention(context: Context) -> Figures:
    try:
        import torch.nn.attention.varlen  # noqa: F401
    except ImportError as error:
        raise Skip(f"torch {torch.__version__} has no variable-length attention: {error}") from None
    figures: Figures = {}
    for cp_size in (1, 2, 4):
        for name, error in _errors(cp_size).items():
            figures[f"{name}: from the padded batch in fp32, cp {cp_size}"] = error
    for name, lengths in PACKS.items():
        figures |= {f"{name}: {key}": figure for key, figure in _times(context, lengths).items()}
    return figures


def _pack(lengths: list[int], heads: int, groups: int, dtype: torch.dtype) -> tuple[np.ndarray, list[Tensor]]:
    torch.manual_seed(0)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    shape = int(bounds[-1]), HEAD_DIM
    fields = [torch.randn(shape[0], n, shape[1], device="cuda", dtype=dtype) for n in (heads, groups, groups)]
    return bounds, [field.requires_grad_() for field in fields]


def _attend(bounds: np.ndarray, fields: list[Tensor], layout: TokenLayout, use_kernel: bool):
    """A function without arguments: the attention of this rank's queries."""
    from megatron_vespo.trainer.attention import PackedAttention, PackedSequences

    cu_seqlens = torch.from_numpy(bounds.astype(np.int32)).cuda()
    pack = PackedSequences.of(cu_seqlens, int(np.diff(bounds).max()), layout, use_kernel=use_kernel)
    cp = SimpleNamespace(size=lambda: layout.cp_size, rank=lambda: layout.cp_rank)
    module = PackedAttention(SimpleNamespace(kv_channels=HEAD_DIM), pg_collection=SimpleNamespace(cp=cp))
    function = module._kernel if use_kernel else module._padded
    held = torch.from_numpy(layout.local_indices(bounds)).cuda()
    query, key, value = fields
    return lambda: function(query[held], key, value, pack)


def _errors(cp_size: int) -> dict[str, float]:
    """bf16 by the kernel against fp32 as a padded batch: the values and their three gradients."""
    bounds, fields = _pack([4096, 1024, 64, 8], 8, 2, torch.float32)
    upstream = torch.randn_like(fields[0])
    order = torch.from_numpy(gathered_order(bounds, cp_size)).cuda()
    results = {}
    for use_kernel, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        cast = [field.to(dtype) for field in fields]
        layouts = [TokenLayout(cp_size, rank) for rank in range(cp_size)]
        parts = [_attend(bounds, cast, layout, use_kernel)() for layout in layouts]
        whole = torch.cat(parts)[order].float()
        results[use_kernel] = (whole, *torch.autograd.grad(whole, fields, upstream))
    errors = {}
    for name, ours, reference in zip(
        ("values", "dq", "dk", "dv"), results[True], results[False], strict=True
    ):
        errors[name] = round(float((ours - reference).norm() / reference.norm()), 5)
        assert errors[name] <= 2e-2, f"{name} at cp {cp_size}: {errors[name]}"
    return errors


def _times(context: Context, lengths: list[int]) -> Figures:
    bounds, fields = _pack(lengths, HEADS, GROUPS, torch.bfloat16)
    upstream = torch.randn_like(fields[0])
    # two matmuls forward and five backward, of the lower triangle
    operations = 7 * HEADS * HEAD_DIM * sum(length**2 for length in lengths)
    figures: Figures = {}
    for name, use_kernel in (("kernel", True), ("padded", False)):
        attend = _attend(bounds, fields, TokenLayout(1, 0), use_kernel)
        elapsed = context.milliseconds(lambda attend=attend: torch.autograd.grad(attend(), fields, upstream))
        figures[f"{name} ms, forward and backward"] = round(elapsed, 3)
        figures[f"{name} TFLOP/s"] = teraflops(operations, elapsed)
    return figures
