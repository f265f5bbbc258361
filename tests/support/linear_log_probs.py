"""Inputs of `linear_log_probs`, its definition, and bounds of the difference."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_vespo.algorithms.linear_log_probs import linear_log_probs
from megatron_vespo.algorithms.supports import Supports

T, H, VOCAB_SIZE, PADDING = 23, 8, 31, 6
V = VOCAB_SIZE + PADDING


def naive(hidden_TH, weight_VH, labels_T, temperature_T, vocab_size, allowed_TV=None):
    """The definition, in the inputs' dtype; `allowed_TV`, bool [T, V], are the supports, or None."""
    logits_TV = (hidden_TH @ weight_VH.t())[:, :vocab_size] / temperature_T.to(hidden_TH.dtype)[:, None]
    if allowed_TV is None:
        allowed_TV = torch.ones_like(logits_TV, dtype=torch.bool)
    log_p_TV = torch.log_softmax(logits_TV.masked_fill(~allowed_TV, -torch.inf), dim=-1)
    finite_TV = log_p_TV.masked_fill(~allowed_TV, 0.0)
    return log_p_TV[range(len(labels_T)), labels_T], -(log_p_TV.exp() * finite_TV).sum(-1)


def random_allowed(labels_T: Tensor, vocab_size: int, share: float = 0.2) -> Tensor:
    """Supports, bool [T, V], with the labels. Of four tokens one has none, one has its label alone."""
    generator = torch.Generator().manual_seed(2)
    number = torch.arange(len(labels_T))[:, None] % 4
    allowed_TV = (torch.rand(len(labels_T), vocab_size, generator=generator) < share) & (number != 1)
    return (allowed_TV | (number == 2)).scatter(1, labels_T[:, None], True)


def supports_of(allowed_TV: Tensor) -> Supports:
    """Tokens that may be all of the vocabulary have no support."""
    counts_T = allowed_TV.sum(1)
    restricted_T = counts_T < allowed_TV.shape[1]
    ids_M = allowed_TV[restricted_T].nonzero()[:, 1]
    return Supports.of((counts_T * restricted_T).int(), ids_M.int())


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


def check_against_all_logits(
    fields, grads, dtype=torch.float64, vocab_size=VOCAB_SIZE, allowed_TV=None, **options
):
    """Values and gradients are those of the definition in float64; they are returned."""
    if allowed_TV is not None:
        options["supports"] = supports_of(allowed_TV)
    results = gradients(partial(tiled, vocab_size=vocab_size, **options), fields, *grads)
    in_float64 = [field.detach().double().requires_grad_() for field in fields[:2]]
    grads = [None if grad is None else grad.double() for grad in grads]
    definition = partial(naive, vocab_size=vocab_size, allowed_TV=allowed_TV)
    expected = gradients(definition, (*in_float64, *fields[2:]), *grads)
    assert_close(results, expected, **BOUNDS[dtype])
    return results
