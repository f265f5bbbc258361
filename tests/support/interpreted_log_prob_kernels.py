"""Tests of the Triton kernels on the CPU, in Triton's interpreter; run by test_log_prob_kernels.py.

Against the torch operations and all logits at once. Not collected with the others, which may have imported
Triton without the interpreter.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_vespo.algorithms import linear_log_probs as on_torch
from megatron_vespo.algorithms import log_prob_kernels as on_triton
from tests.support.linear_log_probs import (
    BOUNDS,
    VOCAB_SIZE,
    T,
    assert_close,
    check_against_all_logits,
    gradients,
    inputs,
    random_allowed,
    tiled,
    upstream,
)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("chunk_size", [3, 30])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_values_and_gradients_are_those_of_all_logits(dtype, chunk_size, entropy_gradient):
    options = {"chunk_size": chunk_size, "entropy_gradient": entropy_gradient, "use_triton": True}
    check_against_all_logits(inputs(dtype), upstream(T, dtype)[: 1 + entropy_gradient], dtype, **options)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("chunk_size", [3, 30])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_supports_are_those_of_all_logits(dtype, chunk_size, entropy_gradient):
    """The kernels see tiles whose logits outside of the supports are OUTSIDE; some rows have no others."""
    fields = inputs(dtype)
    options = {"chunk_size": chunk_size, "entropy_gradient": entropy_gradient, "use_triton": True}
    options["allowed_TV"] = random_allowed(fields[2], VOCAB_SIZE, 0.1)
    results = check_against_all_logits(fields, upstream(T, dtype)[: 1 + entropy_gradient], dtype, **options)
    alone_T = torch.arange(T) % 4 == 1
    assert all((result[alone_T] == 0).all() for result in results[:3]), "they are certain"


def test_bfloat16_inputs_make_the_logits_of_float32():
    fields = inputs(torch.bfloat16)
    grads = [grad.float() for grad in upstream(T, torch.float64)]
    function = partial(tiled, entropy_gradient=True)
    results = gradients(partial(function, use_triton=True), fields, *grads)
    expected = gradients(function, fields, *grads)
    assert_close(results[:2], expected[:2], rtol=1e-5, atol=1e-5)
    for result, reference in zip(results[2:], expected[2:], strict=True):
        # Triton's interpreter cuts bfloat16 off where a GPU rounds it
        assert (result - reference).float().norm() <= 2**-7 * reference.float().norm()


def test_masked_tokens_and_rows_of_padding():
    fields = inputs()
    fields[2][5] = -100
    grad_T = upstream(T, torch.float64)[0]
    grad_T[5:9] = 0
    results = gradients(partial(tiled, use_triton=True), fields, grad_T)
    assert_close(results, gradients(tiled, fields, grad_T), **BOUNDS[torch.float64])


def test_no_tokens():
    hidden_TH, weight_VH, labels_T, temperature_T = inputs()
    log_probs_T, _ = tiled(hidden_TH[:0], weight_VH, labels_T[:0], temperature_T[:0], use_triton=True)
    assert log_probs_T.shape == (0,)
    (grad_weight_VH,) = torch.autograd.grad(log_probs_T.sum(), weight_VH)
    assert (grad_weight_VH == 0).all()


def tile(width: int):
    """Logits [5, W]; labels left of it, in it (first, inner, last column) and right of it; temperatures."""
    generator = torch.Generator().manual_seed(width)
    logits_TW = 4 * torch.randn(5, width, generator=generator)
    labels_T = torch.tensor([-3, 0, width // 2, width - 1, width])
    return logits_TW, labels_T, 0.3 + torch.rand(5, generator=generator)


# one column, less than a block, a block, several and a rest
WIDTHS = [1, 37, 4096, 2 * 4096 + 3]


@pytest.mark.parametrize("width", WIDTHS)
def test_statistics_of_tiles_are_those_of_torch(width):
    """Two tiles merged, the second with the larger logits, then with the smaller ones."""
    for shift in (20.0, -20.0):
        statistics = []
        for add in (on_torch._add_to_statistics, on_triton.add_to_statistics):
            statistics_4T = torch.zeros(4, 5, dtype=torch.float64)
            statistics_4T[0] = -torch.inf
            logits_TW, labels_T, temperature_T = tile(width)
            tile_TW = logits_TW.clone()
            add(statistics_4T, tile_TW, temperature_T, labels_T)
            if add == on_triton.add_to_statistics:
                assert torch.equal(tile_TW, logits_TW), "the tile is not as it was"
            add(statistics_4T, logits_TW + shift, temperature_T, labels_T - width)
            statistics.append(statistics_4T)
        torch.testing.assert_close(*statistics, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradients_of_tiles_are_those_of_torch(width, dtype, entropy_gradient):
    """The fp32 one takes the tile's place, the bf16 one has its own."""
    logits_TW, labels_T, temperature_T = tile(width)
    z_TW = logits_TW / temperature_T[:, None]
    entropy_T = torch.distributions.Categorical(logits=z_TW).entropy()
    fields = [z_TW.logsumexp(1), upstream(5, torch.float32)[0]]
    if entropy_gradient:
        fields += [entropy_T, upstream(5, torch.float32)[1]]
    results = []
    for write_gradient in (on_torch._write_gradient, on_triton.write_gradient):
        tile_TW = logits_TW.clone()
        gradient_TW = tile_TW if dtype == torch.float32 else torch.empty_like(tile_TW, dtype=dtype)
        write_gradient(gradient_TW, tile_TW, temperature_T, labels_T, *fields)
        results.append(gradient_TW)
    # a rounding of bfloat16 may go either way
    rtol = 1e-4 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(*results, rtol=rtol, atol=1e-6)
