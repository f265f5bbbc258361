"""linear_log_probs with its Triton kernels on a GPU: right, small, and how fast (pytest -s prints it)."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_vespo.algorithms import linear_log_probs as on_torch
from megatron_vespo.algorithms.linear_log_probs import linear_log_probs

# the output layer of Qwen3-30B-A3B
T, V, H = 4096, 151936, 2048
CHUNK_SIZE = 512
TIMED_RUNS = 10


def inputs(num_tokens: int, vocab_size: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden_TH = torch.randn(num_tokens, hidden, device="cuda", dtype=dtype)
    weight_VH = 3 * hidden**-0.5 * torch.randn(vocab_size, hidden, device="cuda")
    labels_T = torch.randint(0, vocab_size, (num_tokens,), device="cuda")
    temperature_T = 0.3 + 1.5 * torch.rand(num_tokens, device="cuda")
    return hidden_TH.requires_grad_(), weight_VH.to(dtype).requires_grad_(), labels_T, temperature_T


def run(fields: tuple[Tensor, ...], grads: tuple[Tensor, ...], **options) -> tuple[Tensor, ...]:
    """Values, and the gradients of hidden states and weight; a gradient of the entropy if there are two."""
    options = {"vocab_size": len(fields[1]), "group": None, "chunk_size": CHUNK_SIZE} | options
    values = linear_log_probs(*fields, entropy_gradient=len(grads) == 2, **options)
    return *values, *torch.autograd.grad(values[: len(grads)], fields[:2], grads)


@pytest.mark.parametrize("chunk_size", [3, 64, 1000])
@pytest.mark.parametrize("num_upstream", [1, 2])
def test_float32_against_all_logits_in_float64(chunk_size, num_upstream):
    """Several tiles, a rest, columns that are no multiple of a block, padding, masked tokens."""
    vocab_size = 5003
    fields = inputs(97, vocab_size + 61, 64, torch.float32)
    grads = tuple(torch.randn(num_upstream, 97, device="cuda") * (torch.arange(97, device="cuda") % 3 > 0))
    fields[2].clamp_(max=vocab_size - 1)
    results = run(fields, grads, vocab_size=vocab_size, chunk_size=chunk_size)

    hidden_TH, weight_VH = (field.detach().double().requires_grad_() for field in fields[:2])
    logits_TV = (hidden_TH @ weight_VH.t())[:, :vocab_size] / fields[3].double()[:, None]
    log_p_TV = torch.log_softmax(logits_TV, -1)
    values = log_p_TV.gather(1, fields[2][:, None])[:, 0], -(log_p_TV.exp() * log_p_TV).sum(-1)
    grads_in_float64 = [grad.double() for grad in grads]
    expected = (
        *values,
        *torch.autograd.grad(values[:num_upstream], (hidden_TH, weight_VH), grads_in_float64),
    )
    for name, result, reference in zip(
        ("log_probs", "entropy", "grad_hidden", "grad_weight"), results, expected, strict=True
    ):
        torch.testing.assert_close(
            result,
            reference,
            check_dtype=False,
            rtol=1e-4,
            atol=2e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("num_upstream", [1, 2])
def test_bfloat16_at_full_size_against_the_torch_operations(num_upstream):
    """Both see the same logits: values differ by float32 rounding, gradients by that of bfloat16."""
    fields = inputs(T, V, H, torch.bfloat16)
    grads = tuple(torch.randn(num_upstream, T, device="cuda"))
    with_kernels, with_torch = (run(fields, grads, use_triton=use_triton) for use_triton in (True, False))
    for result, reference in zip(with_kernels[:2], with_torch[:2], strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-4)
    for result, reference in zip(with_kernels[2:], with_torch[2:], strict=True):
        assert (result.float() - reference.float()).norm() <= 2**-8 * reference.float().norm()


def test_memory_is_that_of_a_chunk():
    """Beside the gradients: one chunk of logits, its rows of the hidden gradient, and vectors."""
    fields = inputs(T, V, H, torch.bfloat16)
    grads = (torch.randn(T, device="cuda"),)
    run(fields, grads)  # what cuBLAS and Triton keep
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(fields, grads)
    grown = torch.cuda.max_memory_allocated() - before
    kept = sum(result.nbytes for result in results)
    chunk = CHUNK_SIZE * V * 2
    hidden = T * H * 4
    print(f"\npeak {grown / 1e6:.0f} MB: results {kept / 1e6:.0f} MB, chunk {chunk / 1e6:.0f} MB; all logits "
          f"in float32 would be {T * V * 4 / 1e6:.0f} MB")  # fmt: skip
    assert grown <= kept + chunk + 4 * hidden


def milliseconds(function: Callable[[], object]) -> float:
    """Median of TIMED_RUNS runs after two for warming up."""
    times = []
    for run_index in range(2 + TIMED_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        if run_index >= 2:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_kernels_keep_up_with_a_copy(entropy_gradient):
    """Prints each kernel's time beside that of a copy which moves as many bytes."""
    from megatron_vespo.algorithms.log_prob_kernels import add_to_statistics, to_gradient_

    width = V * CHUNK_SIZE // T
    width -= width % on_torch.ALIGNED_WIDTH
    logits_TW = torch.randn(T, width, device="cuda", dtype=torch.bfloat16)
    copy_TW = torch.empty_like(logits_TW)
    labels_T = torch.randint(0, width, (T,), device="cuda")
    temperature_T = torch.ones(T, device="cuda")
    statistics_4T = torch.zeros(4, T, dtype=torch.float64, device="cuda")
    fields = [torch.ones(T, device="cuda") for _ in range(4 if entropy_gradient else 2)]

    # a copy reads and writes each byte once: so does the gradient; the statistics are only read
    copy = milliseconds(lambda: copy_TW.copy_(logits_TW))
    forward = milliseconds(lambda: add_to_statistics(statistics_4T, logits_TW, temperature_T, labels_T))
    backward = milliseconds(lambda: to_gradient_(logits_TW, temperature_T, labels_T, *fields))
    bandwidth = 2 * logits_TW.nbytes / copy / 1e6
    print(
        f"\ntile [{T}, {width}] bfloat16: copy {copy:.3f} ms ({bandwidth:.0f} GB/s)"
        f"\nstatistics {forward:.3f} ms, at the copy's bandwidth {copy / 2:.3f} ms: {copy / 2 / forward:.0%}"
        f"\ngradient   {backward:.3f} ms, at the copy's bandwidth {copy:.3f} ms: {copy / backward:.0%}"
    )
    assert logits_TW.isfinite().all()


def test_the_whole_beside_its_matmuls():
    """Prints forward and backward beside the four matmuls of full size that they need."""
    fields = inputs(T, V, H, torch.bfloat16)
    hidden_TH, weight_VH = (field.detach() for field in fields[:2])
    upstream_T = torch.randn(T, device="cuda")
    logits_TV = hidden_TH @ weight_VH.t()
    matmuls = (
        2 * milliseconds(lambda: torch.mm(hidden_TH, weight_VH.t(), out=logits_TV))
        + milliseconds(lambda: logits_TV @ weight_VH)
        + milliseconds(lambda: logits_TV.t() @ hidden_TH)
    )
    for use_triton in (True, False):
        whole = milliseconds(lambda use_triton=use_triton: run(fields, (upstream_T,), use_triton=use_triton))
        print(
            f"\n{'Triton' if use_triton else 'torch'}: {whole:.1f} ms, its matmuls alone {matmuls:.1f} ms "
            f"({8e-9 * T * V * H / matmuls:.0f} TFLOP/s): x{whole / matmuls:.2f}"
        )
