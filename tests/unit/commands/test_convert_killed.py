"""A conversion that is ended at any moment leaves no half a checkpoint, and the old one as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_conversions", folder],
        capture_output=True, text=True, timeout=280, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def test_killed(results):
    cases = [result for result in results if result["signal"] == "kill"]
    assert len(cases) >= 2 * 9
    for result in cases:
        last = result["moment"] == (["rename", 2] if result["force"] else ["rename", 1])
        assert result["code"] == -9, result
        if result["force"]:
            # between the renames it is at its other name, from where the next run takes it back
            assert result["after"] == (None if last else result["before"]), result
            assert (".target.replaced" in result["left"]) == last, result
        else:
            assert result["after"] is None, result
        assert result["again"] == 0, result


def test_terminated_or_interrupted(results):
    cases = [result for result in results if result["signal"] != "kill"]
    assert len(cases) >= 2 * 11
    for result in cases:
        assert result["code"] == 130, result
        assert result["after"] == result["before"], result
        assert result["left"] == (["target"] if result["force"] else []), result
        assert result["again"] == 0, result


def test_in_the_end_everything_is_there(results):
    for result in results:
        assert result["end"] == ["target"], result
        assert result["same"] == 0, result
