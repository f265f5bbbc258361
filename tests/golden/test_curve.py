"""The learning curve of tests/golden/curve.txt: a refactoring reproduces it bit for bit.

After a change that is meant to change numbers:  .venv/bin/python -m pytest tests/golden --write-golden
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden.curve import COLUMNS, NUM_STEPS, make_model
from tests.support.launch import TIMEOUT_S, launch

CURVE = Path(__file__).parent / "curve.txt"
ELSEWHERE = 1e-6  # relative; other processors round sums in another order


def machine() -> str:
    """What decides on the order of roundings: processor, torch and the instructions it uses."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next(
            line.partition(":")[2].strip() for line in cpuinfo.open() if line.startswith("model name")
        )
    return f"{model}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden_model")
    make_model(folder)
    return folder


def run(model: Path, folder: Path, preloaded: bool = True) -> np.ndarray:
    program = Path(__file__).parent / "curve.py"
    return launch(program, 1, [str(model)], TIMEOUT_S, folder, preloaded)[0]["curve"]


@pytest.fixture(scope="module")
def curve(model, tmp_path_factory) -> np.ndarray:
    return run(model, tmp_path_factory.mktemp("curve"))


def relative(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of a column, relative to the column's largest value."""
    return float((np.abs(one - other) / np.abs(one).max(axis=0)).max())


def test_the_curve_is_the_stored_one(curve, request):
    if request.config.getoption("--write-golden"):
        header = f"{machine()}\n{' '.join(COLUMNS)}"
        np.savetxt(CURVE, curve, fmt="%.17g", header=header)
    stored = np.loadtxt(CURVE)
    written_on = CURVE.read_text().splitlines()[0].removeprefix("# ")
    assert curve.shape == stored.shape == (NUM_STEPS, len(COLUMNS))
    print(f"largest relative difference {relative(stored, curve):.1e}; written on: {written_on}")
    if machine() == written_on:
        np.testing.assert_array_equal(curve, stored)
    assert relative(stored, curve) <= ELSEWHERE


def test_a_second_run_is_the_same_bit_for_bit(curve, model, tmp_path):
    np.testing.assert_array_equal(run(model, tmp_path), curve)


def test_plainer_instructions_round_differently_but_not_further(curve, model, tmp_path, monkeypatch):
    """Another machine, as far as one machine can play it."""
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "SSE4_2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    plain = run(model, tmp_path, preloaded=False)  # a fresh interpreter: torch reads them when it is imported
    difference = relative(curve, plain)
    print(f"largest relative difference {difference:.1e}")
    assert 0 < difference <= ELSEWHERE


def test_the_curve_moves(curve):
    """Else it could not show a difference."""
    assert np.isfinite(curve).all()
    phi_mean = curve[:, COLUMNS.index("phi_mean")]
    # the first mini-batch of a rollout is its own pi_old's, the second is one step later
    assert np.abs(phi_mean[0::2] - 1).max() < 1e-5 < 1e-3 < np.abs(phi_mean[1::2] - 1).max()
    assert np.ptp(curve[0::2, 0]) > 1e-3
