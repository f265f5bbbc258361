"""bf16 matmuls whose result is not rounded to bf16: what the log-probs gain, and at which price."""

from __future__ import annotations

import torch

from tests.gpu.items.context import Context, Figures, teraflops

# a tile of the output layer of Qwen3-30B-A3B
TOKENS, WIDTH, HIDDEN = 4096, 18_944, 2048
COMPARED = 256  # tokens whose logits are also computed in float64


def fp32_logits(context: Context) -> Figures:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda").bfloat16()
    weight = (3 * HIDDEN**-0.5 * torch.randn(WIDTH, HIDDEN, device="cuda")).bfloat16()
    ways = {
        "bf16 result": lambda: torch.mm(hidden, weight.t()),
        "fp32 result": lambda: torch.mm(hidden, weight.t(), out_dtype=torch.float32),
    }
    exact = (hidden[:COMPARED].double() @ weight.double().t()).log_softmax(-1)
    figures: Figures = {}
    for name, product in ways.items():
        elapsed = context.milliseconds(product)
        log_probs = product()[:COMPARED].double().log_softmax(-1)
        error = (log_probs - exact).abs()
        figures |= {
            f"{name}: ms": round(elapsed, 3),
            f"{name}: TFLOP/s": teraflops(2 * TOKENS * WIDTH * HIDDEN, elapsed),
            f"{name}: mean error of a log-prob": float(error.mean()),
            f"{name}: largest error": float(error.max()),
        }
    assert figures["fp32 result: largest error"] < 1e-4
    return figures
