"""Log-probs and entropies from hidden states against all logits at once, values and gradients."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vespo.algorithms.linear_log_probs import CACHED_ELEMENTS, _exp
from tests.support.linear_log_probs import (
    BOUNDS,
    PADDING,
    VOCAB_SIZE,
    T,
    V,
    assert_close,
    check_against_all_logits,
    gradients,
    inputs,
    naive,
    tiled,
    upstream,
)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("chunk_size", [1, 5, T - 1, T, T + 7])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_values_and_gradients_are_those_of_all_logits(dtype, chunk_size, entropy_gradient):
    grads = upstream(T, dtype)[: 1 + entropy_gradient]
    options = {"chunk_size": chunk_size, "entropy_gradient": entropy_gradient}
    results = check_against_all_logits(inputs(dtype), grads, dtype, **options)
    assert [result.dtype for result in results] == [torch.float64] * 2 + [dtype] * 2
    assert (results[3][VOCAB_SIZE:] == 0).all(), "padding rows got a gradient"


def test_tiles_are_aligned_and_end_anywhere():
    """A vocabulary of several aligned tiles and a rest."""
    vocab_size = 3 * 128 + 45
    fields = inputs(num_tokens=6, vocab_size=vocab_size)
    fields[2][:] = torch.tensor([0, 127, 128, 383, 384, vocab_size - 1])
    grads = upstream(6, torch.float64)
    check_against_all_logits(fields, grads, vocab_size=vocab_size, chunk_size=2, entropy_gradient=True)


def test_a_tile_larger_than_the_cached_block():
    num_tokens, vocab_size = 700, 400
    assert CACHED_ELEMENTS < num_tokens * vocab_size < 2 * CACHED_ELEMENTS
    fields, grads = (
        inputs(num_tokens=num_tokens, hidden_size=4, vocab_size=vocab_size),
        upstream(700, torch.float64),
    )
    options = {"vocab_size": vocab_size, "chunk_size": num_tokens, "entropy_gradient": True}
    check_against_all_logits(fields, grads, **options)


@pytest.mark.long
@pytest.mark.parametrize("chunk_size", [2, 100])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_gradcheck(chunk_size, entropy_gradient):
    hidden_TH, weight_VH, labels_T, temperature_T = inputs(num_tokens=6, scale=0.5)

    def function(*layer):
        options = {"chunk_size": chunk_size, "entropy_gradient": entropy_gradient}
        return tiled(*layer, labels_T, temperature_T, **options)[: 1 + entropy_gradient]

    assert torch.autograd.gradcheck(function, (hidden_TH, weight_VH))


def test_entropy_has_no_gradient_unless_asked_for():
    log_probs_T, entropy_T = tiled(*inputs())
    assert log_probs_T.requires_grad and not entropy_T.requires_grad
    log_probs_T, entropy_T = tiled(*inputs(), entropy_gradient=True)
    assert log_probs_T.requires_grad and entropy_T.requires_grad


def test_gradient_of_the_entropy_alone():
    grads = None, upstream(T, torch.float64)[1]
    check_against_all_logits(inputs(), grads, entropy_gradient=True)


@pytest.mark.parametrize("masked", ["some", "all"])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_masked_tokens_change_nothing(masked, entropy_gradient):
    """Their hidden states get no gradient, whatever they hold; the others' results are as without them."""
    fields = inputs()
    mask_T = torch.arange(T) % 3 == 0 if masked == "some" else torch.zeros(T, dtype=torch.bool)
    grads = upstream(T, torch.float64)[: 1 + entropy_gradient]
    function = partial(tiled, entropy_gradient=entropy_gradient)
    results = gradients(function, fields, *(g * mask_T for g in grads))
    kept = (fields[0].detach()[mask_T].requires_grad_(), fields[1], *(f[mask_T] for f in fields[2:]))
    expected = gradients(partial(naive, vocab_size=VOCAB_SIZE), kept, *(g[mask_T] for g in grads))
    assert (results[2][~mask_T] == 0).all()
    assert_close((*(r[mask_T] for r in results[:3]), results[3]), expected, **BOUNDS[torch.float64])


def test_a_masked_token_with_nan_hidden_states_spoils_no_gradient():
    fields = inputs()
    with torch.no_grad():
        fields[0][3] = torch.nan
    grad_T = upstream(T, torch.float64)[0]
    grad_T[3] = 0
    log_probs_T, _, grad_hidden_TH, grad_weight_VH = gradients(tiled, fields, grad_T)
    assert log_probs_T.isnan().nonzero().tolist() == [[3]]
    assert grad_hidden_TH.isfinite().all() and grad_weight_VH.isfinite().all()


def test_a_nan_upstream_stays_visible():
    grad_T = upstream(T, torch.float64)[0]
    grad_T[3] = torch.nan
    _, _, grad_hidden_TH, grad_weight_VH = gradients(tiled, inputs(), grad_T)
    assert grad_hidden_TH.isnan().any(1).nonzero().tolist() == [[3]]
    assert grad_weight_VH[:VOCAB_SIZE].isnan().all()


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_only_needed_gradients_are_computed(needed):
    fields, grad_T = inputs(), upstream(T, torch.float64)[0]
    for field, need in zip(fields[:2], needed, strict=True):
        field.requires_grad_(need)
    values = tiled(*fields)
    assert_close(values, naive(*fields, VOCAB_SIZE), **BOUNDS[torch.float64])
    assert values[0].requires_grad == any(needed)
    if any(needed):
        values[0].backward(grad_T)
    both = gradients(tiled, inputs(), grad_T)[2:]
    for field, need, expected in zip(fields[:2], needed, both, strict=True):
        assert (field.grad is not None) == need
        if need:
            torch.testing.assert_close(field.grad, expected)


