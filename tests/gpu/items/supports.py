"""Log-probs over the supports of truncated sampling with the Triton kernels: right, and what they cost."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_vespo.algorithms.supports import Supports
from tests.gpu.items.context import Context, Figures
from tests.gpu.items.kernels import NAMES, SMALL, WHOLE, inputs, run


def values(context: Context) -> Figures:
    """fp32 against all logits in float64 on the CPU; of three tokens one has no support, one a single id."""
    num_tokens, vocab_size = context.size((97, 5003), (13, 1003))
    fields = inputs(num_tokens, vocab_size, 64, torch.float32, context.device)
    number_T1 = torch.arange(num_tokens)[:, None] % 3
    allowed_TV = (torch.rand(num_tokens, vocab_size) < 0.01) & (number_T1 == 0) | (number_T1 == 1)
    allowed_TV.scatter_(1, fields[2].cpu()[:, None], True)
    supports = _supports(allowed_TV, context.device)
    alone_T = number_T1[:, 0] == 2
    figures: Figures = {}
    for chunk_size in context.size((3, 64, 1000), (4,)):
        for num_upstream in (1, 2):
            grads = tuple(torch.randn(num_upstream, num_tokens, device=context.device))
            results = [one.cpu() for one in run(fields, grads, chunk_size, supports=supports)]
            expected = _in_float64([field.detach().cpu() for field in fields], grads, allowed_TV)
            for name, result, reference in zip(NAMES, results, expected, strict=True):
                torch.testing.assert_close(
                    result, reference, check_dtype=False, rtol=1e-4, atol=2e-5,
                    msg=lambda text, where=f"{name}, chunk size {chunk_size}": f"{where}: {text}",
                )  # fmt: skip
                key = f"{name}: largest error"
                figures[key] = max(float((result - reference).abs().max()), figures.get(key, 0.0))
            assert all((result[alone_T] == 0).all() for result in results[:3]), (
                "a certain token is not certain"
            )
    return figures


def speed(context: Context) -> Figures:
    """Forward and backward with supports of 10 and 200 ids on average beside those without."""
    num_tokens, vocab_size, hidden, chunk_size = context.size(WHOLE, SMALL)
    fields = inputs(num_tokens, vocab_size, hidden, torch.bfloat16, context.device)
    grads = (torch.randn(num_tokens, device=context.device),)
    figures: Figures = {}
    for mean in (0, 10, 200):
        supports = None
        if mean:
            counts_T = torch.randint(1, 2 * mean, (num_tokens,), device=context.device)
            # the same id may come twice: that costs as much
            ids_M = torch.randint(0, vocab_size, (int(counts_T.sum()),), device=context.device)
            supports = Supports.of(counts_T, ids_M)
        step = partial(run, fields, grads, chunk_size, supports=supports)
        figures[f"{mean or 'no'} ids: ms"] = round(context.milliseconds(step), 2)
    return figures


def _supports(allowed_TV: Tensor, device: str) -> Supports:
    counts_T = allowed_TV.sum(1)
    restricted_T = counts_T < allowed_TV.shape[1]
    ids_M = allowed_TV[restricted_T].nonzero()[:, 1]
    return Supports.of((counts_T * restricted_T).to(device), ids_M.to(device))


def _in_float64(fields: list[Tensor], grads: tuple[Tensor, ...], allowed_TV: Tensor) -> tuple[Tensor, ...]:
    """Log-probs, entropies, and the gradients of hidden states and weight, by the definition."""
    hidden_TH, weight_VH = (field.double().requires_grad_() for field in fields[:2])
    logits_TV = hidden_TH @ weight_VH.t() / fields[3].double()[:, None]
    log_p_TV = logits_TV.masked_fill(~allowed_TV, -torch.inf).log_softmax(-1)
    entropy_T = -(log_p_TV.exp() * log_p_TV.masked_fill(~allowed_TV, 0.0)).sum(-1)
    both = log_p_TV.gather(1, fields[2][:, None])[:, 0], entropy_T
    upstream = [grad.cpu().double() for grad in grads]
    return *both, *torch.autograd.grad(both[: len(grads)], (hidden_TH, weight_VH), upstream)
