"""Whether a mixture of experts computes the same twice: the sum over a token's experts, and the routes."""

from __future__ import annotations

from functools import partial

import torch

from tests.gpu.items.context import Context, Figures

EXPERTS, CHOSEN = 128, 8  # Qwen3-30B-A3B
PASSES = 10


def _sizes(context: Context) -> tuple[int, int]:
    """Tokens and hidden size."""
    return context.size((8192, 2048), (64, 128))


def unpermute_passes(context: Context) -> Figures:
    """Megatron's unpermute, whose atomics add a token's eight outputs in no fixed order; and without them."""
    from megatron.core.transformer.moe.moe_utils import permute, unpermute

    num_tokens, hidden = _sizes(context)
    torch.manual_seed(0)
    scores = torch.randn(num_tokens, EXPERTS, device=context.device)
    routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(CHOSEN).indices, True)
    tokens = torch.randn(num_tokens, hidden, device=context.device).bfloat16()
    _, _, order, *_ = permute(tokens, routing_map, num_out_tokens=num_tokens * CHOSEN)
    outputs = torch.randn(num_tokens * CHOSEN, hidden, device=context.device).bfloat16()
    exact = torch.zeros(num_tokens, hidden, device=context.device, dtype=torch.float64)
    exact.index_add_(0, order, outputs.double())
    # a stable sort by token has each token's outputs side by side: one sum in one order
    by_token = order.argsort(stable=True)
    ways = {
        "scatter_add": partial(unpermute, outputs, order, tokens.shape),
        "sorted sum": lambda: outputs[by_token].view(num_tokens, CHOSEN, hidden).sum(1),
    }
    figures = _passes(context, ways, exact)
    torch.use_deterministic_algorithms(True)
    return figures | _passes(context, {"deterministic index_add": ways["scatter_add"]}, exact)


def _passes(context: Context, ways: dict, exact: torch.Tensor) -> Figures:
    figures: Figures = {}
    for name, function in ways.items():
        first = function()
        others = [function() for _ in range(PASSES - 1)]
        error = float((first.double() - exact).norm() / exact.norm())
        assert error < 1e-2, f"{name} is {error:.1e} from the sum in float64"
        figures |= {
            f"{name}: share of values that differ": max(float((o != first).float().mean()) for o in others),
            f"{name}: largest difference": max(float((o - first).abs().max()) for o in others),
            f"{name}: error": error,
            f"{name}: ms": round(context.milliseconds(function), 4),
        }
    return figures


def router(context: Context) -> Figures:
    """Routes of the same tokens: repeated, and in smaller batches, for which cuBLAS may sum otherwise."""
    num_tokens, hidden = _sizes(context)
    torch.manual_seed(0)
    tokens = torch.randn(num_tokens, hidden, device=context.device).bfloat16()
    weight = (hidden**-0.5 * torch.randn(EXPERTS, hidden, device=context.device)).bfloat16()
    figures: Figures = {}
    for dtype in (torch.bfloat16, torch.float32):
        logits = [tokens.to(dtype) @ weight.to(dtype).t() for _ in range(2)]
        cut = torch.cat([part.to(dtype) @ weight.to(dtype).t() for part in tokens.split(num_tokens // 32)])
        chosen = [each.topk(CHOSEN, sorted=True).indices for each in (*logits, cut)]
        name = str(dtype).removeprefix("torch.")
        figures |= {
            f"{name}: logits that differ, repeated": float((logits[0] != logits[1]).float().mean()),
            f"{name}: tokens with other routes, repeated": _other_routes(chosen[0], chosen[1]),
            f"{name}: logits that differ, smaller batches": float((logits[0] != cut).float().mean()),
            f"{name}: tokens with other routes, smaller batches": _other_routes(chosen[0], chosen[2]),
            f"{name}: tokens with ties at the last expert": _ties(logits[0]),
        }
    return figures


def _other_routes(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.sort(1).values != b.sort(1).values).any(1).float().mean())


def _ties(logits: torch.Tensor) -> float:
    values = logits.topk(CHOSEN + 1, sorted=True).values
    return float((values[:, -1] == values[:, -2]).float().mean())
