"""Every policy loss against its paper's formula, and what must not change it.

Shape suffixes: T packed tokens, S sequences.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.algorithms.losses.aggregation import AGGREGATIONS, count, summed_loss, weighted_sum
from megatron_vespo.algorithms.losses.inputs import LossInputs
from megatron_vespo.algorithms.losses.table import METHODS, PolicyLoss
from megatron_vespo.algorithms.vespo import GammaKernel
from tests.support.naive_losses import LONGEST, OWN_AGGREGATION, bapo_bounds, batch, naive, responses_of

DEFINITIONS = Path(__file__).parents[3] / "docs/guides/losses.md"
KERNEL = GammaKernel()
NO_OPTIONS = {"clip_range": None, "tau": None, "target": None, "dual_clip": None}
TINY = 1e-37  # float32 knows little below
SATURATED = {"sapo": 1e-9}  # a sigmoid near 1 is exact to rounding, and so is the gradient through it
# The one case where float32 cannot do 1e-6: vespo-sqrt of 30 tokens, |log W| = 100 and c1 = 2, where phi is
# exp(2 x) times a constant, x = 100 / sqrt(30) = 18.3; others divide log W by more or are past a cap.
# Errors of the exponent 2 x are relative ones of phi. Half a last place of 100, 2^-18, becomes 2^-18 x 2 /
# sqrt(30) = 1.4e-6; half one of x, 2^-20, becomes 2 x 2^-20 = 1.9e-6; and half one of 2 x is 2^-19 = 1.9e-6.
ROOT_30 = 5.3e-6
FAR = (1e4, 100.0, 30.0, -30.0, -100.0, -1e4)

every_method = pytest.mark.parametrize("method", METHODS)
some_methods = pytest.mark.parametrize("method", ["vespo", "grpo", "gspo", "bapo", "m2po"])
every_aggregation = pytest.mark.parametrize("aggregation", AGGREGATIONS)
with_token_advantages = pytest.mark.parametrize(
    "token_spread", [None, 0.8], ids=["A per response", "A per token"]
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def bound(method: str, **options) -> PolicyLoss:
    return METHODS[method].bind(**{"kernel": KERNEL} | NO_OPTIONS | options)


def token_loss(inputs: LossInputs, method: str, **options):
    """As if the inputs were a whole optimizer step on one rank."""
    return bound(method, **options).adapted([inputs], reduce=lambda values: values)(inputs)


def loss_and_gradient(inputs: LossInputs, method: str, aggregation=None, **options):
    aggregation = aggregation or METHODS[method].aggregation
    total = weighted_sum(token_loss(inputs, method, **options).loss_T, inputs, aggregation, LONGEST)
    loss = total / count(inputs, aggregation, first_context_rank=True)
    [gradient_T] = torch.autograd.grad(loss, inputs.log_probs_T)
    return loss.item(), gradient_T


def check_against_paper(
    inputs: LossInputs,
    method: str,
    aggregation=None,
    kernel=KERNEL,
    target=None,
    tolerance=1e-6,
    clip_range=None,
    **capped,
):
    """`clip_range` is only for losses whose naive formula takes it."""
    aggregation = aggregation or METHODS[method].aggregation
    options = {"kernel": kernel, "target": target, "clip_range": clip_range} | capped
    loss, gradient_T = loss_and_gradient(inputs, method, aggregation, **options)
    naive_options = capped if clip_range is None else capped | {"thresholds": clip_range}
    expected, expected_T, size = naive(inputs, method, aggregation, kernel, target, **naive_options)
    # relative to what is summed: terms of both signs cancel, and log W and phi are float32
    assert loss == pytest.approx(expected, rel=0, abs=max(tolerance * size, TINY))
    allowed = max(tolerance * expected_T.abs().max().item(), SATURATED.get(method, TINY))
    torch.testing.assert_close(gradient_T.double(), expected_T, rtol=0, atol=allowed)


@every_method
@both_dtypes
@with_token_advantages
@pytest.mark.parametrize("spread", [1e-3, 0.4], ids=["within GSPO's bounds", "beyond all bounds"])
def test_loss_and_gradient_are_the_papers(method, spread, dtype, token_spread):
    aggregation = OWN_AGGREGATION.get(method, "token-mean")
    assert METHODS[method].aggregation == aggregation
    for seed in range(2):
        inputs = batch(seed=seed, spread=spread, dtype=dtype, token_spread=token_spread)
        check_against_paper(inputs, method, aggregation)


@some_methods
@every_aggregation
def test_every_aggregation(method, aggregation):
    check_against_paper(batch(), method, aggregation)


@every_method
@every_aggregation
def test_response_without_trained_tokens_is_counted_and_has_no_gradient(method, aggregation):
    check_against_paper(batch([0, 2, 0], [1.0, 0.5, -2.0], spread=1e-4), method, aggregation)


@every_method
@every_aggregation
@with_token_advantages
def test_given_tokens_are_outside_log_w_the_loss_and_the_length(method, aggregation, token_spread):
    """Equal to the naive formulas, and to the loss of the sampled tokens alone."""
    inputs = batch(given=(0, 3, 1), token_spread=token_spread)
    is_sampled_T = inputs.loss_mask_T > 0
    inputs.log_ratio_T[~is_sampled_T] = math.nan
    check_against_paper(inputs, method, aggregation)
    alone = replace(
        inputs,
        log_probs_T=inputs.log_probs_T.detach()[is_sampled_T].requires_grad_(),
        **{
            name: getattr(inputs, name)[is_sampled_T]
            for name in ("log_ratio_T", "loss_mask_T", "sequence_ids_T", "token_advantages_T")
            if getattr(inputs, name) is not None
        },
    )
    loss, gradient_T = loss_and_gradient(inputs, method, aggregation)
    expected, expected_T = loss_and_gradient(alone, method, aggregation)
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient_T[is_sampled_T], expected_T)
    assert not gradient_T[~is_sampled_T].any()


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
@pytest.mark.parametrize(
    "options", [{"spread": 1e-3}, {"spread": 0.4}, {"token_spread": 0.8}, *({"log_ratio": x} for x in FAR)]
)
def test_weight_is_the_factor_of_advantage_and_score(method, options):
    inputs = batch(**options)
    term, trained_T = token_loss(inputs, method), inputs.loss_mask_T > 0
    [gradient_T] = torch.autograd.grad(term.loss_T[trained_T].sum(), inputs.log_probs_T)
    expected_T = -(term.weight_T * inputs.advantages_T).double()
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
@every_aggregation
@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("size", [1, 12, 2**17])
@with_token_advantages
def test_slices_have_the_sum_and_the_gradient_of_the_whole(
    method, aggregation, corrected, size, token_spread, monkeypatch
):
    monkeypatch.setattr("megatron_vespo.algorithms.segments.CACHED_TOKENS", size)
    inputs = batch([3, 0, 5, 2, 9, 1], spread=0.4, token_spread=token_spread)
    correction_T = (torch.arange(len(inputs.loss_mask_T)) % 3 * inputs.loss_mask_T).double()
    loss = bound(method).adapted([inputs], reduce=lambda values: values)
    terms: list = []
    total = summed_loss(loss, inputs, aggregation, LONGEST, correction_T if corrected else None, terms)
    [gradient_T] = torch.autograd.grad(3.0 * total, inputs.log_probs_T)
    whole = loss(inputs)
    loss_T = whole.loss_T * correction_T if corrected else whole.loss_T
    expected = weighted_sum(loss_T, inputs, aggregation, LONGEST)
    [expected_T] = torch.autograd.grad(3.0 * expected, inputs.log_probs_T)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_T, expected_T, rtol=1e-6, atol=1e-12)
    assert torch.equal(torch.cat([term.weight_T for term in terms]), whole.weight_T)
    assert (len(terms) == 1) == (size == 2**17)


def test_slices_of_trained_tokens_alone_are_those_of_a_mask():
    """Where every token is trained nothing is masked, and the sums are the same."""
    inputs = batch([3, 4, 5], [1.0, -1.0, 0.5])
    alone = cut(inputs, [0, 1, 2], lambda t: inputs.loss_mask_T[t] > 0)
    (_, masked), (_, unmasked) = next(inputs.slices()), next(alone.slices())
    assert unmasked.all_trained and not masked.all_trained
    loss = bound("vespo")
    torch.testing.assert_close(
        *(summed_loss(loss, part, "token-mean", LONGEST) for part in (inputs, alone)), rtol=1e-12, atol=0
    )


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


@pytest.mark.long
@every_method
@both_dtypes
@pytest.mark.parametrize("log_w", [100.0, -100.0])
@pytest.mark.parametrize("length", [1, 4, 30])
def test_extreme_responses_are_the_papers(method, log_w, length, dtype):
    """All of them, and one of them beside ordinary ones; (c1, c2) without one or both of the factors."""
    lengths, advantages = (length, length, 0, length), (1.5, -0.5, 1.0, 0.0)
    ordinary = batch(lengths, advantages, spread=1e-4, dtype=dtype)
    pairs = [KERNEL.positive, (0.0, 3.0), (2.0, 0.0), (0.0, 0.0)] if METHODS[method].uses_kernel else [(2, 3)]
    for extreme_S in (torch.ones(4), torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 1.0, 0, 0])):
        log_ratio_T = ordinary.log_ratio_T + ordinary.per_token(extreme_S) * log_w / length
        trained_T = log_ratio_T.double() * ordinary.loss_mask_T
        log_w_S = torch.zeros(4, dtype=torch.float64).index_add(0, ordinary.sequence_ids_T, trained_T).float()
        inputs = replace(ordinary, log_ratio_T=log_ratio_T, log_w_S=log_w_S)
        for pair in pairs:
            tolerance = ROOT_30 if (method, length) == ("vespo-sqrt", 30) else 1e-6
            check_against_paper(inputs, method, kernel=GammaKernel(pair, pair), tolerance=tolerance)


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


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.dual_clip])
@pytest.mark.parametrize("spread", [0.4, 1.5, 4.0])
@both_dtypes
def test_dual_clip_caps_the_loss_of_responses_worse_than_average(method, spread, dtype):
    inputs = batch(spread=spread, dtype=dtype)
    check_against_paper(inputs, method, dual_clip=3.0)
    term, ratio_T = token_loss(inputs, method, dual_clip=3.0), inputs.log_ratio_T.exp()
    free = token_loss(inputs, method)
    negative_T = (inputs.per_token(inputs.advantages_S) < 0) & (inputs.loss_mask_T > 0)
    capped_T = negative_T & (ratio_T > 3.0)
    assert capped_T.any() == (spread > 1.0)
    assert not term.weight_T[capped_T].any() and (free.weight_T[capped_T] > 3.0).all()
    torch.testing.assert_close(
        term.loss_T[capped_T], (-3.0 * inputs.per_token(inputs.advantages_S)[capped_T]).to(dtype)
    )
    assert torch.equal(term.weight_T[~capped_T], free.weight_T[~capped_T])


def test_the_published_grpo_bounds_no_ratio_of_a_response_worse_than_average():
    assert token_loss(batch([1], [-1.0], log_ratio=5.0), "grpo").weight_T[2].item() == pytest.approx(
        math.exp(5)
    )


@every_method
def test_the_documents_compare_it_with_others(method):
    rows = [row.split("|")[1] for row in DEFINITIONS.read_text().splitlines() if row.startswith("| `")]
    assert any(f"`{method}`" in row for row in rows)


def cut(inputs: LossInputs, sequences: list[int], keeps=lambda t: True) -> LossInputs:
    """These sequences in this order, of whose tokens this rank `keeps` some; gradients reach `inputs`."""
    ids = inputs.sequence_ids_T.tolist()
    tokens = [(i, t) for i, s in enumerate(sequences) for t in range(len(ids)) if ids[t] == s and keeps(t)]
    new_ids_T, kept_T = torch.tensor(tokens, dtype=torch.int64).view(-1, 2).unbind(1)
    tensors = {k: v for k, v in vars(inputs).items() if v is not None}
    fields = {k: v[kept_T if k.endswith("_T") else torch.tensor(sequences)] for k, v in tensors.items()}
    return LossInputs(**fields | {"sequence_ids_T": new_ids_T})


def adapted_on_ranks(method: str, parts_by_rank: list[list[LossInputs]], **options) -> list[PolicyLoss]:
    """What each rank trains with; reductions wait for one another, as between processes."""
    loss, meet = bound(method, **options), Barrier(len(parts_by_rank))
    handed_in = [torch.empty(0)] * len(parts_by_rank)

    def adapt(rank: int) -> PolicyLoss:
        def reduce(values):
            handed_in[rank] = values
            meet.wait(timeout=10)
            total = torch.stack(handed_in).sum(0)
            meet.wait(timeout=10)
            return total

        return loss.adapted(parts_by_rank[rank], reduce)

    with ThreadPoolExecutor(len(parts_by_rank)) as ranks:
        return list(ranks.map(adapt, range(len(parts_by_rank))))


@pytest.mark.long
@some_methods
@every_aggregation
@with_token_advantages
@settings(max_examples=10, deadline=None)
@given(st.permutations(range(6)), st.sets(st.integers(1, 5)), st.lists(st.integers(0, 1), min_size=41))
def test_cutting_into_micro_batches_and_over_ranks_changes_nothing(
    method, aggregation, token_spread, order, cuts, ranks
):
    inputs = batch(token_spread=token_spread)
    # of each rank, what it holds of each micro-batch
    parts_by_rank = [
        [
            cut(inputs, order[start:end], lambda t, rank=rank: ranks[t] == rank)
            for start, end in pairwise([0, *sorted(cuts), 6])
        ]
        for rank in (0, 1)
    ]
    losses = adapted_on_ranks(method, parts_by_rank)
    assert losses[0] == losses[1]
    total = size = 0
    for rank, (loss, parts) in enumerate(zip(losses, parts_by_rank, strict=True)):
        total += sum(weighted_sum(loss(part).loss_T, part, aggregation, LONGEST) for part in parts)
        size += sum(count(part, aggregation, first_context_rank=rank == 0) for part in parts)
    [gradient_T] = torch.autograd.grad(total / size, inputs.log_probs_T)
    expected, expected_T = loss_and_gradient(inputs, method, aggregation)
    assert (total / size).item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(gradient_T, expected_T, rtol=1e-12, atol=0)


# how often c_high and c_low are raised; 36 and 15 times are all they have
@pytest.mark.parametrize(
    ("target", "raised"), [(0.05, (0, 0)), (0.07, (4, 0)), (0.09, (19, 0)), (0.11, (36, 0)), (0.4, (36, 15))]
)
def test_bapo_raises_its_bounds_as_far_as_it_must(target, raised):
    inputs = batch(advantages=(0.9, -0.7, 0.0, -1.6, 0.4, -0.8), spread=1.5)
    check_against_paper(inputs, "bapo", target=target)
    low, high = bapo_bounds(responses_of(inputs), target)
    assert (round((high - 1.2) / 0.05), round((low - 0.6) / 0.02)) == raised


@pytest.mark.parametrize("target", [1e-12, 1e-3, 0.02, 0.04, 0.3, 0.999])
@both_dtypes
def test_m2po_masks_the_largest_until_their_mean_is_small(target, dtype):
    for seed in range(5):
        inputs = batch(seed=seed, spread=0.8, dtype=dtype)
        check_against_paper(inputs, "m2po", target=target)
        masked_T = (token_loss(inputs, "m2po", target=target).weight_T == 0) & (inputs.loss_mask_T > 0)
        pushed_T = inputs.per_token(inputs.advantages_S) * inputs.log_ratio_T > 0
        squares_T = inputs.log_ratio_T.double() ** 2
        left = squares_T[pushed_T & ~masked_T & (inputs.loss_mask_T > 0)]
        assert not (masked_T & ~pushed_T).any()
        assert left.numel() == 0 or left.mean() <= target
        if masked_T.any():
            assert torch.cat([left, squares_T[masked_T].min()[None]]).mean() > target


def test_m2po_keeps_all_where_there_is_nothing_to_mask():
    for options in ({"spread": 1e-3}, {"log_ratio": 0.0}, {"advantages": [0.0] * 6}):
        assert token_loss(batch(**options), "m2po").weight_T.all()


@pytest.mark.parametrize("method", ["dppo-tv", "dppo-kl"])
@pytest.mark.parametrize("seed", range(5))
@both_dtypes
def test_dppo_masks_tokens_that_leave_the_trust_region(method, seed, dtype):
    inputs = batch(seed=seed, spread=0.8, dtype=dtype)
    thresholds = (0.02, 0.1)
    check_against_paper(inputs, method, clip_range=thresholds)
    weight_T, trained_T = token_loss(inputs, method, clip_range=thresholds).weight_T, inputs.loss_mask_T > 0
    leaves_T = inputs.per_token(inputs.advantages_S) * inputs.log_ratio_T > 0
    masked_T = (weight_T == 0) & trained_T
    # A = 0 has no direction: the rule for A < 0 is as good as the other
    assert not (masked_T & ~leaves_T & (inputs.per_token(inputs.advantages_S) != 0)).any()
    assert masked_T.any() and (leaves_T & trained_T & ~masked_T).any()


@pytest.mark.parametrize(
    ("method", "mu", "pi", "advantage", "weight"),
    [
        ("dppo-tv", 0.5, 0.66, 1.0, 0.0),  # r is 1.32, TV 0.16
        ("dppo-tv", 0.5, 0.64, 1.0, 1.28),
        ("dppo-tv", 0.5, 0.66, -1.0, 1.32),  # the update brings pi back to mu
        ("dppo-tv", 0.5, 0.34, -1.0, 0.0),
        ("dppo-tv", 0.5, 0.34, 1.0, 0.68),
        ("dppo-tv", 0.001, 0.01, 1.0, 10.0),  # PPO would clip it
        ("dppo-tv", 0.001, 0.1, 1.0, 20.0),  # r is 100
        ("dppo-tv", 0.95, 0.75, -1.0, 0.0),  # PPO would allow it, at 0.79
        ("dppo-kl", 0.5, 0.66, 1.0, 0.0),  # KL(mu || pi) is 0.054, KL(pi || mu) 0.052
        ("dppo-kl", 0.5, 0.65, 1.0, 1.3),
        ("dppo-kl", 0.95, 0.85, -1.0, 0.0),  # 0.0507, the other way round 0.0707
        ("dppo-kl", 0.6, 0.76, 1.0, 0.0),  # 0.0625
        ("dppo-kl", 0.02, 0.0001, -1.0, 0.0),  # 0.086, the other way round 0.019
    ],
)
def test_dppo_by_hand(method, mu, pi, advantage, weight):
    inputs = batch([1], [advantage], log_ratio=math.log(pi / mu))
    inputs.log_probs_T.data.fill_(math.log(pi))
    assert token_loss(inputs, method).weight_T[2].item() == pytest.approx(weight, rel=1e-6)


def test_a_loss_that_adapts_must_have_been_adapted():
    with pytest.raises(AssertionError, match="adapted to it first"):
        bound("bapo")(batch())


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
        terms = {
            method: token_loss(inputs, method, kernel=kernel, clip_range=clip_range, tau=tau)
            for method in METHODS
        }
        for method in ("grpo", "dr-grpo", "gspo"):
            assert terms[method].loss_T[2].item() == pytest.approx(-bounded * a)
        gate = 1 / (1 + math.exp(-tau_a * (r - 1)))
        weights = {"cispo": bounded, "sapo": 4 * gate * (1 - gate) * r}
        weights |= dict.fromkeys(("vespo", "vespo-mean", "vespo-sqrt"), r**c1 * math.exp(c2 * (1 - r)))
        for method, weight in weights.items():
            assert terms[method].weight_T[2].item() == pytest.approx(weight)
