"""The launcher itself: results by rank, and failures that name the rank and end everything in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY, launch

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


STATE = """
import os, sys
import numpy as np
loaded = "megatron.core" in sys.modules
initialized = loaded and sys.modules["torch"].distributed.is_initialized()
np.savez(os.environ["RESULT_FILE"], loaded=loaded, initialized=initialized, argv=sys.argv, pid=os.getpid())
"""


@pytest.mark.parametrize("preloaded", [True, False])
def test_each_rank_is_a_process_in_its_first_state(tmp_path, preloaded):
    program = tmp_path / "state.py"
    program.write_text(STATE)
    results = launch(program, 2, ["--flag"], 60, tmp_path, preloaded=preloaded)
    assert len({int(result["pid"]) for result in results} | {os.getpid()}) == 3
    for result in results:
        assert result["loaded"] == preloaded
        assert not result["initialized"]
        assert result["argv"].tolist() == [str(program), "--flag"]


PARENT = """
import sys
from pathlib import Path
from tests.support.launch import launch
if __name__ == "__main__":
    launch(Path(sys.argv[1]), 1, [], 100, Path(sys.argv[2]))
"""
WAITING = """
import os, sys, time
from pathlib import Path
written = Path(sys.argv[0]).with_name("written")
written.write_text(f"{os.getpid()} {os.getppid()}")
written.rename(written.with_name("pids"))
time.sleep(100)
"""


def test_server_and_ranks_die_with_a_killed_parent(tmp_path):
    for name, text in (("parent.py", PARENT), ("waiting.py", WAITING)):
        (tmp_path / name).write_text(text)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "waiting.py"), str(tmp_path)]
    path = str(REPOSITORY)
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}) as parent:
        wait_until((tmp_path / "pids").exists, 60)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]  # the rank's and the server's
        assert all(map(runs, pids))
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(map(runs, pids)), 20)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # nobody may be left to reap it


def wait_until(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the deadline passed"
        time.sleep(0.05)
