"""Log-probs over the tokens that truncated sampling left: values and gradients against all logits at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megatron_vespo.algorithms.supports import OUTSIDE, Supports
from tests.support.linear_log_probs import (
    BOUNDS,
    VOCAB_SIZE,
    T,
    assert_close,
    check_against_all_logits,
    gradients,
    inputs,
    naive,
    random_allowed,
    supports_of,
    tiled,
    upstream,
)

IN_TURN = torch.arange(T) % 4


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("chunk_size", [1, 5, T - 1, T, T + 7])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_values_and_gradients_are_those_of_the_supports(dtype, chunk_size, entropy_gradient):
    """Tiles cut supports; some tokens have none. Temperatures are random, and rows of padding follow."""
    fields = inputs(dtype)
    grads = upstream(T, dtype)[: 1 + entropy_gradient]
    options = {"chunk_size": chunk_size, "entropy_gradient": entropy_gradient}
    allowed_TV = random_allowed(fields[2], VOCAB_SIZE)
    results = check_against_all_logits(fields, grads, dtype, allowed_TV=allowed_TV, **options)
    assert (results[3][VOCAB_SIZE:] == 0).all(), "padding rows got a gradient"
    anyone_V = allowed_TV.any(0)
    assert anyone_V.all(), "each row of the weight is in a support"


@pytest.mark.parametrize("num_upstream", [1, 2])
def test_logits_outside_all_supports_get_no_gradient(num_upstream):
    fields = inputs(torch.float32)
    allowed_TV = torch.zeros(T, VOCAB_SIZE, dtype=torch.bool)
    allowed_TV[:, 3:9] = True
    fields[2].clamp_(3, 8)
    grads = upstream(T, torch.float32)[:num_upstream]
    results = check_against_all_logits(
        fields, grads, torch.float32, allowed_TV=allowed_TV, entropy_gradient=num_upstream == 2
    )
    assert (results[3][:3] == 0).all() and (results[3][9:] == 0).all()
    assert (results[3][3:9] != 0).all()


@pytest.mark.parametrize("dtype", [*BOUNDS, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, 5, T])
def test_a_token_alone_in_its_support_is_certain(dtype, chunk_size):
    """To the last bit, at any temperature: log-prob, entropy, and no gradient."""
    fields = inputs(dtype)
    alone_T = IN_TURN == 1
    supports = supports_of(random_allowed(fields[2], VOCAB_SIZE))
    function = partial(tiled, chunk_size=chunk_size, supports=supports, entropy_gradient=True)
    grads = [grad.to(torch.float64) for grad in upstream(T, torch.float64)]
    log_probs_T, entropy_T, grad_hidden_TH, _ = gradients(function, fields, *grads)
    assert torch.equal(log_probs_T == 0, alone_T) and torch.equal(entropy_T == 0, alone_T)
    assert torch.equal((grad_hidden_TH == 0).all(1), alone_T)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_whole_vocabulary_as_support_changes_nothing(dtype):
    fields, grads = inputs(dtype), upstream(T, dtype)
    everything = Supports.of(torch.full((T,), VOCAB_SIZE), torch.arange(VOCAB_SIZE).repeat(T))
    assert everything.restricted_T.all()
    function = partial(tiled, entropy_gradient=True)
    results = gradients(partial(function, supports=everything), fields, *grads)
    for result, expected in zip(results, gradients(function, fields, *grads), strict=True):
        assert torch.equal(result, expected)


def test_tokens_without_a_support_are_as_if_no_token_had_one():
    fields, grads = inputs(), upstream(T, torch.float64)
    free_T = IN_TURN == 2
    function = partial(tiled, entropy_gradient=True)
    supports = supports_of(random_allowed(fields[2], VOCAB_SIZE))
    assert torch.equal(supports.restricted_T, ~free_T)
    results = gradients(partial(function, supports=supports), fields, *grads)
    expected = gradients(function, fields, *grads)
    for result, reference in zip(results[:3], expected[:3], strict=True):
        assert torch.equal(result[free_T], reference[free_T])


def test_masked_tokens_take_their_supports_with_them():
    """The backward computes some tokens only: their supports must be theirs."""
    fields = inputs()
    mask_T = torch.arange(T) % 3 != 0
    grads = [grad * mask_T for grad in upstream(T, torch.float64)]
    check_against_all_logits(
        fields, grads, allowed_TV=random_allowed(fields[2], VOCAB_SIZE), entropy_gradient=True
    )


def test_no_token_has_a_gradient():
    fields = inputs()
    function = partial(tiled, supports=supports_of(random_allowed(fields[2], VOCAB_SIZE)))
    grad_weight_VH = gradients(function, fields, torch.zeros(T))[3]
    assert (grad_weight_VH == 0).all()


def test_tiles_and_supports_end_anywhere():
    """Several aligned tiles and a rest; supports in one tile, in two that do not touch, and at the ends."""
    vocab_size = 3 * 128 + 45
    fields = inputs(num_tokens=6, vocab_size=vocab_size)
    fields[2][:] = torch.tensor([0, 127, 128, 383, 384, vocab_size - 1])
    allowed_TV = torch.zeros(6, vocab_size, dtype=torch.bool)
    for token, ids in enumerate(
        [[0, vocab_size - 1], [127, 126], [128, 127], [383, 0, 384], [384], [vocab_size - 1, 250]]
    ):
        allowed_TV[token, ids] = True
    grads = upstream(6, torch.float64)
    check_against_all_logits(
        fields, grads, vocab_size=vocab_size, allowed_TV=allowed_TV, chunk_size=2, entropy_gradient=True
    )


@pytest.mark.parametrize("temperature", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("chunk_size", [1, T])
def test_extreme_temperatures_leave_no_nan(temperature, chunk_size):
    """Before a support's first tile, its token has seen only the numbers that replace logits."""
    fields = inputs(torch.float32)
    fields = (*fields[:3], torch.full((T,), temperature))
    assert abs(OUTSIDE / temperature) * 1e6 < torch.finfo(torch.float32).max, "a sum over a million ids"
    allowed_TV = random_allowed(fields[2], VOCAB_SIZE)
    function = partial(tiled, chunk_size=chunk_size, entropy_gradient=True, supports=supports_of(allowed_TV))
    values = function(*fields)
    grads = torch.autograd.grad([value.sum() for value in values], fields[:2])
    assert all(result.isfinite().all() for result in (*values, *grads))
    in_float64 = [field.detach().double() for field in fields[:2]]
    expected = naive(*in_float64, *fields[2:], VOCAB_SIZE, allowed_TV)
    # logits are off by their rounding, and a temperature divides it
    bounds = {"rtol": 1e-4, "atol": 2e-5 / min(temperature, 1.0)}
    assert_close(values, expected, **bounds)


