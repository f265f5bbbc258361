"""Checkpoints under Transformer Engine: resumed at any layout, and by the local layers and the reverse."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest

from tests.support.launch import PROGRAMS, Result
from tests.support.tiny_checkpoints import convert

SAVED_AT = "tp2,ep2"
TE, LOCAL = True, False
BOUND = 1e-5  # of log-probs after two further steps; Adam divides small gradients by their own size
PER_STEP = "loss grad_norm learning_rate num_tokens log_w weight log_mismatch".split()


@pytest.fixture(scope="module")
def uninterrupted(on_task, tmp_path_factory):
    """Four steps by either implementation: what rank 0 handed back, and the folder of a save after two."""

    @functools.cache
    def start(te: bool) -> tuple[Result, Path]:
        folder = tmp_path_factory.mktemp("saved")
        flags = [
            "--save",
            str(folder / "saved"),
            "--save-after",
            "2",
            "--export-after",
            str(folder / "after"),
        ]
        return on_task(te, PROGRAMS / "train.py", SAVED_AT, *flags)[0], folder / "saved"

    return start


def resume(on_task, te: bool, layout: str, saved: Path, folder: Path) -> Result:
    flags = ["--load", str(saved), "--export-after", str(folder / "after")]
    return on_task(te, PROGRAMS / "train.py", layout, *flags)[0]


def test_resumed_at_the_same_layout_it_is_bit_for_bit_the_same(on_task, uninterrupted, tmp_path):
    expected, saved = uninterrupted(TE)
    actual = resume(on_task, TE, SAVED_AT, saved, tmp_path)
    assert (actual["first_iteration"], actual["consumed_prompts"]) == (2, 7)
    for name in PER_STEP:
        np.testing.assert_array_equal(actual[name], expected[name][2:], err_msg=name)
    np.testing.assert_array_equal(actual["log_probs_after"], expected["log_probs_after"])


@pytest.mark.parametrize(
    "writer,reader,layout",
    [
        pytest.param(TE, TE, "pp2,vpp2,ep2", id="te-te"),
        pytest.param(LOCAL, TE, SAVED_AT, id="local-te"),
        pytest.param(LOCAL, TE, "pp2,ep2", id="local-te-elsewhere"),
        pytest.param(TE, LOCAL, SAVED_AT, id="te-local"),
        pytest.param(TE, LOCAL, "ep2", id="te-local-elsewhere"),
    ],
)
def test_weights_and_optimizer_go_on(on_task, uninterrupted, writer, reader, layout, tmp_path):
    expected, saved = uninterrupted(writer)
    actual = resume(on_task, reader, layout, saved, tmp_path)
    assert (actual["first_iteration"], actual["consumed_prompts"]) == (2, 7)
    worst = np.abs(actual["log_probs_after"] - expected["log_probs_after"]).max()
    print(f"log-probs {worst:.1e}, gradient norms {actual['grad_norm'] / expected['grad_norm'][2:] - 1}")
    assert worst <= BOUND
    # fresh moments would show: the steps before and after them differ by a hundred times as much
    assert np.abs(actual["log_probs_after"] - actual["log_probs"]).max() > 100 * BOUND
    np.testing.assert_allclose(actual["grad_norm"], expected["grad_norm"][2:], rtol=2e-6)
    np.testing.assert_array_equal(actual["learning_rate"], expected["learning_rate"][2:])


@pytest.mark.parametrize("order", [(TE, LOCAL), (LOCAL, TE)], ids=["te first", "local first"])
def test_converted_weights_go_through_both_implementations_unchanged(launch, task, order, tmp_path):
    checkpoint = tmp_path / "converted"
    assert convert("hf-to-megatron", task.model, checkpoint) == 0
    for te in order:
        saved = tmp_path / ("te" if te else "local")
        flags = ["--load", str(checkpoint), "--save", str(saved), "--no-load-optim"]
        flags += ["--no-save-optim", "--hf-checkpoint", str(task.model), "--tensor-model-parallel-size", "2"]
        results = launch(te, PROGRAMS / "conversion.py", 2, flags)
        assert all(len(result["names"]) and not len(result["wrong"]) for result in results)
        checkpoint = saved
    assert convert("megatron-to-hf", checkpoint, tmp_path / "hf") == 0
    assert convert("verify", task.model, tmp_path / "hf") == 0