class LargestTensor(TorchDispatchMode):
    """Watches every operation, the backward's too, for the most elements of a result."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_no_tensor_has_more_logits_than_a_chunk(entropy_gradient):
    num_tokens, vocab_size, hidden, chunk_size = 64, 1000, 4, 8
    fields = inputs(torch.float32, num_tokens, hidden_size=hidden, vocab_size=vocab_size)
    function = partial(tiled, chunk_size=chunk_size, vocab_size=vocab_size, entropy_gradient=entropy_gradient)
    with LargestTensor() as largest:
        gradients(function, fields, *torch.randn(1 + entropy_gradient, num_tokens))
    assert vocab_size * hidden <= largest.num_elements <= chunk_size * (vocab_size + PADDING)


def test_no_tokens():
    fields = inputs()
    none = (fields[0][:0], fields[1], fields[2][:0], fields[3][:0])
    log_probs_T, entropy_T = tiled(*none)
    assert log_probs_T.shape == entropy_T.shape == (0,)
    (grad_weight_VH,) = torch.autograd.grad(log_probs_T.sum(), fields[1])
    assert (grad_weight_VH == 0).all()


@pytest.mark.parametrize("label", [-1, -100, VOCAB_SIZE, V - 1, V, 10**6])
def test_a_label_outside_the_vocabulary_has_no_probability(label):
    fields = inputs()
    fields[2][4] = label
    log_probs_T, _ = tiled(*fields)
    assert log_probs_T.isneginf().nonzero().tolist() == [[4]]


def test_extreme_logits_are_finite():
    """Logits of +-1e4: one token certain, the others' probability exactly 0."""
    hidden_TH = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight_VH = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    for chunk_size, labels in itertools.product([1, 3], [[0, 1, 2], [1, 0, 2]]):
        fields = hidden_TH, weight_VH, torch.tensor(labels), torch.ones(3)
        options = {"chunk_size": chunk_size, "vocab_size": 3, "entropy_gradient": True}
        log_probs_T, entropy_T = tiled(*fields, **options)
        uniform = -torch.tensor(3.0).log().item()
        certain = 0.0 if labels == [0, 1, 2] else -2e4
        assert log_probs_T.tolist() == pytest.approx([certain, certain, uniform])
        assert entropy_T.tolist() == pytest.approx([0.0, 0.0, -uniform])
        grads = torch.autograd.grad(log_probs_T.sum() + entropy_T.sum(), (hidden_TH, weight_VH))
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("logit_sd", [4.0, 6.0])
def test_log_probs_of_bfloat16_inputs_are_exact_to_float32(logit_sd):
    """Against float64 on the same bfloat16 numbers. Logits of 16 to 32 rounded to bfloat16 would be off by up
    to 0.06; a gradient, as a whole, is off by about one rounding to bfloat16.
    """
    num_tokens, vocab_size, hidden = 64, 2000, 256
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(num_tokens, hidden, generator=generator).bfloat16()
    weight_VH = (logit_sd * hidden**-0.5 * torch.randn(vocab_size, hidden, generator=generator)).bfloat16()
    labels_T = (
        (hidden_TH.float() @ weight_VH.float().t()).softmax(1).multinomial(1, generator=generator)[:, 0]
    )
    temperature_T = 0.7 + 0.6 * torch.rand(num_tokens, generator=generator)
    fields = hidden_TH.requires_grad_(), weight_VH.requires_grad_(), labels_T, temperature_T
    grads = [g.float() for g in upstream(num_tokens, torch.float64)]
    function = partial(tiled, vocab_size=vocab_size, chunk_size=7, entropy_gradient=True)
    results = gradients(function, fields, *grads)
    in_float64 = [f.detach().double().requires_grad_() for f in fields[:2]]
    expected = gradients(
        partial(naive, vocab_size=vocab_size), (*in_float64, *fields[2:]), *(g.double() for g in grads)
    )
    assert [result.dtype for result in results] == [torch.float64] * 2 + [torch.bfloat16] * 2
    assert (results[0] - expected[0]).abs().max() < 1e-5
    assert (results[1] - expected[1]).abs().max() < 2e-5
    for result, reference in zip(results[2:], expected[2:], strict=True):
        assert (result - reference).norm() <= 2**-7 * reference.norm()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_exp_is_0_where_float32_underflows(dtype):
    z = torch.tensor([-torch.inf, -1e20, -103.0, -87.0, -86.9, -20.0, 0.0, torch.nan], dtype=dtype)
    kept = z > -87.0
    found = _exp(z)
    assert torch.equal(found[kept], z[kept].exp()) and (found[:4] == 0).all() and found[-1].isnan()


def test_impossible_sizes_are_refused():
    with pytest.raises(AssertionError, match="chunk_size is a number of tokens"):
        tiled(*inputs(), chunk_size=0)
    with pytest.raises(AssertionError, match="do not cover the vocabulary"):
        tiled(*inputs(), vocab_size=V + 1)
