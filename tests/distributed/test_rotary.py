"""RoPE of a pack by one gather against Megatron's loop over its sequences: equal to the last bit."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_vespo.data.context_parallel import TokenLayout

LENGTHS = [16, 8, 32, 64, 8]
BOUNDS = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
YARN = 1.3465735902799727  # the factor on cos and sin of a context extended 32 times


def angles(size: int) -> torch.Tensor:
    """Angles [longest, 1, 1, size] in Megatron's form: both halves are the same."""
    frequency = 10_000.0 ** -(torch.arange(0, size, 2) / size)
    half = torch.outer(torch.arange(max(LENGTHS)).float(), frequency)
    return torch.cat((half, half), dim=-1)[:, None, None]


@pytest.mark.parametrize("rotated_size", [64, 16])
@pytest.mark.parametrize("scale", [1.0, YARN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cp_size", "cp_rank"), [(1, 0), (2, 0), (2, 1), (4, 2)])
def test_values_and_gradients_are_megatrons(cp_size, cp_rank, dtype, scale, rotated_size):
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    from megatron_vespo.trainer.attention import PackedSequences

    torch.manual_seed(0)
    table, cu_seqlens = angles(rotated_size), torch.from_numpy(BOUNDS)
    pack = PackedSequences.of(cu_seqlens, max(LENGTHS), TokenLayout(cp_size, cp_rank), use_kernel=False)
    pack.rotate_by(table, scale, dtype)
    values = torch.randn(sum(LENGTHS) // cp_size, 4, 64).to(dtype).requires_grad_()
    upstream = torch.randn(values.shape).to(dtype)
    config = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    group = SimpleNamespace(size=lambda: cp_size, rank=lambda: cp_rank)
    theirs = apply_rotary_pos_emb(values, table, config, cu_seqlens, mscale=scale, cp_group=group)
    ours = pack.rotation(values)
    assert ours.dtype == dtype and not torch.equal(ours, values)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, values, upstream)[0],
        torch.autograd.grad(theirs, values, upstream)[0],
        rtol=0,
        atol=0,
    )


def test_the_angles_are_gathered_once_for_all_layers():
    from megatron_vespo.trainer.attention import PackedSequences

    pack = PackedSequences.of(torch.from_numpy(BOUNDS), max(LENGTHS), TokenLayout(), use_kernel=False)
    assert pack.rotation is None
    table = angles(16)
    pack.rotate_by(table, 1.0, torch.float32)
    first = pack.rotation
    pack.rotate_by(table, 1.0, torch.float32)
    assert pack.rotation is first
    pack.rotate_by(table.clone(), 1.0, torch.float32)
    assert pack.rotation is not first
    pack.rotate_by(None, 1.0, torch.float32)  # a layer without RoPE
    assert pack.rotation is None
