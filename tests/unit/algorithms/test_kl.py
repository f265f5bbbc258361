"""KL(pi || reference) as a term of the loss: values, gradients, and what their means are.

Shape suffix: T packed tokens.
"""

import math

import pytest
import torch

from megatron_vespo.algorithms.losses.aggregation import weighted_sum
from megatron_vespo.algorithms.losses.kl import KL_KINDS, KLTerm
from tests.support.naive_losses import LONGEST, batch, naive_kl, naive_total, responses_of

every_kind = pytest.mark.parametrize("kind", KL_KINDS)


def others(inputs, seed=7, spread=0.5):
    """log ref and log mu [T], float32."""
    generator = torch.Generator().manual_seed(seed)
    log_pi_T = inputs.log_probs_T.detach()
    draws = spread * torch.randn(2, len(log_pi_T), generator=generator)
    return tuple((log_pi_T + draw_T).float() for draw_T in draws)


@every_kind
@pytest.mark.parametrize("bound", [None, 1.2, math.inf])
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean-token-mean", "constant"])
def test_value_and_gradient_are_the_formulas(kind, bound, aggregation):
    inputs = batch(given=(0, 2))
    ref_T, mu_T = others(inputs)
    total = weighted_sum(KLTerm(0.3, kind, bound)(inputs, ref_T, mu_T), inputs, aggregation, LONGEST)
    [found_T] = torch.autograd.grad(total, inputs.log_probs_T)

    pi_T = inputs.log_probs_T.detach().double().requires_grad_()
    terms = []
    for s in range(len(inputs.advantages_S)):
        mine = [t for t in range(len(pi_T)) if inputs.sequence_ids_T[t] == s and inputs.loss_mask_T[t] > 0]
        columns = ([values_T[t].item() for t in mine] for values_T in (ref_T, mu_T))
        terms.append(naive_kl([pi_T[t] for t in mine], *columns, kind, bound))
    tokens = sum(map(len, terms)) if aggregation == "token-mean" else len(terms)
    expected = 0.3 * tokens * naive_total(terms, aggregation)
    [expected_T] = torch.autograd.grad(expected, pi_T)
    assert total.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(found_T, expected_T.to(found_T.dtype), rtol=1e-6, atol=1e-12)
    assert len(responses_of(inputs)) == len(terms)


@every_kind
@pytest.mark.parametrize("bound", [None, 2.0])
def test_untrained_tokens_count_nothing(kind, bound):
    """They may be NaN."""
    inputs = batch(given=(1,))
    ref_T, mu_T = others(inputs)
    term = KLTerm(1.0, kind, bound)
    expected = weighted_sum(term(inputs, ref_T, mu_T), inputs, "token-mean", LONGEST)
    untrained_T = inputs.loss_mask_T == 0
    for values_T in (ref_T, mu_T, inputs.log_probs_T.data):
        values_T[untrained_T] = math.nan
    total = weighted_sum(term(inputs, ref_T, mu_T), inputs, "token-mean", LONGEST)
    [gradient_T] = torch.autograd.grad(total, inputs.log_probs_T)
    assert total == expected and (gradient_T[untrained_T] == 0).all() and gradient_T.isfinite().all()


@every_kind
def test_far_from_the_reference_all_is_finite(kind):
    inputs = batch()
    log_pi_T = inputs.log_probs_T.detach()
    for ref_T, mu_T in ((log_pi_T + 1e4, log_pi_T - 1e4), (log_pi_T - 1e4, log_pi_T + 1e4)):
        for bound in (None, math.inf):
            total = KLTerm(1.0, kind, bound)(inputs, ref_T.float(), mu_T.float()).sum()
            [gradient_T] = torch.autograd.grad(total, inputs.log_probs_T)
            assert total.isfinite() and gradient_T.isfinite().all()


@every_kind
def test_near_the_reference_nothing_is_lost_to_rounding(kind):
    """k3 of x = 1e-6 is 5e-13, of which float32 would keep nothing."""
    inputs = batch()
    ref_T = inputs.log_probs_T.detach().double() - 1e-6
    value = KLTerm(1.0, kind, None)(inputs, ref_T, ref_T)[inputs.loss_mask_T > 0].mean().item()
    assert value == pytest.approx(1e-6 if kind == "k1" else 5e-13, rel=1e-3)


# three tokens; mu is the policy of some steps ago
PI, REF, MU = (
    torch.tensor(p, dtype=torch.float64) for p in ((0.5, 0.3, 0.2), (0.2, 0.3, 0.5), (0.3, 0.4, 0.3))
)


def expected_gradient(kind, bound, drawn_from):
    """By the logits, the mean over tokens drawn from `drawn_from`."""
    logits = PI.log().requires_grad_()
    log_pi = logits.log_softmax(-1)
    base = batch(lengths=(3,), advantages=(0.0,))
    pi_T = torch.cat([log_pi.new_zeros(2), log_pi, log_pi.new_zeros(3)])  # prompt, response, padding
    pad = [torch.cat([torch.zeros(2), p.log(), torch.zeros(3)]) for p in (REF, MU)]
    terms_T = KLTerm(1.0, kind, bound)(type(base)(**vars(base) | {"log_probs_T": pi_T}), *pad)
    [gradient] = torch.autograd.grad((drawn_from * terms_T[2:5]).sum(), logits)
    return gradient


def gradient_of(divergence):
    logits = PI.log().requires_grad_()
    [gradient] = torch.autograd.grad(divergence(logits.log_softmax(-1)), logits)
    return gradient


def reverse(log_pi):
    return (log_pi.exp() * (log_pi - REF.log())).sum()


def forward(log_pi):
    return (REF * (REF.log() - log_pi)).sum()


def test_what_the_gradients_are_on_policy():
    torch.testing.assert_close(expected_gradient("k1", None, PI), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(expected_gradient("k2", None, PI), gradient_of(reverse))
    torch.testing.assert_close(expected_gradient("k3", None, PI), gradient_of(forward))


@every_kind
def test_the_unbiased_gradient_is_that_of_the_reverse_kl_off_policy(kind):
    torch.testing.assert_close(expected_gradient(kind, math.inf, MU), gradient_of(reverse))
    plain = expected_gradient(kind, None, MU)
    assert (plain - gradient_of(reverse)).abs().max() > 0.01
