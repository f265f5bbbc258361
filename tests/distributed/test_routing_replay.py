"""The experts of one pass imposed on another, at several layouts, under recomputation and in the backward."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.support.named_layouts import RECOMPUTE, SELECTIVE

VIRTUAL_STAGES = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"
# 4 or more micro-batches: several are in flight in a pipeline
FLAGS = "--max-tokens-per-gpu 128 --lr 1e-4"
LAYOUTS = {
    "one rank": (1, ""),
    "one rank, recompute": (1, RECOMPUTE),
    "pp2, selective recompute": (2, f"--pipeline-model-parallel-size 2 {SELECTIVE}"),
    "pp2, recompute": (2, f"--pipeline-model-parallel-size 2 {RECOMPUTE}"),
    "tp2 pp2 vpp2, recompute": (4, f"--tensor-model-parallel-size 2 {VIRTUAL_STAGES} {RECOMPUTE}"),
    "cp2 ep2, recompute": (2, f"--context-parallel-size 2 --expert-model-parallel-size 2 {RECOMPUTE}"),
}


@pytest.fixture(scope="module")
def replay_run(on_task):
    @functools.cache
    def run(layout: str, replay: str, more_flags: str = ""):
        num_ranks, layout_flags = LAYOUTS[layout]
        flags = f"--routing-replay {replay} {FLAGS} {layout_flags} {more_flags}"
        flags += " --random-routes" * (replay == "R3")
        return on_task("replay.py", num_ranks, *flags.split())

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_every_pass_of_a_step_runs_the_old_routes(replay_run, layout, replay):
    runs_of_a_router = 2 if "recompute" in layout else 1
    for result in replay_run(layout, replay):
        assert result["passes"].tolist() == [runs_of_a_router] * 2


@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_the_pass_that_a_loss_adapts_by_runs_them_too(replay_run, replay):
    for result in replay_run("cp2 ep2, recompute", replay, "--policy-loss m2po"):
        assert result["passes"].tolist() == [3, 3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_runs_the_routes_that_were_sent(replay_run, layout):
    for result in replay_run(layout, "R3"):
        np.testing.assert_array_equal(result["chosen"], result["given"])
        np.testing.assert_array_equal(result["chosen_after"], result["given"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routers_choose_for_a_sample_whose_routes_are_lost(replay_run, layout):
    """Beside others that are replayed; and what they choose is recomputed."""
    runs_of_a_router = 2 if "recompute" in layout else 1
    [all_free], [free_runs] = replay_run("one rank", "R3", "--lost all"), replay_run("one rank", "R2")
    np.testing.assert_array_equal(all_free["chosen"], free_runs["chosen"])
    for result in replay_run(layout, "R3", "--lost some"):
        given, chosen = result["given"], result["chosen"]
        free = (given == 255).all(axis=(1, 2))
        assert 0.2 < free.mean() < 0.6
        np.testing.assert_array_equal(chosen[~free], given[~free])
        np.testing.assert_array_equal(chosen[free], all_free["chosen"][free])
        assert result["passes"][0] == runs_of_a_router  # other weights choose others: the second step's


def test_routes_change_where_they_are_free(replay_run):
    """Else replaying the old ones would prove nothing."""
    [result] = replay_run("one rank", "R2")
    moved = (result["chosen"] != result["chosen_after"]).any(-1).mean()
    print(f"experts that one rollout moves: {moved:.2%}")
    assert (result["chosen"] != result["chosen_after"]).any(-1).mean() > 0.001
    [sent] = replay_run("one rank", "R3")
    assert np.abs(sent["log_probs"] - result["log_probs"]).max() > 0.1


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one rank"])
@pytest.mark.parametrize("replay", ["R2", "R3"])
def test_replay_does_not_depend_on_the_layout(replay_run, layout, replay):
    [one], other = replay_run("one rank", replay), replay_run(layout, replay)[0]
    np.testing.assert_array_equal(other["chosen"], one["chosen"])
    worst = {name: np.abs(other[name] / one[name] - 1).max() for name in ("loss", "grad_norm")}
    worst["log_w"] = np.abs(other["log_w"] - one["log_w"]).max()
    print(f"{replay} {layout}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    assert worst["loss"] <= 2e-6 and worst["grad_norm"] <= 1e-5 and worst["log_w"] <= 1e-5
    if layout == "one rank, recompute":
        assert max(worst.values()) == 0.0
