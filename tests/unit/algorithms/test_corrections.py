"""Every correction of the engine mismatch against its formula, one response and one token after the other."""

import math

import pytest
import torch

from megatron_vespo.algorithms.corrections import CORRECTIONS, FORBIDDEN, Mismatch, why_forbidden
from megatron_vespo.algorithms.losses.inputs import LossInputs
from megatron_vespo.algorithms.losses.table import METHODS
from megatron_vespo.algorithms.vespo import DECOUPLED, RATIO_DENOMINATORS, LogRatio, segment_sum
from tests.support import naive_losses

LENGTHS = (5, 1, 4, 0, 3, 12)
ADVANTAGES = (-1.0, 1.0, -0.5, -1.0, 0.0, -2.0)
DRIFT = 0.7  # log(pi / mu) of a token, as a share of log(pi_old / mu): pi has moved back a part of the way
FAR = (1e4, 100.0, -100.0, -1e4)


def within(value, low, high) -> float:
    return 1.0 if low <= value <= high else 0.0


def k3(rhos) -> float:
    return sum(r - 1.0 - math.log(r) for r in rhos) / len(rhos)


def kls(rhos, mus):
    """KL(mu || pi_old) and KL(pi_old || mu) of the tokens against all others."""
    return [(naive_losses.bernoulli_kl(m, r * m), naive_losses.bernoulli_kl(r * m, m))
            for r, m in zip(rhos, mus, strict=True)]  # fmt: skip


def opsm(rhos, advantage) -> float:
    kl = sum(-DRIFT * math.log(r) for r in rhos) / len(rhos)
    return 0.0 if advantage < 0 and kl > 0.01 else 1.0


# of one response's rho: a weight for each of its tokens
NAIVE = {
    "none": lambda rhos: [1.0 for _ in rhos],
    "importance": lambda rhos: rhos,
    "tis": lambda rhos: [min(r, 2.0) for r in rhos],
    "sequence-tis": lambda rhos: [min(math.prod(rhos), 2.0)] * len(rhos),
    "icepop": lambda rhos: [r if 0.5 <= r <= 5.0 else 0.0 for r in rhos],
    "token-mask": lambda rhos: [within(r, 0.5, 5.0) for r in rhos],
    "reject-product": lambda rhos: [within(math.prod(rhos), 0.0, 2.0)] * len(rhos),
    "reject-geometric": lambda rhos: [within(math.prod(rhos) ** (1 / len(rhos)), 0.999, 1.002)] * len(rhos),
    "reject-k3": lambda rhos: [within(k3(rhos), 0.0, 0.01)] * len(rhos),
}
# of its rho, its tokens' mu and its tokens' advantages
NAIVE_OF_MORE = {
    "kpop": lambda rhos, mus, a: [within(max(pair), 0.0, 0.1) for pair in kls(rhos, mus)],
    "reject-binary-kl": lambda rhos, mus, a: (
        [within(sum(kl for kl, _ in kls(rhos, mus)) / len(rhos), 0.0, 0.01)] * len(rhos)
    ),
    "opsm": lambda rhos, mus, a: [opsm(rhos, advantage) for advantage in a],
}
every_correction = pytest.mark.parametrize("name", CORRECTIONS)


def batch(
    spread=1.0, seed=0, log_rho=None, token_spread=None
) -> tuple[LossInputs, torch.Tensor, torch.Tensor]:
    """Inputs, log pi_old and log mu [T] float64; what is not trained holds NaN."""
    inputs = naive_losses.batch(LENGTHS, ADVANTAGES, seed, 1.0, log_rho, token_spread=token_spread)
    log_rho_T, mu_T = inputs.log_ratio_T, inputs.log_probs_T.detach()
    if log_rho is None:
        # a response's own scale: some are close to the engine's, some are far from it
        log_rho_T = log_rho_T * spread * torch.tensor([0.01, 0.05, 0.5, 1.0, 1.0, 0.3])[inputs.sequence_ids_T]
    untrained_T = inputs.loss_mask_T == 0
    return inputs, *(values_T.masked_fill(untrained_T, torch.nan) for values_T in (mu_T + log_rho_T, mu_T))


def weight_of(name, inputs, old_T, mu_T, bounds=None) -> torch.Tensor:
    return CORRECTIONS[name].bind(bounds)(Mismatch.of(old_T, mu_T, log_ratio_of(inputs, old_T, mu_T), inputs))


def log_ratio_of(inputs, old_T, mu_T) -> LogRatio:
    log_rho_T = (old_T - mu_T).detach().masked_fill(inputs.loss_mask_T == 0, 0.0)
    log_product_S = segment_sum(log_rho_T, inputs.sequence_ids_T, len(inputs.advantages_S))
    nothing_S = torch.full_like(log_product_S, torch.nan)  # corrections do not look at W
    return LogRatio(nothing_S, nothing_S, log_product_S, DRIFT * log_product_S)


