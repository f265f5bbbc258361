"""--vespo-budget through MegatronPolicy: the kernel of each step, at several layouts and across a resume."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vespo.algorithms.vespo import GammaKernel
from megatron_vespo.algorithms.vespo_budget import adapted

BUDGET = 1.02
FLAGS = ("--vespo-budget", str(BUDGET))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("budget")


@pytest.fixture(scope="module")
def one_rank(train, folder):
    return train("one rank", *FLAGS, "--save", str(folder / "saved"), "--save-after", "2")[0]


def test_every_step_uses_the_kernel_that_the_last_one_made(one_rank, task):
    kernel = GammaKernel()
    mini_batches = np.split(np.array([sample.advantage for sample in task.samples], np.float32), 2)
    for step in range(4):
        used = [kernel.positive[1], kernel.negative[1]]
        assert one_rank["kernel_c2"][step].tolist() == used
        advantages, log_w = mini_batches[step % 2], one_rank["log_w"][step]
        c1 = np.where(advantages >= 0, 2.0, 3.0)
        c2 = np.where(advantages >= 0, *used)
        phi = np.exp(c1 * log_w + c2 * (1 - np.exp(log_w)))
        np.testing.assert_allclose(one_rank["weight"][step], phi, rtol=1e-5)
        shares = np.stack([advantages > 0, advantages < 0], axis=1).astype(float)
        kernel, expected = adapted(kernel, BUDGET, log_w, shares)
        np.testing.assert_array_equal(one_rank["expected_w"][step], expected)
    moved = np.abs(np.diff(one_rank["kernel_c2"], axis=0))
    print("c2 a step:", one_rank["kernel_c2"].tolist())
    assert moved.min() > 1e-5, "a kernel that stands still would pass this test"


@pytest.mark.parametrize("layout", ["dp2", "cp2", "tp2 pp2 ep2"])
def test_the_kernels_do_not_depend_on_the_layout(one_rank, train, layout):
    results = train(layout, *FLAGS)
    for result in results:
        np.testing.assert_array_equal(result["kernel_c2"], results[0]["kernel_c2"])
        np.testing.assert_array_equal(result["expected_w"], results[0]["expected_w"])
        np.testing.assert_allclose(result["kernel_c2"], one_rank["kernel_c2"], rtol=1e-6)
        np.testing.assert_allclose(result["expected_w"], one_rank["expected_w"], rtol=1e-5)
        np.testing.assert_allclose(result["weight"], one_rank["weight"], rtol=1e-4)


def test_resumed_equals_uninterrupted(one_rank, train, folder):
    resumed = train("one rank", *FLAGS, "--load", str(folder / "saved"))[0]
    assert resumed["first_iteration"] == 2 and resumed["consumed_prompts"] == 7
    for name in ("kernel_c2", "expected_w", "weight", "log_w", "loss", "grad_norm"):
        np.testing.assert_array_equal(resumed[name], one_rank[name][2:], err_msg=name)


def test_without_the_flag_a_resumed_kernel_is_the_commands(train, folder, one_rank):
    resumed = train("one rank", "--load", str(folder / "saved"))[0]
    assert np.isnan(resumed["kernel_c2"]).all()
    # W is the same in the third step, phi is that of the fixed kernel again
    np.testing.assert_array_equal(resumed["log_w"][0], one_rank["log_w"][2])
    assert (resumed["weight"][0] != one_rank["weight"][2]).any()
