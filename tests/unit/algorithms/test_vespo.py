"""VESPO's weight and ratio against closed forms and a loop over sequences; its loss is in test_losses.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.algorithms.vespo import (
    DECOUPLED,
    RATIO_DENOMINATORS,
    GammaKernel,
    segment_sum,
    sequence_log_ratio,
)

KERNEL = GammaKernel()


def phi_of(log_w, advantage, kernel=KERNEL) -> list[float]:
    log_w_S = torch.tensor(log_w, dtype=torch.float32)
    return kernel.phi(log_w_S, torch.full_like(log_w_S, advantage)).tolist()


def batch(lengths, seed=0, padding=0) -> dict[str, torch.Tensor]:
    """Random per-token fields of packed sequences; a third of the tokens is masked and holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths) + padding
    ids = [s for s, length in enumerate(lengths) for _ in range(length)] + [len(lengths) - 1] * padding
    mask_T = (torch.rand(total, generator=generator) > 1 / 3).float()
    if padding:
        mask_T[-padding:] = 0.0

    def field(scale):
        values_T = -torch.rand(total, generator=generator) * scale
        return torch.where(mask_T > 0, values_T, torch.nan)

    return {
        "log_probs_T": field(1.0),
        "behavior_log_probs_T": field(1.0),
        "old_log_probs_T": field(1.0),
        "loss_mask_T": mask_T,
        "sequence_ids_T": torch.tensor(ids),
    }


def naive_log_ratio(fields, num_sequences, denominator, truncation) -> list[float]:
    """The formulas, one token after the other."""
    log_w = []
    for s in range(num_sequences):
        staleness = gap = against_mu = truncated = 0.0
        for t in range(len(fields["loss_mask_T"])):
            if fields["sequence_ids_T"][t] != s or fields["loss_mask_T"][t] == 0:
                continue
            pi, old, mu = (
                fields[name][t].item() for name in ("log_probs_T", "old_log_probs_T", "behavior_log_probs_T")
            )
            staleness += pi - old
            gap += old - mu
            against_mu += pi - mu
            truncated += min(old - mu, math.log(truncation))
        parts = {
            "recomputed": staleness,
            "rollout": against_mu,
            "decoupled": staleness + min(gap, math.log(truncation)),
            "decoupled-token": staleness + truncated,
        }
        log_w.append(parts[denominator])
    return log_w


def ratio_of(fields, num_sequences, denominator="recomputed", truncation=2.0):
    names = ("log_probs_T", "behavior_log_probs_T", "old_log_probs_T", "loss_mask_T", "sequence_ids_T")
    return sequence_log_ratio(*(fields[name] for name in names), num_sequences, denominator, truncation)


@pytest.mark.parametrize(("advantage", "c1", "c2"), [(1.0, 2, 3), (-1.0, 3, 2)])
def test_phi_has_its_maximum_where_the_paper_says(advantage, c1, c2):
    peak = math.log(c1 / c2)
    below, at, above = phi_of([peak - 0.05, peak, peak + 0.05], advantage)
    assert at == pytest.approx((c1 / c2) ** c1 * math.exp(c2 - c1), rel=1e-6)
    assert below < at > above


def test_paper_values_are_the_default():
    assert KERNEL == GammaKernel(positive=(2.0, 3.0), negative=(3.0, 2.0))
    assert phi_of([0.0], 1.0) == phi_of([0.0], -1.0) == [1.0]
    assert phi_of([math.log(2 / 3)], 1.0) == [pytest.approx(1.208, abs=5e-4)]
    assert phi_of([math.log(3 / 2)], -1.0) == [pytest.approx(1.242, abs=5e-4)]


@pytest.mark.parametrize("log_w", [1000.0, -1000.0, math.inf, -math.inf])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_phi_far_away_is_exactly_zero(log_w, advantage):
    assert phi_of([log_w], advantage) == [0.0]


@pytest.mark.parametrize("c1", [0.0, 2.0])
@pytest.mark.parametrize("c2", [0.0, 3.0])
def test_phi_is_finite_without_one_of_its_factors(c1, c2):
    log_w = [-math.inf, -1000.0, 0.0, 1000.0, math.inf]
    lowest, low, one, high, highest = phi_of(log_w, 1.0, GammaKernel(positive=(c1, c2)))
    assert one == 1.0
    assert lowest == low == (0.0 if c1 else pytest.approx(math.exp(c2)))
    assert highest == high == (0.0 if c2 else pytest.approx(math.exp(20 * c1)))