def naive(name, inputs, old_T, mu_T) -> list[float]:
    weights = [0.0] * len(old_T)
    for s in range(len(LENGTHS)):
        mine = [t for t in range(len(old_T)) if inputs.sequence_ids_T[t] == s and inputs.loss_mask_T[t] > 0]
        rhos = [math.exp(old_T[t].item() - mu_T[t].item()) for t in mine]
        if not mine:
            continue
        more = ([math.exp(mu_T[t].item()) for t in mine], [inputs.advantages_T[t].item() for t in mine])
        values = NAIVE[name](rhos) if name in NAIVE else NAIVE_OF_MORE[name](rhos, *more)
        for t, weight in zip(mine, values, strict=True):
            weights[t] = weight
    return weights


@every_correction
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spread", [0.02, 1.0, 3.0])
@pytest.mark.parametrize("token_spread", [None, 1.0], ids=["A per response", "A per token"])
def test_weights_are_the_formula(name, seed, spread, token_spread):
    fields = batch(spread, seed, token_spread=token_spread)
    weight_T = weight_of(name, *fields)
    assert weight_T.dtype == torch.float64
    torch.testing.assert_close(weight_T, torch.tensor(naive(name, *fields), dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name, entry in CORRECTIONS.items() if entry.bounds])
def test_the_batches_reach_the_bounds(name):
    """Else a correction could be the identity and nobody would know."""
    weights = torch.cat([weight_of(name, *(fields := batch(1.0, seed)))[fields[0].loss_mask_T > 0]
                         for seed in range(4)])  # fmt: skip
    if "tis" in name:
        assert 0.0 < weights.min() < 2.0 and (weights == 2.0).any()
    else:
        assert (weights == 0.0).any() and (weights > 0.0).any()


@every_correction
def test_no_gradient_flows_through_the_weight(name):
    inputs, old_T, mu_T = batch()
    old_T.requires_grad_()
    assert not weight_of(name, inputs, old_T, mu_T).requires_grad


@every_correction
@pytest.mark.parametrize("log_rho", FAR)
def test_far_away_weights_are_finite(name, log_rho):
    fields = batch(log_rho=log_rho)
    weight_T = weight_of(name, *fields)
    assert weight_T.isfinite().all()
    trained_T = weight_T[fields[0].loss_mask_T > 0]
    limits = {"none": (1.0, 1.0), "importance": (math.exp(20.0), 0.0), "reject-product": (0.0, 1.0)}
    limits |= {"tis": (2.0, 0.0), "sequence-tis": (2.0, 0.0)}
    above, below = limits.get(name, (0.0, 0.0))
    expected = torch.full_like(trained_T, above if log_rho > 0 else below)
    if name == "opsm":
        negative_T = fields[0].per_token(fields[0].advantages_S)[fields[0].loss_mask_T > 0] < 0
        expected = (~negative_T).double() if log_rho < 0 else torch.ones_like(trained_T)
    if name == "kpop" and log_rho > 0:  # pi_old counts as 1, and a mu close to it is close
        mus = fields[2][fields[0].loss_mask_T > 0].exp().tolist()
        expected = torch.tensor([within(max(kls([1 / mu], [mu])[0]), 0.0, 0.1) for mu in mus]).double()
    torch.testing.assert_close(trained_T, expected, rtol=1e-6, atol=1e-6)


@every_correction
@pytest.mark.parametrize("whose", ["pi_old", "mu"])
def test_nan_of_a_trained_token_stays_visible(name, whose):
    """Rejected, it would be a weight of 0: the sample would be lost without a word."""
    inputs, old_T, mu_T = batch(log_rho=0.0)
    (old_T if whose == "pi_old" else mu_T)[2] = torch.nan
    assert weight_of(name, inputs, old_T, mu_T)[2].isnan() == (name != "none")


@every_correction
def test_where_engine_and_trainer_agree_nothing_changes(name):
    fields = batch(log_rho=0.0)
    assert torch.equal(weight_of(name, *fields), fields[0].loss_mask_T.double())


@pytest.mark.parametrize(
    ("name", "bounds", "rho", "weight"),
    [
        ("tis", (0.5, 1.5), 0.25, 0.5),
        ("tis", (0.5, 1.5), 3.0, 1.5),
        ("icepop", (0.5, 1.5), 0.49, 0.0),
        ("icepop", (0.0, 1.5), 0.01, 0.01),
        ("token-mask", (0.5, 2.0), 1.999, 1.0),
        ("token-mask", (0.5, 2.0), 2.001, 0.0),
        ("reject-k3", (0.0, 1.0), math.e, 1.0),
        ("reject-k3", (0.0, 0.5), math.e, 0.0),
        ("kpop", (0.0, 2.0), 0.9, 1.0),
        ("kpop", (0.0, 1e-6), 0.9, 0.0),
        ("reject-binary-kl", (0.0, 2.0), 0.9, 1.0),
        ("reject-binary-kl", (0.0, 1e-6), 0.9, 0.0),
        ("opsm", (0.0, DRIFT + 0.01), 1 / math.e, 1.0),
    ],
)
def test_bounds_can_be_given(name, bounds, rho, weight):
    fields = batch(log_rho=math.log(rho))
    trained_T = weight_of(name, *fields, bounds)[fields[0].loss_mask_T > 0]
    torch.testing.assert_close(trained_T, torch.full_like(trained_T, weight))


