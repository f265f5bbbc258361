"""Spread and divergence of tokens, against loops and against a distribution whose KL is known."""

import math

import numpy as np
import pytest
import torch

from megatron_vespo.algorithms.token_sums import TokenSums, token_metrics, token_sums


def naive(values: list[float], prefix: str = "") -> dict[str, float]:
    n = len(values)
    mean = sum(values) / n
    return {
        f"ratio/{prefix}token_sigma": math.sqrt(sum((x - mean) ** 2 for x in values) / n),
        f"kl/{prefix}k1": sum(-x for x in values) / n,
        f"kl/{prefix}k2": sum(x * x / 2 for x in values) / n,
        f"kl/{prefix}k3": sum(math.exp(x) - 1 - x for x in values) / n,
    }


def test_sums_over_micro_batches_are_means_over_all_tokens():
    draw = np.random.default_rng(0)
    ratio, engine = draw.normal(0.1, 0.5, 90), draw.normal(-0.05, 0.02, 90)
    mask = draw.random(90) < 0.7
    sums = np.zeros((2, len(TokenSums._fields)))
    for piece, junk in ((slice(0, 11), torch.nan), (slice(11, 60), 5.0), (slice(60, 90), torch.inf)):
        shown = [torch.tensor(values[piece]) for values in (ratio, engine)]
        for values in shown:
            values[~torch.tensor(mask[piece])] = junk
        piece_sums = [token_sums(values, torch.tensor(mask[piece], dtype=torch.float32)) for values in shown]
        assert {value.dtype for of in piece_sums for value in of} == {torch.float64}
        sums += np.array(piece_sums)
    ratio_sums, engine_sums = (TokenSums(*of) for of in sums)
    found = token_metrics(ratio_sums, mask.sum(), "") | token_metrics(engine_sums, mask.sum(), "engine_")
    expected = naive(list(ratio[mask])) | naive(list(engine[mask]), "engine_")
    assert found == pytest.approx(expected, rel=1e-10)


def test_the_estimators_estimate_the_divergence():
    """Of three tokens, drawn by q: k1 and k3 are right in the mean, k2 nearly so for close distributions."""
    q, p = np.array([0.5, 0.3, 0.2]), np.array([0.45, 0.33, 0.22])
    kl = float((q * np.log(q / p)).sum())
    log_ratio = torch.tensor(np.log(p / q)).repeat_interleave(torch.tensor([50, 30, 20]))
    metrics = token_metrics(token_sums(log_ratio, torch.ones(100)), 100, "")
    assert metrics["kl/k1"] == pytest.approx(kl, rel=1e-9)
    assert metrics["kl/k3"] == pytest.approx(kl, rel=1e-9)
    assert metrics["kl/k2"] == pytest.approx(kl, rel=0.05)
    equal = token_metrics(token_sums(torch.zeros(100), torch.ones(100)), 100, "engine_")
    assert equal == naive([0.0], "engine_") and set(equal.values()) == {0.0}


def test_a_huge_ratio_stays_finite_and_small_ones_are_exact():
    for values_T in (torch.tensor([1e3, 1e-9]), torch.tensor([-1e3, 0.0])):
        assert all(torch.isfinite(value) for value in token_sums(values_T, torch.ones(2)))
    tiny = token_sums(torch.tensor([1e-5], dtype=torch.float64), torch.ones(1))
    assert tiny.k3.item() == pytest.approx(0.5e-10, rel=1e-4)


def test_no_gradient_flows():
    log_ratio = torch.tensor([0.5, -0.5], requires_grad=True)
    assert not any(value.requires_grad for value in token_sums(log_ratio, torch.ones(2)))


def test_nothing_waits_for_the_device():
    """Tensors on `meta` have no values: whatever asks for one raises."""
    values_T, mask_T = torch.zeros(5, device="meta"), torch.ones(5, device="meta")
    with pytest.raises(RuntimeError):
        values_T.sum().item()
    assert {value.shape for value in token_sums(values_T, mask_T)} == {()}