def test_bfloat16_inputs_have_fp32_logits_in_their_supports():
    fields = inputs(torch.bfloat16, num_tokens=64, vocab_size=400)
    allowed_TV = random_allowed(fields[2], 400)
    grads = [grad.float() for grad in upstream(64, torch.float64)]
    options = {"vocab_size": 400, "chunk_size": 7, "entropy_gradient": True}
    results = gradients(partial(tiled, supports=supports_of(allowed_TV), **options), fields, *grads)
    in_float64 = [field.detach().double().requires_grad_() for field in fields[:2]]
    expected = gradients(
        partial(naive, vocab_size=400, allowed_TV=allowed_TV),
        (*in_float64, *fields[2:]),
        *(grad.double() for grad in grads),
    )
    assert_close(results[:2], expected[:2], rtol=1e-5, atol=1e-5)
    for result, reference in zip(results[2:], expected[2:], strict=True):
        assert (result - reference).norm() <= 2**-7 * reference.norm()


def test_a_label_outside_its_support_is_impossible():
    """Samples of this kind are refused before; if one came through, no loss would take it for likely."""
    fields = inputs(torch.float32)
    allowed_TV = random_allowed(fields[2], VOCAB_SIZE)
    fields[2][0] = (fields[2][0] + 1 + allowed_TV[0].roll(-1 - int(fields[2][0])).int().argmin()) % VOCAB_SIZE
    assert not allowed_TV[0, fields[2][0]]
    log_probs_T, _ = tiled(*fields, supports=supports_of(allowed_TV))
    assert log_probs_T[0] < -1e15