@pytest.mark.parametrize(
    ("log_pi_over_mu", "advantage", "kept"),
    [(-0.9, -1.0, 1.0), (-1.1, -1.0, 0.0), (-1.1, 1.0, 1.0), (-1.1, 0.0, 1.0), (9.0, -1.0, 1.0)],
)
def test_opsm_masks_responses_that_are_worse_and_that_pi_has_left(log_pi_over_mu, advantage, kept):
    """Of ten tokens; the bound is 0.1 per token. Staleness and mismatch count alike, whatever rho is."""
    inputs = naive_losses.batch([10], [advantage])
    zero_T, nan_S = torch.zeros_like(inputs.log_ratio_T), torch.tensor([torch.nan])
    log_ratio = LogRatio(nan_S, nan_S, nan_S, torch.tensor([log_pi_over_mu]))
    weight_T = CORRECTIONS["opsm"].bind((0.0, 0.1))(Mismatch.of(zero_T, zero_T, log_ratio, inputs))
    assert torch.equal(weight_T, kept * inputs.loss_mask_T.double())


def test_kpop_asks_both_directions():
    """mu is 0.5 and pi_old 0.001: KL(pi_old || mu) is 0.69, KL(mu || pi_old) 2.8; and the reverse."""
    inputs = naive_losses.batch([1], [1.0])
    low_T, high_T = (torch.full_like(inputs.log_ratio_T, math.log(p)) for p in (0.001, 0.5))
    nan_S = torch.tensor([torch.nan])
    for old_T, mu_T in ((low_T, high_T), (high_T, low_T)):
        mismatch = Mismatch.of(old_T, mu_T, LogRatio(nan_S, nan_S, nan_S, nan_S), inputs)
        assert [CORRECTIONS["kpop"].bind((0.0, phi))(mismatch)[2] for phi in (1.0, 2.0, 3.0)] == [0, 0, 1]


def test_k3_of_a_small_mismatch_keeps_its_digits():
    fields = batch(log_rho=1e-6)  # k3 is 5e-13; exp(x) - 1 - x would be off by some 1e-16
    assert weight_of("reject-k3", *fields, (0.0, 5.1e-13)).sum() == sum(LENGTHS)
    assert weight_of("reject-k3", *fields, (0.0, 4.9e-13)).sum() == 0


class FakeGroup:
    """A context-parallel group of two: what the other rank would add to the next reduction."""

    def __init__(self, other):
        self.other = other

    def size(self):
        return 2


@every_correction
def test_a_response_cut_in_two_gets_the_same_weights(name, monkeypatch):
    """Each half of the tokens on its own rank, with the whole response's product and length."""
    inputs, old_T, mu_T = batch(seed=1)
    expected_T = weight_of(name, inputs, old_T, mu_T)
    log_ratio = log_ratio_of(inputs, old_T, mu_T)
    even_T = torch.arange(len(old_T)) % 2 == 0

    def half(chosen_T, group):
        fields = {name: v for name, v in vars(inputs).items() if v is not None}.items()
        mine = LossInputs(**{name: v[chosen_T] if name.endswith("_T") else v for name, v in fields})
        mismatch = Mismatch.of(old_T[chosen_T], mu_T[chosen_T], log_ratio, mine, group)
        return CORRECTIONS[name].bind(None)(mismatch)

    # the other half's sums, caught where they would be reduced, are what its partner adds
    sums = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values, group: sums.append(values.clone()))
    half(~even_T, FakeGroup(None))
    assert len(sums) == (name in ("reject-k3", "reject-binary-kl"))
    monkeypatch.setattr("torch.distributed.all_reduce", lambda values, group: values.add_(group.other))
    actual_T = half(even_T, FakeGroup(sums[0] if sums else None))
    torch.testing.assert_close(actual_T, expected_T[even_T])


# The table, written a second time: correction x denominator x whether the loss weighs tokens by their ratio.
RECOMPUTED_ONLY = {"tis", "sequence-tis", "icepop", "importance"}


@every_correction
@pytest.mark.parametrize("denominator", RATIO_DENOMINATORS)
@pytest.mark.parametrize("loss", METHODS)
def test_every_combination_is_allowed_or_refused_with_its_reason(name, denominator, loss):
    token_ratio = METHODS[loss].token_ratio
    rollout, decoupled, no_token_ratio = (rule.reason for rule in FORBIDDEN)
    reason = None
    if name == "none":
        pass
    elif denominator == "rollout":
        reason = None if name == "opsm" else rollout
    elif denominator in DECOUPLED and name in RECOMPUTED_ONLY:
        reason = decoupled
    elif name == "importance" and not token_ratio:
        reason = no_token_ratio
    assert why_forbidden(name, denominator, token_ratio) == reason
