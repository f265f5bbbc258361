"""The launcher itself: results by rank, and failures that name the rank and end everything in time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from launch import launch

PROGRAM = """
import os, sys, time
import numpy as np
rank = int(os.environ["RANK"])
if sys.argv[1] == "fail" and rank == 1:
    sys.exit("rank 1 gives up")
if sys.argv[1] != "succeed" and rank == 0:
    print("rank 0 waits", flush=True)
    time.sleep(60)
np.savez(os.environ["RESULT_FILE"], square=rank**2, size=os.environ["WORLD_SIZE"])
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_results_by_rank(program, tmp_path):
    results = launch(program, 3, ["succeed"], 30, tmp_path)
    assert [(int(result["square"]), str(result["size"])) for result in results] == [
        (0, "3"),
        (1, "3"),
        (4, "3"),
    ]


def test_the_failing_rank_is_shown(program, tmp_path):
    started = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"program.py on 2 ranks: rank 1 ended with code 1:\nrank 1 gives up"
    ):
        launch(program, 2, ["fail"], 30, tmp_path)
    assert time.monotonic() - started < 20  # rank 0 was not waited for


def test_a_rank_that_hangs_is_named(program, tmp_path):
    with pytest.raises(RuntimeError, match=r"ranks \[0\] still ran at the deadline\nrank 0:\nrank 0 waits"):
        launch(program, 2, ["hang"], 4, tmp_path)
