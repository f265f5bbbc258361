"""Every policy loss against its paper's formula: one response, one token after the other, in float64.

Shape suffixes: T packed tokens, S sequences.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.algorithms.losses.aggregation import AGGREGATIONS, count, weighted_sum
from megatron_vespo.algorithms.losses.inputs import LossInputs
from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.algorithms.vespo import GammaKernel

KERNEL = GammaKernel()
LONGEST = 16  # longest response allowed
LENGTHS, ADVANTAGES = (5, 1, 4, 3, 1, 12), (1.3, -0.7, 0.0, -1.6, 0.4, -0.2)
FAR = (1e4, 100.0, 30.0, -30.0, -100.0, -1e4)

every_method = pytest.mark.parametrize("method", METHODS)
some_methods = pytest.mark.parametrize("method", ["vespo", "grpo", "gspo"])
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


# The formulas. Of one response: log-probs under pi, with gradient, and under the ratio's denominator, and A;
# one loss term a token comes out. A weight that is a number has no gradient.


def ratios(pi, old):
    return [(p - o).exp() for p, o in zip(pi, old, strict=True)]


def whole(pi, old) -> float:
    return math.prod(ratio.item() for ratio in ratios(pi, old))


def phi(w, a) -> float:
    c1, c2 = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
    return w**c1 * math.exp(c2 * (1.0 - w))


def score(pi, a, weight):
    return [-weight * a * p for p in pi]


def ppo(rs, a, low, high):
    return [-min(r * a, r.clamp(1.0 - low, 1.0 + high) * a) for r in rs]


def gspo(pi, old, a):
    # one term a response, with gradient through s: its tokens share it, so their mean is the term
    s = math.prod(ratios(pi, old)) ** (1 / len(pi))
    return ppo([s], a, 3e-4, 4e-4) * len(pi)


def sapo(pi, old, a):
    tau = 1.0 if a > 0 else 1.05
    return [-a * (4.0 / tau) / (1.0 + (-tau * (r - 1.0)).exp()) for r in ratios(pi, old)]


def cispo(pi, old, a):
    # the upper bound only
    return [-min(r.item(), 1.28) * a * p for p, r in zip(pi, ratios(pi, old), strict=True)]


PAPERS = {
    "vespo": lambda pi, old, a: score(pi, a, phi(whole(pi, old), a)),
    "vespo-mean": lambda pi, old, a: score(pi, a, phi(whole(pi, old) ** (1 / len(pi)), a)),
    "vespo-sqrt": lambda pi, old, a: score(pi, a, phi(whole(pi, old) ** (1 / math.sqrt(len(pi))), a)),
    "grpo": lambda pi, old, a: ppo(ratios(pi, old), a, 0.2, 0.28),
    "dr-grpo": lambda pi, old, a: ppo(ratios(pi, old), a, 0.2, 0.2),
    "gspo": gspo,
    "sapo": sapo,
    "cispo": cispo,
    "topr": lambda pi, old, a: score(pi, a, 1.0 if a > 0 else min(whole(pi, old), 1.0)),
    "sequence-is": lambda pi, old, a: score(pi, a, whole(pi, old)),
    "reinforce": lambda pi, old, a: score(pi, a, 1.0),
}
OWN_AGGREGATION = {"dr-grpo": "constant", "gspo": "sequence-mean-token-mean"}


def naive_total(terms_by_response, aggregation):
    sums, lengths = [sum(terms) for terms in terms_by_response], [len(terms) for terms in terms_by_response]
    if aggregation == "token-mean":
        return sum(sums) / sum(lengths)
    if aggregation == "sequence-mean-token-mean":
        sums = [total / max(length, 1) for total, length in zip(sums, lengths, strict=True)]
    return sum(sums) / (len(sums) * (LONGEST if aggregation == "constant" else 1))


def naive(inputs: LossInputs, method: str, aggregation: str):
    """Loss, its gradient [T] float64, and what the loss would be if no terms cancelled."""
    pi_T, ids, terms = inputs.log_probs_T.detach().double().requires_grad_(), inputs.sequence_ids_T, []
    for s, advantage in enumerate(inputs.advantages_S.tolist()):
        mine = [t for t in range(len(pi_T)) if ids[t] == s and inputs.loss_mask_T[t] > 0]
        old = [pi_T[t].item() - inputs.log_ratio_T[t].item() for t in mine]
        terms.append(PAPERS[method]([pi_T[t] for t in mine], old, advantage) if mine else [])
    loss = naive_total(terms, aggregation)
    [gradient_T] = torch.autograd.grad(loss, pi_T)
    sizes = [[abs(term.item()) for term in of_response] for of_response in terms]
    return loss.item(), gradient_T, naive_total(sizes, aggregation)


def batch(lengths=LENGTHS, advantages=ADVANTAGES, seed=0, spread=0.4, log_ratio=None, dtype=torch.float64):
    """Responses of these lengths behind prompts of two tokens, and padding of three, the last one's.

    Token log-ratios have standard deviation `spread`, or all are `log_ratio`.
    """
    generator = torch.Generator().manual_seed(seed)
    mask_T = torch.tensor([m for n in lengths for m in [0.0] * 2 + [1.0] * n] + [0.0] * 3)
    ids = [s for s, n in enumerate(lengths) for _ in range(n + 2)] + [len(lengths) - 1] * 3
    log_ratio_T = spread * torch.randn(len(ids), generator=generator, dtype=dtype)
    if log_ratio is not None:
        log_ratio_T = torch.full_like(log_ratio_T, log_ratio)
    of_S = [(mask_T > 0) & (torch.tensor(ids) == s) for s in range(len(lengths))]
    return LossInputs(
        log_probs_T=(-2 * torch.rand(len(ids), generator=generator, dtype=dtype)).requires_grad_(),
        log_ratio_T=log_ratio_T,
        log_w_S=torch.stack([log_ratio_T[mine_T].double().sum() for mine_T in of_S]).float(),
        advantages_S=torch.tensor(advantages),
        num_tokens_S=torch.tensor(lengths, dtype=torch.float32),
        loss_mask_T=mask_T,
        sequence_ids_T=torch.tensor(ids),
    )


def token_loss(inputs: LossInputs, method: str, kernel=KERNEL, clip_range=None, tau=None):
    return METHODS[method].bind(kernel, clip_range, tau)(inputs)


def loss_and_gradient(inputs: LossInputs, method: str, aggregation=None, kernel=KERNEL):
    aggregation = aggregation or METHODS[method].aggregation
    total = weighted_sum(token_loss(inputs, method, kernel).loss_T, inputs, aggregation, LONGEST)
    loss = total / count(inputs, aggregation, first_context_rank=True)
    [gradient_T] = torch.autograd.grad(loss, inputs.log_probs_T)
    return loss.item(), gradient_T


def check_against_paper(inputs: LossInputs, method: str, aggregation: str):
    loss, gradient_T = loss_and_gradient(inputs, method, aggregation)
    expected, expected_T, size = naive(inputs, method, aggregation)
    # relative to what is summed: terms of both signs cancel, and log W and phi are float32
    assert loss == pytest.approx(expected, rel=0, abs=1e-6 * size)
    torch.testing.assert_close(gradient_T.double(), expected_T, rtol=0, atol=1e-6 * expected_T.abs().max())


@every_method
@both_dtypes
@pytest.mark.parametrize("spread", [1e-3, 0.4], ids=["within GSPO's bounds", "beyond all bounds"])
def test_loss_and_gradient_are_the_papers(method, spread, dtype):
    aggregation = OWN_AGGREGATION.get(method, "token-mean")
    assert METHODS[method].aggregation == aggregation
    for seed in range(2):
        check_against_paper(batch(seed=seed, spread=spread, dtype=dtype), method, aggregation)


@some_methods
@every_aggregation
def test_every_aggregation(method, aggregation):
    check_against_paper(batch(), method, aggregation)


@every_method
@every_aggregation
def test_response_without_trained_tokens_is_counted_and_has_no_gradient(method, aggregation):
    check_against_paper(batch([0, 2, 0], [1.0, 0.5, -2.0], spread=1e-4), method, aggregation)


@pytest.mark.parametrize(
    ("method", "low", "high"), [("grpo", 0.8, 1.28), ("dr-grpo", 0.8, 1.2), ("gspo", 0.9997, 1.0004)]
)
def test_bounds_hold_only_in_the_direction_of_the_advantage(method, low, high):
    above, below = high + 1e-3, low - 1e-3
    for ratio, advantage, loss, weight in (
        *((above, 1.0, -high, 0.0), (above, -1.0, above, above)),
        *((below, 1.0, -below, below), (below, -1.0, low, 0.0)),
    ):
        inputs = batch([3], [advantage], log_ratio=math.log(ratio))
        value, gradient_T = loss_and_gradient(inputs, method, "token-mean")
        assert (value, gradient_T.sum().item()) == pytest.approx((loss, -weight * advantage), rel=1e-6)


@every_method
@pytest.mark.parametrize("options", [{"spread": 1e-3}, {"spread": 0.4}, *({"log_ratio": x} for x in FAR)])
def test_weight_is_the_factor_of_advantage_and_score(method, options):
    inputs = batch(**options)
    term, trained_T = token_loss(inputs, method), inputs.loss_mask_T > 0
    [gradient_T] = torch.autograd.grad(term.loss_T[trained_T].sum(), inputs.log_probs_T)
    expected_T = -(term.weight_T * inputs.per_token(inputs.advantages_S)).double()
    torch.testing.assert_close(gradient_T[trained_T], expected_T[trained_T], rtol=1e-6, atol=0)


@every_method
def test_no_gradient_flows_through_weights_and_ratios(method):
    inputs = batch()
    ratios = inputs.log_ratio_T.requires_grad_(), inputs.log_w_S.requires_grad_()
    term = token_loss(inputs, method)
    assert not term.weight_T.requires_grad
    gradients = torch.autograd.grad(term.loss_T.sum(), ratios, allow_unused=True)
    assert not any(gradient is not None and gradient.any() for gradient in gradients)


@every_method
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_untrained_tokens_mean_nothing_whatever_they_hold(method, junk):
    inputs = batch()
    expected, expected_T = loss_and_gradient(inputs, method)
    untrained_T = inputs.loss_mask_T == 0
    log_probs_T = inputs.log_probs_T.detach().masked_fill(untrained_T, junk).requires_grad_()
    log_ratio_T = inputs.log_ratio_T.masked_fill(untrained_T, junk)
    filled = replace(inputs, log_probs_T=log_probs_T, log_ratio_T=log_ratio_T)
    loss, gradient_T = loss_and_gradient(filled, method)
    assert loss == expected and torch.equal(gradient_T, expected_T)
    assert not gradient_T[untrained_T].any()


@every_method
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_nan_of_a_trained_token_stays_visible(method, advantage):
    unknown_policy = batch([1], [advantage])
    unknown_policy.log_probs_T.data[2] = math.nan
    assert math.isnan(loss_and_gradient(unknown_policy, method)[0])
    if method != "reinforce" and (method, advantage) != ("topr", 1.5):  # do not ask for the behaviour policy
        assert math.isnan(loss_and_gradient(batch([1], [advantage], log_ratio=math.nan), method)[0])


@every_method
@both_dtypes
@pytest.mark.parametrize("log_ratio", FAR)
def test_far_from_the_policy_everything_stays_finite(method, dtype, log_ratio):
    inputs, uses_kernel = batch(log_ratio=log_ratio, dtype=dtype), METHODS[method].uses_kernel
    exponents = [KERNEL.positive, (0.0, 3.0), (5.0, 0.0), (0.0, 0.0)] if uses_kernel else [KERNEL.positive]
    for pair in exponents:
        loss, gradient_T = loss_and_gradient(inputs, method, kernel=GammaKernel(pair, pair))
        assert math.isfinite(loss) and gradient_T.isfinite().all()
        if uses_kernel and 0.0 not in pair:
            assert gradient_T.abs().max() < 1e-20


def cut(inputs: LossInputs, sequences: list[int], keeps=lambda t: True) -> LossInputs:
    """These sequences in this order, of whose tokens this rank `keeps` some; gradients reach `inputs`."""
    ids = inputs.sequence_ids_T.tolist()
    tokens = [(i, t) for i, s in enumerate(sequences) for t in range(len(ids)) if ids[t] == s and keeps(t)]
    new_ids_T, kept_T = torch.tensor(tokens, dtype=torch.int64).view(-1, 2).unbind(1)
    fields = {k: v[kept_T if k.endswith("_T") else torch.tensor(sequences)] for k, v in vars(inputs).items()}
    return LossInputs(**fields | {"sequence_ids_T": new_ids_T})


@some_methods
@every_aggregation
@settings(max_examples=10)
@given(st.permutations(range(6)), st.sets(st.integers(1, 5)), st.lists(st.integers(0, 1), min_size=41))
def test_cutting_into_micro_batches_and_over_ranks_changes_nothing(method, aggregation, order, cuts, ranks):
    inputs = batch()
    # (what this rank holds of this micro-batch, whether it counts the responses)
    parts = [
        (cut(inputs, order[start:end], lambda t, rank=rank: ranks[t] == rank), rank == 0)
        for start, end in pairwise([0, *sorted(cuts), 6])
        for rank in (0, 1)
    ]
    sums = [weighted_sum(token_loss(part, method).loss_T, part, aggregation, LONGEST) for part, _ in parts]
    loss = sum(sums) / sum(count(part, aggregation, first) for part, first in parts)
    [gradient_T] = torch.autograd.grad(loss, inputs.log_probs_T)
    expected, expected_T = loss_and_gradient(inputs, method, aggregation)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient_T, expected_T, rtol=1e-12, atol=0)


@every_method
@every_aggregation
@pytest.mark.parametrize("kept", [0, 2], ids=["no tokens", "a prompt"])
def test_rank_without_trained_tokens_adds_nothing(method, aggregation, kept):
    inputs = batch()
    part = cut(inputs, list(range(6)), lambda t: t < kept)
    total = weighted_sum(token_loss(part, method).loss_T, part, aggregation, LONGEST)
    [gradient_T] = torch.autograd.grad(total, inputs.log_probs_T)
    assert total == 0 and not gradient_T.any()
    assert count(part, aggregation, first_context_rank=False) == 0


def test_options_given_replace_the_methods_own():
    kernel, clip_range, tau = GammaKernel((1.5, 0.5), (2.5, 1.0)), (0.1, 0.6), (2.0, 3.0)
    for a, r, bounded, tau_a, c1, c2 in ((1.0, 2.0, 1.6, 2.0, 1.5, 0.5), (-1.0, 0.5, 0.9, 3.0, 2.5, 1.0)):
        inputs = batch([1], [a], log_ratio=math.log(r))
        terms = {method: token_loss(inputs, method, kernel, clip_range, tau) for method in METHODS}
        for method in ("grpo", "dr-grpo", "gspo"):
            assert terms[method].loss_T[2].item() == pytest.approx(-bounded * a)
        gate = 1 / (1 + math.exp(-tau_a * (r - 1)))
        weights = {"cispo": bounded, "sapo": 4 * gate * (1 - gate) * r}
        weights |= dict.fromkeys(("vespo", "vespo-mean", "vespo-sqrt"), r**c1 * math.exp(c2 * (1 - r)))
        for method, weight in weights.items():
            assert terms[method].weight_T[2].item() == pytest.approx(weight)
