"""The same numbers on every layout: log-probs, sequence log-ratios, losses, gradients."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.random_task import split

LAYOUTS = [
    "tp2",
    "pp2",
    "pp2 vpp2",
    "cp2",
    "ep2",
    "etp2",
    "ep2, allgather",
    "cp2 ep2, allgather",
    "dp2, small packs",
    "dp2, overlap",
    "one rank, recompute",
    "one rank, selective",
    "tp2 cp2",
    "tp2 pp2 ep2",
    "pp2 vpp2 cp2, recompute, overlap",
    pytest.param("dp2", marks=pytest.mark.slow),
]
ON_EVERY_RANK = (
    "log_probs log_ratio loss grad_norm learning_rate num_tokens log_w weight log_mismatch_in_w log_mismatch "
    "entropy ratio_sums log_mismatch_sums gradient_norms"
)
PER_SEQUENCE = ("log_w", "weight", "log_mismatch_in_w", "log_mismatch", "log_mismatch_abs_max")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_of_any_layout_would_get_their_shards(training_run, layout):
    """By the plan of the weight sync, from the loaded weights."""
    for result in training_run(layout):
        assert result["wrong_shards"].tolist() == []


@pytest.mark.parametrize("layout", ["one rank", "tp2 pp2 ep2"])
def test_log_probs_equal_transformers(task, training_run, layout):
    for result in training_run(layout):
        difference = np.abs(result["log_probs"] - task.log_probs).max()
        print(f"{layout}: log-probs {difference:.1e}")
        assert difference < 5e-5


@pytest.mark.parametrize("layout", ["one rank", "tp2 pp2 ep2"])
def test_sequence_log_ratio_is_the_sum_over_the_completion(task, training_run, layout):
    behavior = np.concatenate([sample.behavior_log_probs for sample in task.samples])
    per_token = task.log_probs.astype(np.float64) - behavior
    expected = [values.sum() for values in split(per_token, task.samples)]
    np.testing.assert_allclose(training_run(layout)[0]["log_ratio"], expected, rtol=0, atol=1e-4)


def test_log_probs_of_samples_that_the_ranks_cannot_share_equally(training_run):
    for result in training_run("ep2"):  # three samples on two data-parallel ranks
        three = result["log_probs_of_three"]
        np.testing.assert_allclose(three, result["log_probs"][: len(three)], rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_knows_the_same(training_run, layout):
    first, *others = training_run(layout)
    for rank, other in enumerate(others, start=1):
        for name in ON_EVERY_RANK.split():
            np.testing.assert_array_equal(other[name], first[name], err_msg=f"{name} on rank {rank}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_depend_on_the_layout(training_run, layout):
    one, other = training_run("one rank")[0], training_run(layout)[0]
    worst = {name: np.abs(other[name] - one[name]).max() for name in PER_SEQUENCE} | {
        name: np.abs(other[name] / one[name] - 1).max() for name in ("loss", "grad_norm", "entropy")
    }
    print(f"{layout}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    np.testing.assert_array_equal(other["num_tokens"], one["num_tokens"])
    np.testing.assert_array_equal(other["learning_rate"], one["learning_rate"])
    assert max(worst[name] for name in PER_SEQUENCE) <= 1e-5
    assert max(worst["loss"], worst["entropy"]) <= 1e-6
    assert worst["grad_norm"] <= 1e-5
    np.testing.assert_allclose(other["gradient_norms"], one["gradient_norms"], rtol=1e-5)
    # a few thousand tokens, each as far from the other layout's as sequences may be together
    for name in ("ratio_sums", "log_mismatch_sums"):
        np.testing.assert_allclose(other[name], one[name], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_step_is_the_naive_reference(task, naive_steps, training_run, layout):
    """Of transformers, token by token; a third of the samples has given tokens."""
    assert any(sample.num_trained < sample.completion_length for sample in task.samples)
    run = training_run(layout)[0]
    loss, grad_norm, terms = naive_steps["first step"]
    worst = {
        "log_w": np.abs(run["log_w"][0] - naive_steps["first log_w"]).max(),
        "loss": abs(run["loss"][0] - loss) / terms,
        "grad_norm": abs(run["grad_norm"][0] / grad_norm - 1),
    }
    print(f"{layout}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    assert worst["log_w"] <= 1e-5 and worst["loss"] <= 1e-5 and worst["grad_norm"] <= 1e-5


def test_training_changes_the_ratios(training_run):
    """Else the comparison of layouts would compare zeros."""
    run = training_run("one rank")[0]
    gap = np.minimum(run["log_mismatch"], np.log(2.0))
    staleness = run["log_w"] - gap
    assert np.abs(staleness[0]).max() < 1e-4  # the first step trains the policy that was prepared
    assert np.abs(staleness[3]).max() > 1e-2
    assert (run["log_mismatch"][0] > np.log(2.0)).any()
    assert (run["grad_norm"] > 0.01).all() and np.ptp(run["loss"]) > 1e-3
