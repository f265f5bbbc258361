"""Inputs of `linear_log_probs`, its definition, and bounds of the difference."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_vespo.algorithms.linear_log_probs import linear_log_probs

T, H, VOCAB_SIZE, PADDING = 23, 8, 31, 6
V = VOCAB_SIZE + PADDING


def naive(hidden_TH, weight_VH, labels_T, temperature_T, vocab_size):
    """The definition, in the inputs' dtype."""
    logits_TV = (hidden_TH @ weight_VH.t())[:, :vocab_size] / temperature_T.to(hidden_TH.dtype)[:, None]
    log_p_TV = torch.log_softmax(logits_TV, dim=-1)
    return log_p_TV[range(len(labels_T)), labels_T], -(log_p_TV.exp() * log_p_TV).sum(-1)


def inputs(
    dtype=torch.float64, num_tokens=T, scale=2.0, hidden_size=H, vocab_size=VOCAB_SIZE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels (both ends of the vocabulary among them) and temperatures."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    hidden_TH, weight_VH = scale * normal(num_tokens, hidden_size), normal(vocab_size + PADDING, hidden_size)
    labels_T = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    labels_T[:2] = torch.tensor([0, vocab_size - 1])
    temperature_T = 0.3 + 1.5 * torch.rand(num_tokens, generator=generator)
    return hidden_TH.requires_grad_(), weight_VH.requires_grad_(), labels_T, temperature_T


def upstream(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(2, num_tokens, generator=generator, dtype=torch.float64).to(dtype))


def tiled(*fields, chunk_size=5, vocab_size=VOCAB_SIZE, **options):
    return linear_log_probs(*fields, vocab_size=vocab_size, group=None, chunk_size=chunk_size, **options)


def gradients(function, fields, grad_log_probs_T, grad_entropy_T=None):
    """Values, and the gradients of hidden states and weight."""
    values = function(*fields)
    pairs = [(values[0], grad_log_probs_T), (values[1], grad_entropy_T)]
    outputs, grads = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
    return *values, *torch.autograd.grad(outputs, fields[:2], grads)


NAMES = ("log_probs", "entropy", "grad_hidden", "grad_weight")


def assert_close(results, expected, **bounds):
    for name, result, reference in zip(NAMES[: len(results)], results, expected, strict=True):
        torch.testing.assert_close(
            result, reference, msg=lambda text, name=name: f"{name}: {text}", check_dtype=False, **bounds
        )


BOUNDS = {torch.float64: dict(rtol=1e-10, atol=1e-12), torch.float32: dict(rtol=1e-4, atol=2e-5)}


def check_against_all_logits(fields, grads, dtype=torch.float64, vocab_size=VOCAB_SIZE, **options):
    """Values and gradients are those of the definition in float64; they are returned."""
    results = gradients(partial(tiled, vocab_size=vocab_size, **options), fields, *grads)
    in_float64 = [field.detach().double().requires_grad_() for field in fields[:2]]
    grads = [None if grad is None else grad.double() for grad in grads]
    expected = gradients(partial(naive, vocab_size=vocab_size), (*in_float64, *fields[2:]), *grads)
    assert_close(results, expected, **BOUNDS[dtype])
    return results
