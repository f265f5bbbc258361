"""The stand-in for SGLang's FP8 multiplication against sums of one product after another."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vespo.checkpoints.block_fp8 import quantise

pytest.importorskip("megatron_vespo_cpu")
BLOCK = [128, 128]


def rounded(value: float) -> float:
    """To e4m3: three bits of mantissa, nearest even, 2^-9 apart below 2^-6, at most 448."""
    exponent = max(math.frexp(value)[1] - 1, -6)
    step = math.ldexp(1.0, exponent - 3)
    return math.copysign(min(round(abs(value) / step) * step, 448.0), value)


def test_activations_are_rounded_per_token_and_128_columns():
    from megatron_vespo_cpu.sglang_fp8 import quantised_activations

    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-3], [1.0], [30.0]]
    )
    x[1, 128:] *= 1000
    x = x.bfloat16()
    found = quantised_activations(x)
    for token in range(3):
        for group in (slice(0, 128), slice(128, 256)):
            values = x[token, group].float()
            scale = float(values.abs().max() / 448)
            expected = [rounded(float(value / torch.tensor(scale))) * scale for value in values]
            torch.testing.assert_close(found[token, group], torch.tensor(expected), rtol=1e-6, atol=0)
    assert not found.equal(x.float())
    assert quantised_activations(torch.zeros(1, 128)).eq(0).all()


def test_a_layer_multiplies_what_is_dequantised():
    from megatron_vespo_cpu.sglang_fp8 import block_fp8_linear, quantised_activations

    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(256, 384, generator=draw) * torch.logspace(-2, 1, 256)[:, None]
    values, scales = quantise(weights)
    x = torch.randn(2, 3, 384, generator=draw).bfloat16()
    found = block_fp8_linear(x, values, BLOCK, scales.float())
    assert found.dtype == torch.bfloat16 and found.shape == (2, 3, 256)
    for row in (0, 127, 128, 255):
        scale = scales[row // 128].double().repeat_interleave(128)
        products = quantised_activations(x).double() * (values[row].double() * scale)
        torch.testing.assert_close(found[..., row].double(), products.sum(-1), rtol=2**-8, atol=1e-3)
    bias = torch.full((256,), 2.0, dtype=torch.bfloat16)
    assert block_fp8_linear(x, values, BLOCK, scales.float(), bias=bias).equal(found + bias)
    with pytest.raises(NotImplementedError):
        block_fp8_linear(x, values, BLOCK, scales.float(), input_scale=torch.ones(1))
