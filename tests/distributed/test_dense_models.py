"""Models without experts: the same numbers as transformers and on every layout, trained and exported."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.models.family import family_of, shape_of
from megatron_vespo.models.hf_config import read_hf_config
from megatron_vespo.models.parameter_groups import GRADIENT_GROUPS
from tests.support.launch import PROGRAMS, TIMEOUT_S, Result, launch
from tests.support.named_layouts import LAYOUTS
from tests.support.random_task import random_samples, transformers_log_probs
from tests.support.tensors import read_tensors

CASES = [
    ("qwen3", "one rank"),
    ("qwen3", "tp2"),
    ("qwen3", "pp2"),
    ("llama, tied", "one rank"),
    ("llama, tied", "tp2"),
    # each end of the pipeline has a copy of the embedding
    ("llama, tied", "pp2"),
    ("llama, tied", "pp2 vpp2"),
]
each_case = pytest.mark.parametrize(("kind", "layout"), CASES)


@pytest.fixture(scope="module")
def samples_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "samples.pkl"
    path.write_bytes(pickle.dumps(random_samples()))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory, samples_file) -> Callable[[str], tuple[Path, np.ndarray]]:
    """A folder with a random model, and what transformers gives the samples."""

    @functools.cache
    def make(kind: str) -> tuple[Path, np.ndarray]:
        folder = tmp_path_factory.mktemp("model")
        return folder, transformers_log_probs(folder, samples_file, "--make-model", kind)

    return make


@pytest.fixture(scope="module")
def run(tmp_path_factory, samples_file, model) -> Callable[..., tuple[list[Result], Path]]:
    """Four steps at a layout, with exports before and after them; run once."""

    @functools.cache
    def start(kind: str, layout: str, *flags: str) -> tuple[list[Result], Path]:
        num_ranks, layout_flags = LAYOUTS[layout]
        output = tmp_path_factory.mktemp("run")
        arguments = ["--hf-checkpoint", str(model(kind)[0]), "--samples", str(samples_file)]
        arguments += ["--max-tokens-per-gpu", "256", "--lr", "3e-5", *layout_flags.split(), *flags]
        arguments += ["--export-before", str(output / "before"), "--export-after", str(output / "after")]
        arguments += ["--save", str(output / "saved"), "--save-after", "2"]
        return launch(PROGRAMS / "train.py", num_ranks, arguments, TIMEOUT_S, output), output

    return start


@each_case
def test_log_probs_equal_transformers(model, run, kind, layout):
    for result in run(kind, layout)[0]:
        difference = np.abs(result["log_probs"] - model(kind)[1]).max()
        print(f"{kind}, {layout}: log-probs {difference:.1e}")
        assert difference < 1e-5


@each_case
def test_export_of_loaded_weights_is_bit_exact(model, run, kind, layout):
    results, output = run(kind, layout)
    source, exported = read_tensors(model(kind)[0]), read_tensors(output / "before")
    assert exported.keys() == source.keys()
    assert all(exported[name].equal(tensor) for name, tensor in source.items())
    by_stage = {int(result["stage"]): result["names"].tolist() for result in results}
    assert sorted(name for names in by_stage.values() for name in names) == sorted(source)  # none twice


@pytest.mark.parametrize(("kind", "layout"), [case for case in CASES if case[1] != "one rank"])
def test_training_does_not_depend_on_the_layout(run, kind, layout):
    one, other = run(kind, "one rank")[0][0], run(kind, layout)[0][0]
    worst = {name: np.abs(other[name] / one[name] - 1).max() for name in ("loss", "grad_norm", "entropy")} | {
        name: np.abs(other[name] - one[name]).max() for name in ("log_w", "gradient_norms")
    }
    print(f"{kind}, {layout}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
    assert max(worst.values()) <= 1e-5
    assert (one["grad_norm"] > 0.01).all()


@pytest.mark.parametrize(("kind", "layout"), [("qwen3", "tp2"), ("llama, tied", "pp2")])
def test_transformers_reads_the_trained_policy(model, run, samples_file, kind, layout):
    results, output = run(kind, layout)
    trained = results[0]["log_probs_after"]
    difference = np.abs(transformers_log_probs(output / "after", samples_file) - trained).max()
    print(f"{kind}, {layout}: exported log-probs {difference:.1e}")
    assert difference < 1e-5
    assert np.abs(trained - model(kind)[1]).max() > 0.1  # it did train


@pytest.mark.parametrize("layout", ["pp2", "one rank"])
def test_a_tied_model_resumes(run, layout):
    """Also where the embedding has no second copy."""
    uninterrupted, output = run("llama, tied", "pp2")
    resumed, _ = run("llama, tied", layout, "--load", str(output / "saved"))
    assert resumed[0]["first_iteration"] == 2
    for name in ("loss", "grad_norm", "log_w"):
        expected = uninterrupted[0][name][2:]
        np.testing.assert_allclose(resumed[0][name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["qwen3", "llama, tied"])
def test_the_table_has_the_models_order(model, run, kind):
    config = read_hf_config(model(kind)[0])
    expected = list(family_of(config).hf_tensors(shape_of(config)))
    assert run(kind, "one rank")[0][0]["names"].tolist() == expected


@pytest.mark.parametrize("kind", ["qwen3", "llama, tied"])
def test_parts_that_the_model_lacks_have_no_gradient(run, kind):
    norms = run(kind, "one rank")[0][0]["gradient_norms"][0]
    absent = {group for group, norm in zip(GRADIENT_GROUPS, norms, strict=True) if norm == 0}
    assert absent == {"router", "experts"} | ({"output"} if "tied" in kind else set())
