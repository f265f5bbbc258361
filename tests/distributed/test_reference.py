"""The reference policy at every layout: its KL in the loss, its log-probs, and a reference that moves."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.named_layouts import LAYOUTS as ALL

LAYOUTS = {
    "one rank": (1, ""),
    "small packs": (1, "--max-tokens-per-gpu 64"),
    "cp2": (2, "--context-parallel-size 2"),
    "dp2 ep2, small packs": (2, "--expert-model-parallel-size 2 --max-tokens-per-gpu 100"),
    "tp2 pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
                   "--expert-tensor-parallel-size 1"),
}  # fmt: skip
OTHERS = {name: layout for name, layout in ALL.items() if name not in LAYOUTS}

NUM_CASES = 12


def marked(*layouts: str) -> list:
    """Those that a short run of the tests leaves out."""
    return [pytest.param(layout, marks=pytest.mark.slow) for layout in layouts]


@pytest.fixture(scope="module")
def other_model(task, tmp_path_factory) -> Path:
    """The task's model with other weights: log-probs that differ by some tenths."""
    folder = tmp_path_factory.mktemp("reference") / "model"
    shutil.copytree(task.model, folder)
    generator = torch.Generator().manual_seed(5)
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        moved = {
            name: w + 0.3 * w.std() * torch.randn(w.shape, generator=generator).to(w.dtype)
            for name, w in weights.items()
        }
        save_file(moved, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def naive(task, other_model, tmp_path_factory):
    """Losses with the KL of the other model, by transformers."""
    arguments = ["--model", str(task.model), "--samples", str(task.samples_file)]
    arguments += ["--reference", str(other_model)]
    folder = tmp_path_factory.mktemp("naive")
    return launch(PROGRAMS / "naive_steps.py", 1, arguments, TIMEOUT_S, folder, preloaded=False)[0]


@pytest.fixture(scope="module")
def run(on_task):
    def start(layout: str, *flags: str):
        num_ranks, layout_flags = (OTHERS | LAYOUTS)[layout]
        return on_task("reference.py", num_ranks, *layout_flags.split(), *flags)

    return start


@pytest.fixture(scope="module")
def result_of(run, other_model):
    """Every rank's results at a layout, run once."""
    flags = ["--lr", "0", "--kl-loss-coef", "0", "--reference-checkpoint", str(other_model)]
    flags += ["--ratio-denominator", "rollout"]
    return cache(lambda layout: run(layout, *flags))


@pytest.mark.parametrize("layout", [*LAYOUTS, *marked(*OTHERS)])
def test_losses_are_the_naive_reference(naive, result_of, layout):
    cases = [case for case in naive if case.startswith("kl ")]
    assert len(cases) == NUM_CASES
    worst = np.zeros(3)
    for result in result_of(layout):
        for case in cases:
            found, (loss, grad_norm, terms) = result[case], naive[case]
            part = abs(result[f"kl_loss {case}"] - naive[f"kl_loss {case}"]) / terms
            errors = [abs(found[0] - loss) / terms, abs(found[1] / grad_norm - 1), part]
            assert max(errors) <= 1e-5, f"{case}: loss {errors[0]:.1e}, grad_norm {errors[1]:.1e}, {part:.1e}"
            worst = np.maximum(worst, errors)
        np.testing.assert_allclose(result["reference"], naive["reference"], rtol=0, atol=1e-5)
    print(f"{layout}: loss {worst[0]:.1e} of its terms, grad_norm {worst[1]:.1e}, KL term {worst[2]:.1e}")


def test_the_terms_differ(naive):
    """Else one would have been run under many names; k2 and k3 have one gradient where it is unbiased."""
    norms = {case: naive[case][1] for case in naive if case.startswith("kl ")}
    assert norms.pop("kl k3 inf token-mean") == pytest.approx(norms["kl k2 inf token-mean"], rel=1e-6)
    assert norms.pop("kl k3 1.05 token-mean") == pytest.approx(norms["kl k2 1.05 token-mean"], rel=1e-6)
    assert norms.pop("kl k1 inf token-mean") == pytest.approx(norms["kl k2 inf token-mean"], rel=1e-6)
    assert norms.pop("kl k1 1.05 token-mean") == pytest.approx(norms["kl k2 1.05 token-mean"], rel=1e-6)
    ordered = sorted(norms.values())
    assert min(np.diff(ordered) / ordered[:-1]) > 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_metrics_are_means_per_token(naive, result_of, layout):
    for result in result_of(layout):
        x = (result["reference"] - result["policy"]).astype(np.float64)
        found = result["kl sums"]
        expected = [x.mean(), np.square(x).mean(), (np.expm1(x) - x).mean()]
        np.testing.assert_allclose(found, expected, rtol=2e-5)
        assert found[2] > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_that_samples_carry_are_those_in_place(result_of, layout):
    """But for their rounding: samples carry float32."""
    for result in result_of(layout):
        in_place, carried = result["in place and carried"]
        rest = [0, 1, 3, 4]  # loss, gradient norm, sums of x^2 and k3
        np.testing.assert_allclose(carried[rest], in_place[rest], rtol=1e-6)
        rounding = np.spacing(np.abs(result["reference"])) / 2
        assert rounding.dtype == np.float32
        assert abs(carried[2] - in_place[2]) <= rounding.sum(dtype=np.float64)


LAYOUTS_TO_MOVE = ["one rank", "tp2 pp2 ep2", "dp2, overlap", "pp2 vpp2 cp2, recompute, overlap"]


@pytest.mark.parametrize("layout", ["one rank", *marked("cp2", "tp2 pp2", *LAYOUTS_TO_MOVE[1:])])
def test_the_policy_is_its_own_reference_at_the_start(run, layout):
    """Bit for bit at the same packs, so that every estimate is exactly 0; then it is left behind."""
    for result in run(layout, "--lr", "1e-3", "--kl-loss-coef", "0.1", "--moves", "--last-step", "4"):
        np.testing.assert_array_equal(result["reference 0"], result["policy 0"])
        np.testing.assert_array_equal(result["reference 2"], result["policy 0"])
        assert np.abs(result["policy 2"] - result["policy 0"]).max() > 0.01
        assert result["steps"][0, 2:].tolist() == [0.0] * 4
        assert result["steps"][1, 2] > 0 and result["steps"][1, 5] > 0


@pytest.mark.parametrize("kept", ["frozen", "moved"])
@pytest.mark.parametrize(
    ("layout", "background"),
    [
        ("one rank", False),
        pytest.param("tp2 pp2 ep2", True, marks=pytest.mark.slow),
        *(pytest.param(layout, False, marks=pytest.mark.slow) for layout in LAYOUTS_TO_MOVE[1:]),
    ],
)
def test_resumed_equals_uninterrupted(run, tmp_path, layout, kept, background):
    """Stopped after six of ten steps; the reference moves after four and eight."""
    flags = ["--lr", "1e-3", "--kl-loss-coef", "0.1", "--unbiased-kl", "2", "--moves", "--last-step", "10"]
    flags += ["--train-iters", "10"]
    if kept == "moved":
        flags += ["--reference-update-interval", "4"]
    if background:
        flags += ["--async-save"]
    saved = str(tmp_path / "saved")
    whole = run(layout, *flags, "--save", saved, "--save-after", "6")
    resumed = run(layout, *flags, "--load", saved)
    for expected, actual in zip(whole, resumed, strict=True):
        moved = kept == "moved"
        np.testing.assert_array_equal(expected["reference 6"], expected[f"policy {4 if moved else 0}"])
        np.testing.assert_array_equal(expected["reference 8"], expected[f"policy {8 if moved else 0}"])
        assert actual["version"] == 6
        np.testing.assert_array_equal(actual["steps"], expected["steps"][6:])
        for step in (6, 8):
            np.testing.assert_array_equal(actual[f"reference {step}"], expected[f"reference {step}"])


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("tp2 pp2 ep2", "ep2"), ("pp2 vpp2", "one rank")])
def test_a_moved_reference_comes_back_at_another_layout(run, tmp_path, before, after):
    flags = ["--lr", "1e-3", "--kl-loss-coef", "0.1", "--reference-update-interval", "4", "--moves"]
    saved = str(tmp_path / "saved")
    whole = run(before, *flags, "--last-step", "8", "--save", saved, "--save-after", "6")[0]
    assert np.abs(whole["reference 6"] - whole["policy 6"]).max() > 0.01
    for actual in run(after, *flags, "--last-step", "8", "--load", saved):
        difference = np.abs(actual["reference 6"] - whole["reference 6"]).max()
        print(f"{before} to {after}: reference {difference:.1e}")
        assert difference < 1e-4