def test_sign_of_the_advantage_chooses_the_exponents():
    kernel = GammaKernel(positive=(1.0, 0.0), negative=(2.0, 0.0))
    log_w_S = torch.full((4,), math.log(3.0))
    advantages_S = torch.tensor([0.5, -0.5, 0.0, -0.0])
    assert kernel.phi(log_w_S, advantages_S).tolist() == pytest.approx([3.0, 9.0, 3.0, 3.0])


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_second_moment_of_phi_is_bounded_by_that_of_the_tilted_policy(advantage, spread):
    """E[phi^2] <= Z K C, Z = E[phi], K = sup phi(W) / W, C = E[W] under mu phi / Z (Proposition 3.1)."""
    c1, c2 = KERNEL.positive if advantage > 0 else KERNEL.negative
    sup = ((c1 - 1) / c2) ** (c1 - 1) * math.exp(c2 - c1 + 1)
    assert sup == pytest.approx({1.0: 2.463, -1.0: 1.0}[advantage], abs=5e-4)
    log_w = np.linspace(-40, 19, 10_000)
    phi = np.array(phi_of(log_w, advantage), np.float64)
    assert (phi / np.exp(log_w)).max() == pytest.approx(sup, rel=1e-4)
    for seed in range(20):
        # as log W of a long response: E_mu[W] = 1
        log_w = np.random.default_rng(seed).normal(-(spread**2) / 2, spread, 500)
        phi = np.array(phi_of(log_w, advantage), np.float64)
        normalizer = phi.mean()
        budget = (phi * np.exp(log_w)).mean() / normalizer
        assert (phi**2).mean() <= normalizer * sup * budget * (1 + 1e-5)


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([1.0, -1.0]),
    st.sampled_from([(2.0, 3.0), (3.0, 2.0), (0.0, 3.0), (2.0, 0.0), (0.0, 0.0), (100.0, 100.0)]),
)
def test_phi_of_any_finite_log_w_is_finite(log_w, advantage, pair):
    [phi] = phi_of([log_w], advantage, GammaKernel(pair, pair))
    assert 0.0 <= phi < math.inf


@given(st.floats(-30, 30), st.sampled_from([1.0, -1.0]))
def test_phi_lies_between_zero_and_its_maximum(log_w, advantage):
    c1, c2 = KERNEL.positive if advantage > 0 else KERNEL.negative
    (phi,) = phi_of([log_w], advantage)
    assert 0.0 <= phi <= (c1 / c2) ** c1 * math.exp(c2 - c1) * (1 + 1e-6)


def test_phi_is_computed_in_float32_for_half_precision_input():
    log_w_S = torch.tensor([0.25], dtype=torch.bfloat16)
    phi_S = KERNEL.phi(log_w_S, torch.ones(1, dtype=torch.bfloat16))
    assert phi_S.dtype == torch.float32
    assert phi_S.item() == pytest.approx(math.exp(2 * 0.25 + 3 * (1 - math.exp(0.25))), rel=1e-6)


def test_segment_sum_of_32k_tokens_is_exact_to_fp32_rounding():
    generator = torch.Generator().manual_seed(0)
    values_T = torch.randn(32768, generator=generator) * 0.02 + 10.0
    ids_T = torch.randint(0, 3, (32768,), generator=generator).sort().values
    sums_S = segment_sum(values_T, ids_T, 4)
    expected = [values_T[ids_T == s].double().sum().item() for s in range(4)]
    assert sums_S.dtype == torch.float32
    assert sums_S.tolist() == torch.tensor(expected).tolist()  # the nearest float32 of each
    assert sums_S[3] == 0.0


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seed=st.integers(0, 2**16),
    padding=st.integers(0, 5),
    denominator=st.sampled_from(RATIO_DENOMINATORS),
    truncation=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_log_ratio_is_that_of_the_loop(lengths, seed, padding, denominator, truncation):
    fields = batch(lengths, seed, padding)
    ratio = ratio_of(fields, len(lengths), denominator, truncation)
    expected = naive_log_ratio(fields, len(lengths), denominator, truncation)
    assert ratio.log_w_S.dtype == torch.float32
    assert ratio.log_w_S.tolist() == pytest.approx(expected, abs=1e-5)


