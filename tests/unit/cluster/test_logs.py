"""Where workers' output goes."""

import subprocess
import sys

from megatron_vespo.cluster.logs import TAIL_LINES, log_tail

CHATTY = """
import os, subprocess, sys
from pathlib import Path
from megatron_vespo.cluster.logs import redirect_output
print("before", flush=True)
redirect_output(Path(sys.argv[1]))
print("python", flush=True)
os.write(1, b"file descriptor\\n")
subprocess.run(["sh", "-c", "echo child; echo error >&2"])
"""


def test_everything_after_the_redirection_is_in_the_log(tmp_path):
    path = tmp_path / "logs/rank0.log"
    for _ in range(2):  # the second process appends
        done = subprocess.run(
            [sys.executable, "-c", CHATTY, path], capture_output=True, text=True, timeout=60, check=True
        )
        assert (done.stdout, done.stderr) == ("before\n", "")
    assert path.read_text().splitlines() == ["python", "file descriptor", "child", "error"] * 2


def test_the_tail_is_introduced_by_its_path(tmp_path):
    path = tmp_path / "engine.log"
    path.write_text("\n".join(f"line {number}" for number in range(100)) + "\n")
    lines = log_tail(path).splitlines()
    assert lines[0] == f"end of {path}:"
    assert lines[1:] == [f"line {number}" for number in range(100 - TAIL_LINES, 100)]


def test_broken_characters_do_not_hide_the_log(tmp_path):
    path = tmp_path / "engine.log"
    path.write_bytes(b"caf\xe9\n")
    assert log_tail(path) == f"end of {path}:\ncaf�"


def test_no_log(tmp_path):
    assert log_tail(tmp_path / "nothing.log") == f"no log at {tmp_path}/nothing.log"
