"""Log W, loss and gradient do not depend on how a mini-batch is cut, ordered and chunked."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.support.random_task import split

# name -> --max-tokens-per-gpu, --log-prob-chunk-size, seed of the order
VARIANTS = {
    "one pack": (4096, 4096, None),
    "packs of 256": (256, 4096, None),
    "packs of 100": (100, 4096, None),
    "packs of 50": (50, 4096, None),
    "chunks of 64": (4096, 64, None),
    "chunks of 7": (4096, 7, None),
    "chunks of 1": (256, 1, None),
    "another order": (4096, 4096, 0),
    "another order, small packs, small chunks": (100, 13, 1),
}


@pytest.fixture(scope="module")
def result(on_task):
    flags = "--ratio-denominator decoupled --mismatch-truncation 1.2 --variants".split()
    return on_task("invariance.py", 1, *flags, json.dumps(VARIANTS))[0]


def test_the_variants_are_different(result):
    assert result["one pack micro_batches"] == 1
    counts = [int(result[f"packs of {budget} micro_batches"]) for budget in (256, 100, 50)]
    assert 2 < counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "one pack"])
def test_only_rounding_differs(result, variant):
    one, other = (
        {key: result[f"{name} {key}"] for key in ("log_w", "loss", "grad_norm", "gradient_norms")}
        for name in ("one pack", variant)
    )
    log_w = np.abs(other["log_w"] - one["log_w"]).max()
    worst = {key: np.abs(other[key] / one[key] - 1).max() for key in ("loss", "grad_norm", "gradient_norms")}
    print(f"{variant}: log_w {log_w:.1e}, " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()))
    assert log_w <= 1e-5
    assert worst["loss"] <= 1e-6
    assert worst["grad_norm"] <= 1e-6
    assert worst["gradient_norms"] <= 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_denominators(task, result, variant):
    """The public call against float64 sums of what the samples hold: old is half-way to the engine's."""
    log_probs = split(task.log_probs.astype(np.float64), task.samples)
    samples = task.samples[: len(result[f"{variant} log_w"])]
    gap = np.array([(log_probs[i] - sample.behavior_log_probs).sum() / 2 for i, sample in enumerate(samples)])
    by_token = np.array(
        [
            np.minimum((log_probs[i] - sample.behavior_log_probs) / 2, np.log(1.2)).sum()
            for i, sample in enumerate(samples)
        ]
    )
    expected = {"recomputed": gap, "rollout": 2 * gap, "decoupled": gap + np.minimum(gap, np.log(1.2))}
    expected["decoupled-token"] = gap + by_token
    assert (gap > np.log(1.2)).any()
    for denominator, values in expected.items():
        np.testing.assert_allclose(result[f"{variant} {denominator}"], values, rtol=0, atol=5e-5)
