"""phi in numpy is the phi that training computes, and its landmarks are where they say."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from megatron_vespo.algorithms import vespo
from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.commands.view import kernel as kernel_module
from megatron_vespo.commands.view.kernel import Kernel, thresholds

PAPER = (2.0, 3.0), (3.0, 2.0)
CONSTANTS = [PAPER, ((0.0, 3.0), (3.0, 0.0)), ((0.0, 0.0), (1.0, 1.0)), ((0.5, 9.0), (8.0, 0.1))]


@pytest.mark.parametrize("positive, negative", CONSTANTS)
def test_phi_is_that_of_training(positive, negative):
    log_w = np.concatenate([np.linspace(-30, 30, 4001), [-1e9, -2e4, 1e9, np.inf, -np.inf, 0.0]]).astype(
        np.float32
    )
    for advantage in (-0.7, 0.0, 1.3):
        advantages = np.full(len(log_w), advantage, np.float32)
        ours = Kernel(positive, negative).phi(log_w, advantages)
        theirs = (
            vespo.GammaKernel(positive, negative).phi(torch.tensor(log_w), torch.tensor(advantages)).numpy()
        )
        assert ours.dtype == np.float32 and np.isfinite(ours).all()
        # c2 = 0 has no peak: phi(20) is 1e26
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6)
        if (positive, negative) == PAPER:
            assert np.abs(ours - theirs).max() <= 1e-6


def test_the_bounds_are_those_of_training():
    for name in ("MAX_LOG_W", "MAX_LOG_PHI", "MIN_LOG_W"):
        assert getattr(kernel_module, name) == getattr(vespo, name)


def test_defaults_and_settings_are_those_of_the_loss():
    settings = LossSettings()
    assert Kernel.of({}) == Kernel(settings.vespo_positive, settings.vespo_negative, settings.policy_loss)
    stored = {"policy_loss": "vespo-sqrt", "vespo_positive": [1, 2], "vespo_negative": [4.5, 5]}
    assert Kernel.of(stored) == Kernel((1.0, 2.0), (4.5, 5.0), "vespo-sqrt")


def test_an_unknown_log_w_has_no_phi():
    assert np.isnan(Kernel().phi(np.array([np.nan]), np.array([1.0]))[0])


def test_ablations_scale_log_w_by_the_length():
    log_w, lengths = np.array([8.0, -3.0]), np.array([16, 4])
    assert Kernel(loss="vespo-mean").scaled(log_w, lengths).tolist() == [0.5, -0.75]
    assert Kernel(loss="vespo-sqrt").scaled(log_w, lengths).tolist() == [2.0, -1.5]
    assert Kernel(loss="grpo").scaled(log_w, lengths).tolist() == [8.0, -3.0]


@pytest.mark.parametrize("c1, c2", [(2.0, 3.0), (3.0, 2.0), (1.0, 1.0), (8.0, 0.1), (0.3, 9.0)])
def test_landmarks_are_where_phi_says(c1, c2):
    found, kernel = thresholds(c1, c2), Kernel((c1, c2), (c1, c2))
    grid = np.linspace(-50, 8, 800_001)
    phi = kernel.phi(grid, np.ones_like(grid)).astype(np.float64)
    assert found.peak == pytest.approx(math.log(c1 / c2)) == pytest.approx(grid[phi.argmax()], abs=2e-3)
    assert found.phi_peak == pytest.approx(phi.max(), rel=1e-5)
    for low, high, level in ((*found.half, phi.max() / 2), (*found.dead, 0.01)):
        assert low < found.peak < high
        above = grid[phi >= level]
        assert low == pytest.approx(above[0], abs=2e-4) and high == pytest.approx(above[-1], abs=2e-4)


def test_the_papers_peaks():
    assert thresholds(2.0, 3.0).phi_peak == pytest.approx(1.208, abs=5e-4)
    assert thresholds(3.0, 2.0).phi_peak == pytest.approx(1.242, abs=5e-4)


@pytest.mark.parametrize("c1, c2, dead", [(2.0, 0.0, (math.log(0.01) / 2, None)), (0.0, 0.0, (None, None))])
def test_without_a_peak_there_is_no_half(c1, c2, dead):
    found = thresholds(c1, c2)
    assert found.peak is found.phi_peak is None and found.half == (None, None) and found.dead == dead


def test_with_c1_of_0_phi_only_falls():
    [low, high] = thresholds(0.0, 3.0).dead
    assert low is None and Kernel((0.0, 3.0)).phi(np.array([high]), np.ones(1))[0] == pytest.approx(
        0.01, rel=1e-4
    )


@pytest.mark.long
def test_the_viewers_numbers_need_no_torch():
    modules = ("kernel", "index", "query", "distributions", "response_detail", "responses_api")
    program = "import sys\n" + "".join(f"import megatron_vespo.commands.view.{name}\n" for name in modules)
    program += "print(*sorted({'torch', 'ray', 'sglang', 'megatron', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("", "")
