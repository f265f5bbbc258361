"""linear_log_probs with its Triton kernels: right, small, and how fast."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vespo.algorithms import linear_log_probs as on_torch
from megatron_vespo.algorithms.linear_log_probs import linear_log_probs
from tests.gpu.items.context import Context, Figures, gigabytes_per_second, teraflops

# tokens, rows of the vocabulary, hidden, tokens a chunk: the output layer of Qwen3-30B-A3B, whole, and one
# rank's part of it at tensor parallel size 2
WHOLE = (4096, 151_936, 2048, 512)
HALF = (15_360, 75_968, 2048, 1024)
SMALL = (24, 700, 32, 8)
NAMES = ("log_probs", "entropy", "grad_hidden", "grad_weight")


def inputs(
    num_tokens: int, vocab_size: int, hidden: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden_TH = torch.randn(num_tokens, hidden, device=device, dtype=dtype)
    weight_VH = 3 * hidden**-0.5 * torch.randn(vocab_size, hidden, device=device)
    labels_T = torch.randint(0, vocab_size, (num_tokens,), device=device)
    temperature_T = 0.3 + 1.5 * torch.rand(num_tokens, device=device)
    return hidden_TH.requires_grad_(), weight_VH.to(dtype).requires_grad_(), labels_T, temperature_T


def run(
    fields: tuple[Tensor, ...], grads: tuple[Tensor, ...], chunk_size: int, **options
) -> tuple[Tensor, ...]:
    """Values, and the gradients of hidden states and weight; a gradient of the entropy if there are two."""
    options = {"vocab_size": len(fields[1]), "group": None, "use_triton": True} | options
    values = linear_log_probs(*fields, entropy_gradient=len(grads) == 2, chunk_size=chunk_size, **options)
    return *values, *torch.autograd.grad(values[: len(grads)], fields[:2], grads)


def values(context: Context) -> Figures:
    """fp32 against all logits in float64, bf16 at full size against the torch operations."""
    figures: Figures = {}
    for chunk_size in context.size((3, 64, 1000), (64,)):
        for num_upstream in (1, 2):
            for name, error in _float32_errors(context, chunk_size, num_upstream).items():
                key = f"fp32 {name}: largest error"
                figures[key] = max(error, figures.get(key, 0.0))
    for num_upstream in (1, 2):
        for name, error in _bfloat16_errors(context, num_upstream).items():
            figures[f"bf16 {name}: relative to torch, {num_upstream} gradients"] = error
    return figures


def _float32_errors(context: Context, chunk_size: int, num_upstream: int) -> dict[str, float]:
    """Several tiles, a rest, columns that are no multiple of a block, padding, masked tokens."""
    num_tokens, vocab_size = context.size((97, 5003), (13, 1003))
    fields = inputs(num_tokens, vocab_size + 61, 64, torch.float32, context.device)
    unmasked_T = torch.arange(num_tokens, device=context.device) % 3 > 0
    grads = tuple(torch.randn(num_upstream, num_tokens, device=context.device) * unmasked_T)
    fields[2].clamp_(max=vocab_size - 1)
    results = run(fields, grads, chunk_size, vocab_size=vocab_size)

    hidden_TH, weight_VH = (field.detach().double().requires_grad_() for field in fields[:2])
    logits_TV = (hidden_TH @ weight_VH.t())[:, :vocab_size] / fields[3].double()[:, None]
    log_p_TV = torch.log_softmax(logits_TV, -1)
    both = log_p_TV.gather(1, fields[2][:, None])[:, 0], -(log_p_TV.exp() * log_p_TV).sum(-1)
    grads_in_float64 = [grad.double() for grad in grads]
    expected = *both, *torch.autograd.grad(both[:num_upstream], (hidden_TH, weight_VH), grads_in_float64)
    errors = {}
    for name, result, reference in zip(NAMES, results, expected, strict=True):
        torch.testing.assert_close(
            result, reference, check_dtype=False, rtol=1e-4, atol=2e-5,
            msg=lambda text, name=name: f"{name}, chunk size {chunk_size}: {text}",
        )  # fmt: skip
        errors[name] = float((result - reference).abs().max())
    return errors


def _bfloat16_errors(context: Context, num_upstream: int) -> dict[str, float]:
    """Both see the same fp32 logits: values differ by float32 rounding, gradients by that of bfloat16."""
    num_tokens, vocab_size, hidden, chunk_size = context.size(WHOLE, SMALL)
    fields = inputs(num_tokens, vocab_size, hidden, torch.bfloat16, context.device)
    grads = tuple(torch.randn(num_upstream, num_tokens, device=context.device))
    results, expected = (run(fields, grads, chunk_size, use_triton=triton) for triton in (True, False))
    for result, reference in zip(results[:2], expected[:2], strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-4)
    errors = {}
    for name, result, reference in zip(NAMES, results, expected, strict=True):
        errors[name] = float((result.float() - reference.float()).norm() / reference.float().norm())
        # Triton's interpreter cuts bfloat16 off where a GPU rounds it
        bound = context.size(2**-8, 2**-7)
        assert errors[name] <= bound, f"{name}: {errors[name]:.1e} from the torch operations"
    return errors


def speed(context: Context) -> Figures:
    """Each kernel beside a copy of as many bytes, the whole beside its matmuls, memory beside a chunk."""
    figures = _memory(context)
    for name, shape in (("whole", WHOLE), ("TP2", HALF)):
        measured = _kernel_times(context, *shape) | _whole_times(context, *shape)
        figures |= {f"{name}: {key}": figure for key, figure in measured.items()}
    return figures


def _memory(context: Context) -> Figures:
    """Beside the gradients: one chunk of logits, its rows of the hidden gradient, and vectors."""
    num_tokens, vocab_size, hidden, chunk_size = WHOLE
    fields = inputs(num_tokens, vocab_size, hidden, torch.bfloat16, context.device)
    grads = (torch.randn(num_tokens, device=context.device),)
    run(fields, grads, chunk_size)  # what cuBLAS and Triton keep
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run(fields, grads, chunk_size)
    grown = torch.cuda.max_memory_allocated() - before
    kept = sum(result.nbytes for result in results)
    # logits in fp32 and their gradient in bf16
    chunk, hidden_bytes = chunk_size * vocab_size * (4 + 2), num_tokens * hidden * 4
    assert grown <= kept + chunk + 4 * hidden_bytes, f"{grown} bytes"
    return {
        "peak MB": round(grown / 1e6),
        "of it results MB": round(kept / 1e6),
        "one chunk MB": round(chunk / 1e6),
        "all logits in fp32 MB": round(num_tokens * vocab_size * 4 / 1e6),
    }


def _kernel_times(
    context: Context, num_tokens: int, vocab_size: int, hidden: int, chunk_size: int
) -> Figures:
    """A copy of fp32 to bf16 reads and writes what the gradient does; the statistics only read the fp32."""
    from megatron_vespo.algorithms.log_prob_kernels import add_to_statistics, write_gradient

    device = context.device
    width = vocab_size * chunk_size // num_tokens
    width -= width % on_torch.ALIGNED_WIDTH
    logits_TW = torch.randn(num_tokens, width, device=device)
    gradient_TW = torch.empty_like(logits_TW, dtype=torch.bfloat16)
    labels_T = torch.randint(0, width, (num_tokens,), device=device)
    temperature_T = torch.ones(num_tokens, device=device)
    statistics_4T = torch.zeros(4, num_tokens, dtype=torch.float64, device=device)
    ones = [torch.ones(num_tokens, device=device) for _ in range(4)]
    times = {
        "copy": context.milliseconds(lambda: gradient_TW.copy_(logits_TW)),
        "statistics": context.milliseconds(
            lambda: add_to_statistics(statistics_4T, logits_TW, temperature_T, labels_T)
        ),
        "gradient": context.milliseconds(
            lambda: write_gradient(gradient_TW, logits_TW, temperature_T, labels_T, *ones[:2])
        ),
        "gradient with entropy": context.milliseconds(
            lambda: write_gradient(gradient_TW, logits_TW, temperature_T, labels_T, *ones)
        ),
    }
    assert gradient_TW.isfinite().all()
    figures: Figures = {f"{name} ms a tile": round(elapsed, 4) for name, elapsed in times.items()}
    figures["copy GB/s"] = gigabytes_per_second(logits_TW.nbytes + gradient_TW.nbytes, times["copy"])
    figures["statistics, share of the limit"] = round(times["copy"] * 2 / 3 / times["statistics"], 3)
    figures["gradient, share of the limit"] = round(times["copy"] / times["gradient"], 3)
    return figures


def _whole_times(context: Context, num_tokens: int, vocab_size: int, hidden: int, chunk_size: int) -> Figures:
    """Forward and backward beside the four matmuls of full size that they need."""
    fields = inputs(num_tokens, vocab_size, hidden, torch.bfloat16, context.device)
    hidden_TH, weight_VH = (field.detach() for field in fields[:2])
    upstream_T = torch.randn(num_tokens, device=context.device)
    gradient_TV = hidden_TH @ weight_VH.t()
    logits_TV = torch.empty_like(gradient_TV, dtype=torch.float32)
    forward = context.milliseconds(
        lambda: torch.mm(hidden_TH, weight_VH.t(), out_dtype=torch.float32, out=logits_TV)
    )
    matmuls = 2 * forward + sum(
        context.milliseconds(product)
        for product in (lambda: gradient_TV @ weight_VH, lambda: gradient_TV.t() @ hidden_TH)
    )
    options = {"vocab_size": vocab_size, "group": None, "chunk_size": chunk_size}

    def forward_only():
        with torch.no_grad():
            linear_log_probs(*fields, **options)

    whole = {
        name: context.milliseconds(
            lambda triton=triton: run(fields, (upstream_T,), chunk_size, use_triton=triton)
        )
        for name, triton in (("Triton", True), ("torch", False))
    }
    return {
        "matmuls ms": round(matmuls, 2),
        "matmuls TFLOP/s": teraflops(8 * num_tokens * vocab_size * hidden, matmuls),
        "forward ms": round(context.milliseconds(forward_only), 2),
        **{f"forward and backward ms, {name}": round(elapsed, 2) for name, elapsed in whole.items()},
        "Triton, share of the matmuls": round(matmuls / whole["Triton"], 3),
    }
