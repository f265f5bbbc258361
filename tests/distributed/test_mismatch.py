"""Corrections of the engine mismatch in train_step: against the formulas, the same at every layout."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.naive_losses import bernoulli_kl
from tests.support.random_task import split

NUM_SAMPLES = 24
LAYOUTS = {
    "small packs": (1, "--max-tokens-per-gpu 64"),
    "cp2": (2, "--context-parallel-size 2"),
    "tp2 pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                   "--expert-tensor-parallel-size 1"),
}  # fmt: skip
CORRECTIONS = {
    "none": lambda rho: np.ones_like(rho),
    "importance": lambda rho: rho,
    "tis": lambda rho: np.minimum(rho, 1.1),
    "sequence-tis": lambda rho: np.full_like(rho, min(rho.prod(), 1.1)),
    "icepop": lambda rho: np.where((rho >= 0.9) & (rho <= 1.1), rho, 0.0),
    "token-mask": lambda rho: np.where((rho >= 0.9) & (rho <= 1.1), 1.0, 0.0),
    "reject-product": lambda rho: np.full_like(rho, rho.prod() <= 1.1),
    "reject-geometric": lambda rho: np.full_like(rho, 0.98 <= rho.prod() ** (1 / len(rho)) <= 1.02),
    "reject-k3": lambda rho: np.full_like(rho, np.mean(rho - 1 - np.log(rho)) <= 0.005),
}
# of pi_old, mu and log(pi / mu) of a response's tokens, and its advantage
CORRECTIONS_OF_MORE = {
    "kpop": lambda old, mu, log_ratio, a: (np.maximum(kls(old, mu), kls(mu, old)) <= 5e-5).astype(float),
    "reject-binary-kl": lambda old, mu, log_ratio, a: np.full_like(mu, kls(mu, old).mean() <= 5e-5),
    "opsm": lambda old, mu, log_ratio, a: np.full_like(mu, a >= 0 or -log_ratio.mean() <= 0.01),
}


def kls(of, to):
    return np.array([bernoulli_kl(p, q) for p, q in zip(of, to, strict=True)])


def weight_of(name, now, old, mu, advantage):
    """Of the tokens of a response, from their log-probs."""
    if name in CORRECTIONS:
        return CORRECTIONS[name](np.exp(old - mu))
    return CORRECTIONS_OF_MORE[name](np.exp(old), np.exp(mu), now - mu, advantage)


@pytest.fixture(scope="module")
def run(on_task):
    return lambda num_ranks, flags: on_task("mismatch.py", num_ranks, *flags.split())


@pytest.fixture(scope="module")
def one_rank(run):
    return run(1, "")[0]


def vespo(now, old, advantage):
    w = np.exp((now - old).sum())
    c1, c2 = (2.0, 3.0) if advantage >= 0 else (3.0, 2.0)
    return -(w**c1) * np.exp(c2 * (1 - w)) * advantage * now


def grpo(now, old, advantage):
    r = np.exp(now - old)
    return -np.minimum(r * advantage, r.clip(0.8, 1.28) * advantage)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        (name, loss)
        for name in CORRECTIONS | CORRECTIONS_OF_MORE
        for loss in (vespo, grpo)
        if (name, loss) != ("importance", vespo)
    ],
)
def test_a_step_is_the_closed_form(task, one_rank, name, loss):
    samples = task.samples[:NUM_SAMPLES]
    case = f"{name} recomputed {loss.__name__}"
    total, tokens = 0.0, 0
    fields = (split(one_rank[field].astype(np.float64), samples) for field in ("log_probs", "old_log_probs"))
    for i, (sample, now, old) in enumerate(zip(samples, *fields, strict=True)):
        mu = sample.behavior_log_probs.astype(np.float64)
        weight = weight_of(name, now, old, mu, sample.advantage)
        total += (weight * loss(now, old, sample.advantage)).sum()
        tokens += len(now)
        assert one_rank[f"{case} correction"][i] == pytest.approx(weight.mean(), rel=1e-5)
        assert one_rank[f"{case} rejected"][i] == pytest.approx((weight == 0).mean(), abs=1e-6)
    # every trained token counts, rejected or not
    assert one_rank[case][0] == pytest.approx(total / tokens, rel=1e-4)
    rejected = one_rank[f"{case} rejected"]
    assert (rejected > 0).any() == (name in ("icepop", "token-mask", "kpop", "opsm") or "reject" in name)
    assert (rejected < 1).any()


def test_opsm_masks_also_where_pi_old_is_not_known(task, one_rank):
    """With `rollout`, W is pi / mu of the response, and so is what opsm compares."""
    total, tokens, samples = 0.0, 0, task.samples[:NUM_SAMPLES]
    for sample, now in zip(samples, split(one_rank["log_probs"].astype(np.float64), samples), strict=True):
        mu = sample.behavior_log_probs.astype(np.float64)
        weight = weight_of("opsm", now, now, mu, sample.advantage)
        total += (weight * vespo(now, mu, sample.advantage)).sum()
        tokens += len(now)
    assert one_rank["opsm rollout vespo"][0] == pytest.approx(total / tokens, rel=1e-4)


def test_pi_old_of_the_policy_is_corrected_too(task, one_rank):
    samples = task.samples[:NUM_SAMPLES]
    now = one_rank["log_probs"].astype(np.float64)
    mu = np.concatenate([sample.behavior_log_probs for sample in samples])
    advantage = np.concatenate([np.full(s.num_trained, s.advantage) for s in samples])
    expected = -np.mean(np.minimum(np.exp(now - mu), 1.1) * advantage * now)  # W is 1, and so is phi
    assert one_rank["tis recomputed vespo computed"][0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_corrections_do_not_depend_on_the_layout(one_rank, run, layout):
    cases = [case for case in one_rank if len(case.split()) == 3 or case.endswith("computed")]
    assert len(cases) == 1 + 11 + 12 + 8 + 2
    worst = np.zeros(3)
    for result in run(*LAYOUTS[layout]):
        for case in cases:
            loss, grad_norm, terms = np.abs(result[case] - one_rank[case]) / np.abs(one_rank[case][[2, 1, 2]])
            assert loss <= 1e-6 and terms <= 1e-6, f"{case}: loss {loss:.1e}"
            assert grad_norm <= 1e-5, f"{case}: grad_norm {grad_norm:.1e}"
            for name in ("weight", "correction", "rejected"):
                field = f"{case} {name}"
                np.testing.assert_allclose(
                    result[field], one_rank[field], rtol=2e-5, atol=1e-6, err_msg=field
                )
            worst = np.maximum(worst, [loss, grad_norm, terms])
    print(f"{layout}: loss {worst[0]:.1e} of its terms, grad_norm {worst[1]:.1e}")


def test_the_corrections_differ(one_rank):
    for loss in ("recomputed vespo", "recomputed grpo", "decoupled vespo", "rollout vespo"):
        norms = sorted(values[1] for case, values in one_rank.items() if case.split(" ", 1)[1:] == [loss])
        assert min(np.diff(norms)) > 1e-6 * norms[-1]
