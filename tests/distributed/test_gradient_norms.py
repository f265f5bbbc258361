"""Norms of every parameter's gradient: the whole gradient's parts, once each, at every layout."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from megatron_vespo.commands.check_layout.layout import Layout
from megatron_vespo.models.parameter_groups import GRADIENT_GROUPS, PARTS, THIRDS
from tests.support.launch import Result

# small buckets: a bucket's parts fall into the middle of parameters
SMALL_BUCKETS = "--ddp-bucket-size 3000 --overlap-grad-reduce"
CASES = {
    "tp1": "",
    "dp2": SMALL_BUCKETS,
    "tp2,pp2,ep2": "",
    "pp2,vpp2,ep2": "",
    "tp2,etp2,ep2": "",
    "cp2,ep2": "",
}


@pytest.fixture(scope="module")
def run(on_task):
    """What every rank handed back; each layout is run once."""

    @functools.cache
    def start(name: str) -> list[Result]:
        layout = Layout.parse(name)
        flags = layout.flags()
        del flags[:2]  # the number of ranks
        flags += ["--ratio-denominator", "decoupled", "--max-tokens-per-gpu", "256", *CASES[name].split()]
        return on_task("gradient_norms.py", layout.world_size, *flags)

    return start


def test_on_one_rank_they_are_those_of_main_grad(run):
    [result] = run("tp1")
    expected = dict(zip(result["whole_names"], result["whole_norms"], strict=True))
    assert sorted(expected) == list(result["names"])
    np.testing.assert_allclose(result["norms"], [expected[name] for name in result["names"]], rtol=1e-12)
    # Q, K, V in one; 8 experts of 2 matrices, router, 4 norms and the output projection a layer
    assert len(expected) == 3 + 4 * (1 + 8 * 2 + 1 + 4 + 1)
    assert (result["norms"] > 0).mean() > 0.9


@pytest.mark.parametrize("layout", CASES)
def test_their_squares_sum_to_megatrons_norm(run, layout):
    for result in run(layout):
        total = np.sqrt(np.square(result["norms"]).sum())
        assert total == pytest.approx(float(result["grad_norm"]), rel=2e-6)


@pytest.mark.parametrize("layout", CASES)
def test_the_parts_of_the_model_have_the_norms_of_their_parameters(run, layout):
    """Sorted out here by other marks in the names than the program's."""
    marks = {
        "embedding": ("word_embeddings",),
        "attention": ("linear_qkv.weight", "linear_proj"),
        "router": ("router",),
        "experts": ("experts",),
        "mlp": ("dense",),
        "norms": ("norm",),
        "output": ("output_layer",),
        "first_third": ("layers.0.", "layers.1."),
        "middle_third": ("layers.2.",),
        "last_third": ("layers.3.",),
    }
    assert marks.keys() == set(GRADIENT_GROUPS)
    for result in run(layout):
        by_name = dict(zip(result["names"], result["norms"], strict=True))
        found = dict(zip(GRADIENT_GROUPS, result["group_norms"], strict=True))
        for group, words in marks.items():
            squares = [norm**2 for name, norm in by_name.items() if any(word in name for word in words)]
            assert found[group] == pytest.approx(np.sqrt(sum(squares)), rel=1e-12), group
        whole = np.sqrt(sum(found[part] ** 2 for part in PARTS))
        assert whole == pytest.approx(float(result["grad_norm"]), rel=2e-6)
        assert 0 < sum(found[third] ** 2 for third in THIRDS) < whole**2


@pytest.mark.parametrize("layout", [layout for layout in CASES if layout != "tp1"])
def test_they_do_not_depend_on_the_layout(run, layout):
    [one] = run("tp1")
    results = run(layout)
    for result in results:
        np.testing.assert_array_equal(result["names"], one["names"])
        np.testing.assert_array_equal(result["norms"], results[0]["norms"])
    scale = np.maximum(one["norms"], 1e-3 * one["grad_norm"])
    difference = np.abs(results[0]["norms"] - one["norms"]) / scale
    print(f"{layout}: {difference.max():.1e} at {one['names'][difference.argmax()]}")
    assert difference.max() < 1e-5
