"""Whole runs with a reference policy, in the reward and in the loss, killed and resumed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.support.interrupted import MINI_BATCHES, STEPS, command, curve
from tests.support.runs import START_S, Run, finished, nothing_left

KL = "--kl-coef 0.05 --kl-loss-coef 0.02 --kl-loss-type k2 --unbiased-kl 4 --lr 1e-3".split()
# within a rollout batch: the checkpoint of step 4 has the policy of step 3
MOVING = ["--reference-update-interval", "3"]


def metric(points: list[dict], name: str) -> dict[int, float]:
    return {record["step"]: record[name] for record in points if name in record}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("more", [MOVING, []])
def test_a_killed_run_goes_on_exactly(tiny_model, tmp_path, more: list[str]):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(command(tiny_model, whole, *KL, *more), tmp_path / "whole.log")
    expected = curve(whole)
    with Run(command(tiny_model, killed, *KL, *more), tmp_path / "killed.log") as run:
        run.wait_for_output(f" 6/{STEPS} ", START_S)
        run.process.kill()
        run.process.wait()
        assert nothing_left(run, timeout_s=30.0)
    said = finished(command(tiny_model, killed, *KL, *more), tmp_path / "resumed.log")
    assert "resumed at optimizer step " in said
    assert curve(killed) == expected
    check(expected)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_beside_the_engines_with_routes_and_masks(tiny_model, tmp_path, sglang_plugin, replay: str):
    """The reference has its weights where the policy's are, and its log-probs have routes and masks too."""
    sglang_plugin("lost_memory")
    flags = f"--colocate --rollout-engines 2 --routing-replay {replay} --rollout-top-p 0.9".split()
    finished(command(tiny_model, tmp_path / "run", *KL, *MOVING, *flags), tmp_path / "run.log")
    points = curve(tmp_path / "run")
    check(points)
    sizes = metric(points, "rollout/support_size_mean")
    assert 1 < min(sizes.values()) and max(sizes.values()) < 128


def check(points: list[dict]) -> None:
    k3, loss = metric(points, "reference/kl_k3"), metric(points, "reference/kl_loss")
    penalties = metric(points, "reference/penalty_mean")
    assert list(k3) == list(loss) == list(penalties) == list(range(MINI_BATCHES, STEPS + 1, MINI_BATCHES))
    assert all(math.isfinite(value) for value in [*k3.values(), *loss.values(), *penalties.values()])
    # the first batch's penalty is only the gap between engine and trainer
    first, *others = penalties.values()
    assert abs(first) < 1e-4 and max(map(abs, others)) > 1e-4
    assert max(k3.values()) > 1e-6 and min(loss.values()) > 0
    print(f"k3 {k3}")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--unbiased-kl", "2"], "--kl-loss-coef"),
        (["--kl-coef", "0.1", "--reference-checkpoint", "/nowhere"], "--reference-checkpoint /nowhere"),
    ],
)
def test_a_mistake_gets_one_line(tiny_model, tmp_path: Path, flags: list[str], words: str):
    said = finished(command(tiny_model, tmp_path / "run", *flags), tmp_path / "log", code=2)
    assert words in said and "Traceback" not in said
