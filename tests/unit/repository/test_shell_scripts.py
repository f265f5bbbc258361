"""Every shell script of the repository is one that bash reads and shellcheck has nothing to say about."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDERS = ("docs", "examples", "patches", "slurm", "tests")


def shell_scripts() -> list[str]:
    """What runs leave behind (examples/*/work) is not ours."""
    found = [ROOT / ".ci/run"] if (ROOT / ".ci/run").exists() else []
    for folder in FOLDERS:
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".sh", ".sbatch")]
    names = sorted(str(path.relative_to(ROOT)) for path in found)
    return [name for name in names if "/work/" not in name]


def test_none_lies_elsewhere():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode:
        pytest.skip("no git here")
    scripts = {name for name in listed.stdout.split("\n") if name and starts_a_shell(ROOT / name)}
    assert scripts and scripts <= set(shell_scripts())


def starts_a_shell(path: Path) -> bool:
    if path.suffix in (".sh", ".sbatch"):
        return True
    with path.open("rb") as file:
        first = file.readline(80)
    return first.startswith(b"#!") and first.split(b"/")[-1].split()[-1] in (b"bash", b"sh")


@pytest.mark.parametrize("script", shell_scripts())
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True, timeout=60)


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: see tests/slurm/install.sh")
    told = subprocess.run(
        ["shellcheck", "--external-sources", *shell_scripts()],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
