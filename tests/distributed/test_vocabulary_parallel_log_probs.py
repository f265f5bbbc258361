"""linear_log_probs on several ranks against one rank with the whole vocabulary."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.launch import PROGRAMS, TIMEOUT_S, launch
from tests.support.linear_log_probs import NAMES, gradients, naive, random_allowed

T, H = 17, 8
# (ranks, rows of all ranks, of which real, dtype); some ranks have a few rows of padding, or nothing else
LAYOUTS = {
    "two ranks": (2, 44, 44, np.float64),
    "two ranks, padding": (2, 44, 37, np.float32),
    "three ranks, one and a half of padding": (3, 48, 25, np.float64),
}
BOUNDS = {np.float64: dict(rtol=1e-10, atol=1e-12), np.float32: dict(rtol=1e-4, atol=2e-5)}


def make_inputs(num_rows: int, vocab_size: int, dtype: type) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, vocab_size, T)
    labels[:2] = 0, vocab_size - 1
    arrays = {
        "hidden": 2 * draw.normal(size=(T, H)),
        "weight": draw.normal(size=(num_rows, H)),
        "grad_log_probs": draw.normal(size=T) * (np.arange(T) % 4 > 0),
        "grad_entropy": draw.normal(size=T) * (np.arange(T) % 4 > 1),
    }
    return {name: array.astype(dtype) for name, array in arrays.items()} | {
        "labels": labels,
        "temperature": draw.uniform(0.3, 1.8, T).astype(np.float32),
    }


def on_one_rank(inputs: dict[str, np.ndarray], vocab_size: int) -> dict[str, np.ndarray]:
    """By the definition, with all logits at once."""
    fields = {name: torch.from_numpy(array) for name, array in inputs.items()}
    given = (
        fields["hidden"].requires_grad_(), fields["weight"].requires_grad_(), fields["labels"],
        fields["temperature"],
    )  # fmt: skip
    function = partial(naive, vocab_size=vocab_size, allowed_TV=fields.get("allowed"))
    results = gradients(function, given, fields["grad_log_probs"], fields["grad_entropy"])
    return {name: result.detach().numpy() for name, result in zip(NAMES, results, strict=True)}


def on_ranks(
    num_ranks: int, inputs: dict[str, np.ndarray], vocab_size: int, folder: Path, *flags: str
) -> dict[str, np.ndarray]:
    np.savez(folder / "inputs.npz", **inputs)
    arguments = ["--inputs", str(folder / "inputs.npz"), "--vocab-size", str(vocab_size), "--chunk-size", "5"]
    program = PROGRAMS / "linear_log_probs.py"
    ranks = launch(program, num_ranks, [*arguments, *flags], TIMEOUT_S, folder / "ranks")
    for rank in ranks[1:]:
        for name in ("log_probs", "entropy"):
            assert np.array_equal(ranks[0][name], rank[name]), f"{name} differs between ranks"
    return {
        "log_probs": ranks[0]["log_probs"],
        "entropy": ranks[0]["entropy"],
        "grad_hidden": sum(rank["grad_hidden"] for rank in ranks),  # each rank's is its part
        "grad_weight": np.concatenate([rank["grad_weight"] for rank in ranks]),
    }


@pytest.mark.parametrize("supports", [False, True], ids=["whole vocabulary", "supports"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_agree_with_one_rank(layout, supports, tmp_path):
    """Most supports have no id on some rank; a few tokens have none."""
    num_ranks, num_rows, vocab_size, dtype = LAYOUTS[layout]
    inputs = make_inputs(num_rows, vocab_size, dtype)
    if supports:
        inputs["allowed"] = random_allowed(torch.from_numpy(inputs["labels"]), vocab_size, 0.05).numpy()
    combined = on_ranks(num_ranks, inputs, vocab_size, tmp_path)
    for name, expected in on_one_rank(inputs, vocab_size).items():
        np.testing.assert_allclose(combined[name], expected, **BOUNDS[dtype], err_msg=name)
    assert (combined["grad_weight"][vocab_size:] == 0).all()


def test_ranks_with_bfloat16_inputs_have_fp32_logits(tmp_path):
    """Against one rank with the same numbers in float64: logits of 20 rounded to bfloat16 would show."""
    num_ranks, num_rows, vocab_size, _ = LAYOUTS["two ranks, padding"]
    inputs = make_inputs(num_rows, vocab_size, np.float32)
    inputs["hidden"] *= 2
    for name in ("hidden", "weight"):
        inputs[name] = torch.from_numpy(inputs[name]).bfloat16().float().numpy()
    combined = on_ranks(num_ranks, inputs, vocab_size, tmp_path, "--bf16")
    exact = {name: array.astype(np.float64) for name, array in inputs.items() if name != "labels"}
    expected = on_one_rank(exact | {"labels": inputs["labels"]}, vocab_size)
    for name in ("log_probs", "entropy"):
        np.testing.assert_allclose(combined[name], expected[name], atol=2e-5, err_msg=name)
    for name in ("grad_hidden", "grad_weight"):
        error = np.linalg.norm(combined[name] - expected[name]) / np.linalg.norm(expected[name])
        assert error < 2**-7, f"{name}: {error:.1e}"
