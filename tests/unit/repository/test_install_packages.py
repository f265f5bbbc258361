"""tests/support/apt_install.sh where it cannot install: one line, and the suite goes on."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "support/apt_install.sh"
ASKED = ("sbatch munged", "slurm-wlm munge")  # programs, packages
NEEDED = ("bash", "mktemp", "rm", "grep", "tail", "timeout")


@pytest.fixture
def said(tmp_path):
    """What it says with no more programs than these, and not as root."""

    def run(*more: str) -> str:
        for name in NEEDED:
            (tmp_path / name).symlink_to(shutil.which(name))
        for name in more:
            (tmp_path / name).write_text("#!/bin/bash\nexit 1\n")
            (tmp_path / name).chmod(0o755)
        tmp_path.chmod(0o755)
        for folder in tmp_path.parents[:3]:  # pytest-xdist adds one
            if folder.name.startswith(("pytest-", "popen-")):
                folder.chmod(0o755)
        user = {"user": 65534} if os.geteuid() == 0 else {}
        done = subprocess.run(
            [str(tmp_path / "bash"), "-s", *ASKED], input=SCRIPT.read_text(), cwd="/",
            env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, **user,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_without_apt(said):
    line = said()
    assert line.startswith("tests that need ") and " sbatch " in line and line.count("\n") == 1
    assert line.endswith(" are skipped: only apt-get is known here\n")


def test_not_as_root(said):
    assert ": only root installs them (slurm-wlm " in said("apt-get")
