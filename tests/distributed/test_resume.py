"""A run that was stopped after two of four steps goes on as if nothing had happened."""

from __future__ import annotations

import numpy as np
import pytest

PER_STEP = "loss grad_norm learning_rate num_tokens log_w weight log_mismatch".split()


@pytest.mark.parametrize("layout", ["one rank", "tp2 pp2 ep2"])
def test_resumed_equals_uninterrupted(training_run, train, outputs, layout):
    uninterrupted = training_run(layout)
    resumed = train(layout, "--load", str(outputs / layout / "saved"))
    for expected, actual in zip(uninterrupted, resumed, strict=True):
        assert actual["first_iteration"] == 2
        assert actual["consumed_prompts"] == 7
        for name in PER_STEP:
            np.testing.assert_array_equal(actual[name], expected[name][2:], err_msg=name)


def at_lr(step: int, lr: float) -> float:
    """In the warm-up of three steps."""
    return lr * min(step, 3) / 3


@pytest.mark.parametrize("layout", ["one rank", "tp2 pp2 ep2"])
def test_the_flags_of_the_command_count(training_run, train, outputs, layout):
    expected, saved = training_run(layout)[0], str(outputs / layout / "saved")
    flags = "--lr 1e-5 --min-lr 1e-6 --adam-beta1 0.8 --weight-decay 0.1".split()
    actual = train(layout, "--load", saved, *flags)[0]
    assert actual["betas"].tolist() == [0.8, 0.95]
    np.testing.assert_allclose(actual["learning_rate"], [at_lr(2, 1e-5), at_lr(3, 1e-5)], rtol=1e-6)
    assert actual["first_iteration"] == 2
    assert actual["grad_norm"][0] == expected["grad_norm"][2]  # the same weights, another step
    assert actual["grad_norm"][1] != expected["grad_norm"][3]


def test_the_checkpoints_schedule_counts_where_it_is_asked_for(training_run, train, outputs):
    expected = training_run("tp2 pp2 ep2")[0]
    flags = ["--lr", "1e-5", "--min-lr", "1e-6", "--use-checkpoint-opt-param-scheduler"]
    actual = train("tp2 pp2 ep2", "--load", str(outputs / "tp2 pp2 ep2" / "saved"), *flags)[0]
    for name in PER_STEP:
        np.testing.assert_array_equal(actual[name], expected[name][2:], err_msg=name)


def test_resumed_at_another_layout(training_run, train, outputs):
    expected = training_run("tp2 pp2 ep2")[0]
    actual = train("ep2", "--load", str(outputs / "tp2 pp2 ep2" / "saved"))[0]
    assert actual["first_iteration"] == 2
    difference = {name: np.abs(actual[name] - expected[name][2:]).max() for name in PER_STEP}
    print(", ".join(f"{name} {value:.1e}" for name, value in difference.items()))
    assert difference["learning_rate"] == difference["num_tokens"] == 0
    assert difference["loss"] < 1e-5
    assert difference["grad_norm"] < 1e-4
    assert max(difference[name] for name in ("log_w", "weight", "log_mismatch")) < 1e-4
