"""GLM-4.5's family: the same numbers as transformers and on every layout; the routers' biases stay."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.models.family import family_of, shape_of
from megatron_vespo.models.hf_config import read_hf_config
from tests.support.launch import PROGRAMS, TIMEOUT_S, Result, launch
from tests.support.named_layouts import LAYOUTS, RECOMPUTE
from tests.support.random_task import Task, make_task, transformers_log_probs
from tests.support.tensors import read_tensors

CASES = ["one rank", "tp2 pp2 ep2", "pp2 vpp2"]
BIAS = "e_score_correction_bias"


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Task:
    return make_task(tmp_path_factory.mktemp("glm"), "glm4 moe")


@pytest.fixture(scope="module")
def run(tmp_path_factory, task) -> Callable[..., tuple[list[Result], Path]]:
    """Four steps at a layout, with exports before and after them; run once."""

    @functools.cache
    def start(layout: str, *flags: str) -> tuple[list[Result], Path]:
        num_ranks, layout_flags = LAYOUTS[layout]
        output = tmp_path_factory.mktemp("run")
        arguments = ["--hf-checkpoint", str(task.model), "--samples", str(task.samples_file)]
        arguments += ["--max-tokens-per-gpu", "256", "--lr", "3e-5", *layout_flags.split(), *flags]
        arguments += ["--export-before", str(output / "before"), "--export-after", str(output / "after")]
        arguments += ["--save", str(output / "saved"), "--save-after", "2"]
        return launch(PROGRAMS / "train.py", num_ranks, arguments, TIMEOUT_S, output), output

    return start


@pytest.mark.parametrize("layout", CASES)
def test_log_probs_equal_transformers(task, run, layout):
    for result in run(layout)[0]:
        difference = np.abs(result["log_probs"] - task.log_probs).max()
        print(f"{layout}: log-probs {difference:.1e}")
        assert difference < 1e-5


@pytest.mark.parametrize("layout", CASES)
def test_export_of_loaded_weights_is_bit_exact(task, run, layout):
    results, output = run(layout)
    source, exported = read_tensors(task.model), read_tensors(output / "before")
    assert exported.keys() == source.keys()
    assert all(exported[name].equal(tensor) for name, tensor in source.items())
    by_stage = {int(result["stage"]): result["names"].tolist() for result in results}
    assert sorted(name for names in by_stage.values() for name in names) == sorted(source)  # none twice


@pytest.mark.parametrize("layout", CASES)
def test_engines_of_any_layout_would_get_their_shards(run, layout):
    for result in run(layout)[0]:
        assert result["wrong_shards"].tolist() == []


@pytest.mark.parametrize("layout", CASES[1:])
def test_training_does_not_depend_on_the_layout(run, layout):
    one, other = run("one rank")[0][0], run(layout)[0][0]
    worst = {name: np.abs(other[name] / one[name] - 1).max() for name in ("loss", "grad_norm", "entropy")} | {
        name: np.abs(other[name] - one[name]).max() for name in ("log_w", "gradient_norms")
    }
    print(f"{layout}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    assert max(worst.values()) <= 1e-5
    assert (one["grad_norm"] > 0.01).all()


@pytest.mark.parametrize("layout", CASES)
def test_only_the_routers_biases_stay_as_they_were(task, run, layout):
    _, output = run(layout)
    source, trained = read_tensors(task.model), read_tensors(output / "after")
    kept = {name for name, tensor in source.items() if trained[name].equal(tensor)}
    assert kept == {name for name in source if name.endswith(BIAS)}
    assert len(kept) == 3  # the first of four layers has no router


def test_transformers_reads_the_trained_policy(task, run):
    results, output = run("tp2 pp2 ep2")
    trained = results[0]["log_probs_after"]
    difference = np.abs(transformers_log_probs(output / "after", task.samples_file) - trained).max()
    print(f"exported log-probs {difference:.1e}")
    assert difference < 1e-5
    assert np.abs(trained - task.log_probs).max() > 0.1  # it did train


@pytest.mark.parametrize("layout", ["tp2 pp2 ep2", "one rank"])
def test_it_resumes(run, layout):
    uninterrupted, output = run(layout)
    resumed, _ = run(layout, "--load", str(output / "saved"))
    assert resumed[0]["first_iteration"] == 2
    for name in ("loss", "grad_norm", "log_w"):
        expected = uninterrupted[0][name][2:]
        np.testing.assert_allclose(resumed[0][name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_table_has_the_models_tensors(task, run):
    config = read_hf_config(task.model)
    expected = list(family_of(config).hf_tensors(shape_of(config)))
    assert sorted(run("one rank")[0][0]["names"].tolist()) == sorted(expected)


@pytest.fixture(scope="module")
def replay(tmp_path_factory, task) -> Callable[..., list[Result]]:
    """programs/replay.py at a layout; run once."""

    @functools.cache
    def start(layout: str, kind: str) -> list[Result]:
        num_ranks, layout_flags = LAYOUTS[layout]
        arguments = ["--hf-checkpoint", str(task.model), "--samples", str(task.samples_file)]
        arguments += ["--max-tokens-per-gpu", "128", "--lr", "1e-4", *layout_flags.split()]
        arguments += ["--routing-replay", kind, *(["--random-routes"] if kind == "R3" else [])]
        arguments += RECOMPUTE.split()
        return launch(
            PROGRAMS / "replay.py", num_ranks, arguments, TIMEOUT_S, tmp_path_factory.mktemp("replay")
        )

    return start


@pytest.mark.parametrize("layout", ["one rank", "tp2 pp2 ep2"])
@pytest.mark.parametrize("kind", ["R2", "R3"])
def test_recorded_routes_are_imposed(replay, layout, kind):
    """In every pass of a step, recomputation included, on the layers that have routers."""
    for result in replay(layout, kind):
        assert result["passes"].tolist() == [2, 2]
        if kind == "R3":  # layers are counted over the whole model; the first one has no router
            np.testing.assert_array_equal(result["chosen"][:, 1:], result["given"][:, 1:])
            np.testing.assert_array_equal(result["chosen_after"][:, 1:], result["given"][:, 1:])


@pytest.mark.parametrize("kind", ["R2", "R3"])
def test_replay_does_not_depend_on_the_layout(replay, kind):
    [one], other = replay("one rank", kind), replay("tp2 pp2 ep2", kind)[0]
    np.testing.assert_array_equal(other["chosen"], one["chosen"])
    worst = {name: np.abs(other[name] / one[name] - 1).max() for name in ("loss", "grad_norm")}
    worst["log_w"] = np.abs(other["log_w"] - one["log_w"]).max()
    print(f"{kind}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    assert max(worst.values()) <= 1e-5