def test_log_ratio_has_its_parts():
    fields = {
        "log_probs_T": torch.tensor([-1.0, -2.0, -1.0]),
        "old_log_probs_T": torch.tensor([-1.5, -2.0, -1.0]),
        "behavior_log_probs_T": torch.tensor([-1.5, -4.0, -0.5]),
        "loss_mask_T": torch.ones(3),
        "sequence_ids_T": torch.tensor([0, 0, 1]),
    }
    expected = {  # staleness is 0.5 and 0, the engine gap 2 and -0.5, the bound log 2
        "recomputed": ([0.5, 0.0], [0.0, 0.0]),
        "rollout": ([2.5, -0.5], [2.0, -0.5]),
        "decoupled": ([0.5 + math.log(2), -0.5], [math.log(2), -0.5]),
        "decoupled-token": ([0.5 + math.log(2), -0.5], [math.log(2), -0.5]),
    }
    for denominator, (log_w, mismatch) in expected.items():
        ratio = ratio_of(fields, 2, denominator)
        assert ratio.log_w_S.tolist() == pytest.approx(log_w)
        assert ratio.log_mismatch_in_w_S.tolist() == pytest.approx(mismatch)
        assert ratio.log_mismatch_S.tolist() == [2.0, -0.5]
        assert ratio.log_pi_over_mu_S.tolist() == [2.5, -0.5]


def test_rollout_denominator_does_without_old_log_probs():
    fields = batch([4, 5], seed=1)
    with_old = ratio_of(fields, 2, "rollout")
    without = ratio_of(fields | {"old_log_probs_T": None}, 2, "rollout")
    assert without.log_w_S.tolist() == pytest.approx(with_old.log_w_S.tolist(), abs=1e-6)
    assert torch.isnan(without.log_mismatch_in_w_S).all() and torch.isnan(without.log_mismatch_S).all()
    assert torch.equal(without.log_pi_over_mu_S, without.log_w_S)


def test_the_ratio_of_a_nan_that_is_not_masked_stays_visible():
    fields = batch([6, 6], seed=2)
    fields["behavior_log_probs_T"][fields["loss_mask_T"].nonzero()[0]] = torch.nan
    assert torch.isnan(ratio_of(fields, 2, "rollout").log_w_S).tolist() == [True, False]


@pytest.mark.parametrize("denominator", ["recomputed", *DECOUPLED])
def test_the_other_denominators_need_old_log_probs(denominator):
    needs = f"denominator {denominator} needs pi_old: call compute_old_log_probs"
    with pytest.raises(ValueError, match=needs):
        ratio_of(batch([4]) | {"old_log_probs_T": None}, 1, denominator)


def test_a_ratio_carries_no_gradient():
    fields = batch([5], seed=3)
    fields["log_probs_T"].requires_grad_()
    parts = vars(ratio_of(fields, 1, "decoupled"))
    assert len(parts) == 4 and not any(part_S.requires_grad for part_S in parts.values())


@pytest.mark.parametrize("denominator", RATIO_DENOMINATORS)
def test_log_w_of_32k_tokens_is_that_of_float64(denominator):
    """Three responses of 32k tokens and a short one; a running sum in float32 would not do."""
    generator = torch.Generator().manual_seed(0)
    lengths = [32768, 5, 32768, 32000]
    ids_T = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    old_T = -1.0 - torch.rand(len(ids_T), generator=generator)
    log_probs_T = old_T + 0.01 * torch.randn(len(ids_T), generator=generator)
    behavior_T = old_T + 0.02 * torch.randn(len(ids_T), generator=generator)
    behavior_T[::1000] -= 1.0  # a rho of 2.7, above the truncation
    mask_T = (torch.arange(len(ids_T)) % 7 > 0).float()

    def exact(one_T, other_T, most=math.inf):
        terms_T = (one_T.double() - other_T.double()).clamp(max=most) * mask_T
        return torch.stack([terms_T[ids_T == s].sum() for s in range(4)])

    staleness_S, gap_S = exact(log_probs_T, old_T), exact(old_T, behavior_T)
    expected_S = {
        "recomputed": staleness_S,
        "rollout": staleness_S + gap_S,
        "decoupled": staleness_S + gap_S.clamp(max=math.log(2.0)),
        "decoupled-token": staleness_S + exact(old_T, behavior_T, math.log(2.0)),
    }[denominator]
    ratio = sequence_log_ratio(log_probs_T, behavior_T, old_T, mask_T, ids_T, 4, denominator, 2.0)
    assert (ratio.log_w_S.double() - expected_S).abs().max() < 2e-6
    terms_T = ((log_probs_T - behavior_T) * mask_T).numpy()
    running = terms_T[: lengths[0]].cumsum(dtype=np.float32)[-1]
    assert abs(running - (staleness_S + gap_S)[0].item()) > 1e-5
